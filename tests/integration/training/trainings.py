"""Training services to test against: in this process or as a child, and what the tests ask of them."""

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from sqlalchemy import create_engine, select
from tests.integration.registry.registries import blob_of

from penstock.api.dataset.v1 import dataset_service_pb2 as pb
from penstock.api.dataset.v1 import dataset_service_pb2_grpc
from penstock.api.dataset.v1.dataset_pb2 import Dataset, DatasetFormat, Split
from penstock.api.registry.v1 import artifact_service_pb2_grpc
from penstock.api.training.v1 import training_service_pb2, training_service_pb2_grpc, worker_service_pb2_grpc
from penstock.api.training.v1.job_pb2 import Job, JobEvent, JobSpec, JobState, MlpSpec, MlpTask, Registration
from penstock.rpc.server import listening
from penstock.training.app import application
from penstock.training.settings import TrainingSettings
from penstock.training.tables import AuditRow

CSV = DatasetFormat.DATASET_FORMAT_CSV
JSON_LINES = DatasetFormat.DATASET_FORMAT_JSON_LINES

_CHILD = """
import asyncio, json, resource, sys
from penstock.rpc.server import serve
from penstock.training.app import application
from penstock.training.settings import TrainingSettings
flags = json.loads(sys.argv[1])
file_limit = flags.pop("file_limit")
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
settings = TrainingSettings.load(flags)
asyncio.run(serve(settings, application(settings)))
"""


@dataclass(frozen=True)
class Training:
    """The stubs of one training service."""

    datasets: Any
    jobs: Any
    workers: Any
    artifacts: Any

    @classmethod
    def over(cls, channel: grpc.aio.Channel) -> "Training":
        return cls(
            dataset_service_pb2_grpc.DatasetServiceStub(channel),
            training_service_pb2_grpc.TrainingServiceStub(channel),
            worker_service_pb2_grpc.WorkerServiceStub(channel),
            artifact_service_pb2_grpc.ArtifactServiceStub(channel),
        )

    async def dataset(self, content: bytes, offset: int = 0, chunk_bytes: int = 1 << 20, **fields: Any) -> Dataset:
        """Uploads a dataset, from an offset on."""
        return (await self.datasets.CreateDataset(upload(content, offset, chunk_bytes, **fields))).dataset

    async def rows(self, name: str, split: "Split.ValueType", columns: Sequence[str] = ()) -> list[tuple[Any, ...]]:
        """A split's rows."""
        found: list[tuple[Any, ...]] = []
        request = pb.ReadDatasetRequest(name=name, split=split, columns=columns)
        async for message in self.datasets.ReadDataset(request):
            found.extend(zip(*map(values_of, message.columns), strict=True))
        return found

    async def job(self, spec: JobSpec, request_id: str = "") -> Job:
        request = training_service_pb2.CreateJobRequest(spec=spec, request_id=request_id)
        return (await self.jobs.CreateJob(request)).job

    async def look(self, job_id: str) -> Job:
        return (await self.jobs.GetJob(training_service_pb2.GetJobRequest(job_id=job_id))).job

    async def watch(self, job_id: str, after_cursor: int = 0) -> AsyncIterator[JobEvent]:
        request = training_service_pb2.WatchJobRequest(job_id=job_id, after_cursor=after_cursor)
        async for response in self.jobs.WatchJob(request):
            yield response.event

    async def cancel(self, job_id: str) -> Job:
        return (await self.jobs.CancelJob(training_service_pb2.CancelJobRequest(job_id=job_id))).job

    async def ended(self, job_id: str) -> Job:
        """The job, once it has ended."""
        async for _ in self.watch(job_id):
            pass
        return await self.look(job_id)


@asynccontextmanager
async def served(home: Path, **settings: object) -> AsyncIterator[Training]:
    """A training service in this process, over a real connection."""
    async with serving(home, **settings) as address, connected(address) as training:
        yield training


@asynccontextmanager
async def serving(home: Path, **settings: object) -> AsyncIterator[str]:
    """The address of a training service in this process."""
    loaded = TrainingSettings.load({"home": home, "port": 0, "drain_s": 5.0, **settings})
    async with application(loaded) as app, listening(loaded, app) as address:
        yield address


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Training]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Training.over(channel)


class Child:
    """A training service as a process of its own. Files cannot grow beyond `file_limit` bytes, if there is one."""

    def __init__(self, home: Path, file_limit: int = 0, **settings: object) -> None:
        self._ready = home / "ready"
        self._ready.unlink(missing_ok=True)
        flags = {
            "home": str(home),
            "port": 0,
            "ready_file": str(self._ready),
            "log_level": "warning",
            "file_limit": file_limit,
            **settings,
        }
        self.process = subprocess.Popen([sys.executable, "-c", _CHILD, json.dumps(flags)])

    async def address(self) -> str:
        while not self._ready.exists():
            assert self.process.poll() is None, "it ended before it was ready"
            await asyncio.sleep(0.02)
        return self._ready.read_text()

    def workers(self) -> list[int]:
        """The processes that it has started."""
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """Ends it without a chance to do anything more."""
        self.process.kill()
        self.process.wait()


async def upload(
    content: bytes, offset: int = 0, chunk_bytes: int = 1 << 20, **fields: Any
) -> AsyncIterator[pb.CreateDatasetRequest]:
    """The messages of an upload."""
    dataset = Dataset(**{"name": "data", "format": CSV, **fields})
    header = pb.CreateDatasetHeader(dataset=dataset, content=blob_of(content), offset=offset)
    yield pb.CreateDatasetRequest(header=header)
    for start in range(offset, len(content), chunk_bytes):
        yield pb.CreateDatasetRequest(chunk=content[start : start + chunk_bytes])


def values_of(values: pb.ColumnValues) -> list[Any]:
    return list(getattr(values, str(values.WhichOneof("values"))).values)


def blobs_in(home: Path, store: str) -> list[str]:
    """The digests of the blobs that are kept."""
    return sorted(f"sha256:{path.name}" for path in (home / "training" / store / "blobs").rglob("*") if path.is_file())


def audit_rows(home: Path) -> list[tuple[str, str, str]]:
    """Every audit record as (action, subject, request id), oldest first."""
    engine = create_engine(f"sqlite:///{home}/training/training.db")
    columns = (AuditRow.action, AuditRow.subject, AuditRow.request_id)
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(select(*columns).order_by(AuditRow.number))]
    engine.dispose()
    return rows


def flowers(row_count: int = 150) -> bytes:
    """Measures of three kinds of flowers that a small perceptron learns to tell apart: four numbers and a name."""
    draw = random.Random(7)
    kinds = {"iris": (5.0, 3.4, 1.5, 0.2), "lily": (5.9, 2.8, 4.3, 1.3), "rose": (6.6, 3.0, 5.6, 2.1)}
    lines = ["length,width,petal_length,petal_width,kind"]
    for row in range(row_count):
        kind = list(kinds)[row % 3]
        lines.append(",".join([*(f"{draw.gauss(mean, 0.2):.2f}" for mean in kinds[kind]), kind]))
    return ("\n".join(lines) + "\n").encode()


def mlp_spec(**fields: Any) -> JobSpec:
    """A job on `flowers` that learns well and quickly; some of the model's fields replaced."""
    mlp = MlpSpec(
        **{
            "task": MlpTask.MLP_TASK_CLASSIFICATION,
            "label_column": "kind",
            "hidden_units": [8],
            "epochs": 5,
            "batch_size": 16,
            "learning_rate": 0.05,
            **fields,
        }
    )
    return JobSpec(dataset="data", mlp=mlp, registration=Registration(model="flowers", alias="champion"), seed=3)


def states(events: Sequence[JobEvent]) -> list[str]:
    """The states that were entered."""
    return [
        JobState.Name(event.state_change.state).removeprefix("JOB_STATE_")
        for event in events
        if event.HasField("state_change")
    ]
