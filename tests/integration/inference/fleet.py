"""A registry as the inference service sees it, and inference servers on either transport."""

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from tests.integration.inference.graphs import Bundle

from penstock.api.inference.v1 import serving_service_pb2 as serving
from penstock.api.inference.v1.serving_service_pb2_grpc import ServingServiceStub
from penstock.api.registry.v1 import deployment_service_pb2 as deployments
from penstock.api.registry.v1 import deployment_service_pb2_grpc as deployments_rpc
from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.inference.app import application
from penstock.inference.settings import InferenceSettings
from penstock.oip import inference_pb2 as pb
from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import NotReadyError
from penstock.rpc.server import Application, Service, listening
from penstock.storage.artifacts import ArtifactServicer
from penstock.storage.blobs import BlobStore

WAIT_S = 20.0

Targets = dict[Version, int]
Settings = Mapping[str, object]

_DEFAULTS: Settings = {"port": 0, "metrics_port": -1, "reflection": False}


class Registry(deployments_rpc.DeploymentServiceServicer):
    """The services of the registry that an inference server calls: a real blob store, and the desired state as told."""

    def __init__(self, folder: Path) -> None:
        self._settings = ServerSettings.model_construct(
            host="127.0.0.1", port=0, home=folder, drain_s=0, reflection=False, max_message_mib=64
        )
        self.folder = folder
        self._blobs = BlobStore(folder)
        self._desired = deployments.WatchResponse()
        self._changed = asyncio.Condition()
        self._up = False

    async def add(self, model: str, number: int, bundle: Bundle) -> Version:
        """Stores a bundle's files as a version."""
        files = {}
        for name, data in bundle.files.items():
            ref = await self._blobs.write(data)
            files[name] = Blob(digest=ref.digest, size_bytes=ref.size_bytes)
        listing = "".join(f"{name} {blob.digest}" for name, blob in sorted(files.items()))
        digest = f"sha256:{hashlib.sha256(f'{model}{number}{listing}'.encode()).hexdigest()}"
        return Version(model=model, number=number, files=files, signature=bundle.signature, bundle_digest=digest)

    async def deploy(self, **models: list[tuple[Version, int]]) -> None:
        """Replaces the whole desired state."""
        async with self._changed:
            self._desired = deployments.WatchResponse(
                revision=self._desired.revision + 1,
                models=[
                    deployments.DesiredModel(
                        model=targets[0][0].model,
                        versions=[deployments.DesiredVersion(version=one, weight=weight) for one, weight in targets],
                    )
                    for targets in models.values()
                ],
            )
            self._changed.notify_all()

    def blob_path(self, blob: Blob) -> Path:
        (found,) = self.folder.rglob(blob.digest.removeprefix("sha256:"))
        return found

    async def Watch(
        self, request: deployments.WatchRequest, context: object
    ) -> AsyncIterator[deployments.WatchResponse]:
        while True:
            async with self._changed:
                desired = self._desired
            yield desired
            async with self._changed:
                while self._up and self._desired is desired:
                    await self._changed.wait()
            if not self._up:
                raise NotReadyError("The registry is shutting down.")

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[int]:
        """Serves on a port, which it yields, until the block ends."""

        async def drain() -> None:
            async with self._changed:
                self._up = False
                self._changed.notify_all()

        watch = Service(
            deployments.DESCRIPTOR, lambda server: deployments_rpc.add_DeploymentServiceServicer_to_server(self, server)
        )
        app = Application([ArtifactServicer(self._blobs).service(), watch], drain)
        self._up = True
        async with listening(self._settings.model_copy(update={"port": port}), app) as address:
            yield int(address.rpartition(":")[2])


@dataclass(frozen=True)
class Inference:
    """A running inference server and stubs of its services."""

    address: str
    channel: grpc.aio.Channel
    home: Path

    @property
    def oip(self) -> GRPCInferenceServiceStub:
        return GRPCInferenceServiceStub(self.channel)

    async def served(self, model: str = "") -> list[serving.ServedVersion]:
        request = serving.ListServedVersionsRequest(model=model)
        return list((await ServingServiceStub(self.channel).ListServedVersions(request)).versions)

    async def settled(self, revision: int = 1) -> None:
        """Waits until the server has settled on a desired state, and what it no longer wants is gone."""

        async def reached() -> bool:
            listed = await ServingServiceStub(self.channel).ListServedVersions(serving.ListServedVersionsRequest())
            ready = (await self.oip.ServerReady(pb.ServerReadyRequest())).ready
            draining = any(one.state == serving.SERVING_STATE_DRAINING for one in listed.versions)
            return bool(ready and listed.revision >= revision and not draining)

        await eventually(reached)

    async def state_of(self, model: str, number: int) -> "serving.ServingState.ValueType":
        states = [one.state for one in await self.served(model) if one.version == number]
        return states[0] if states else serving.SERVING_STATE_UNSPECIFIED

    async def infer(self, model: str, rows: npt.NDArray[np.generic], version: str = "") -> pb.ModelInferResponse:
        request = infer_request(model, {"rows": rows}, version)
        return await self.oip.ModelInfer(request, timeout=WAIT_S)


@asynccontextmanager
async def inference_server(
    home: Path, registry_port: int, transport: str, **settings: object
) -> AsyncIterator[Inference]:
    """An inference server on a free port that follows the registry on a port."""
    async with _served(home, transport, registry=f"127.0.0.1:{registry_port}", **settings) as inference:
        yield inference


@asynccontextmanager
async def folder_server(folder: Path, home: Path, transport: str, **settings: object) -> AsyncIterator[Inference]:
    """An inference server on a free port that serves a folder of models."""
    async with _served(home, transport, repository=folder, **settings) as inference:
        yield inference


@asynccontextmanager
async def doomed_server(home: Path, registry_port: int, transport: str) -> AsyncIterator[Inference]:
    """An inference server in a process of its own, which is killed when the block ends."""
    async with _started({**_DEFAULTS, "home": home, "registry": f"127.0.0.1:{registry_port}"}, transport) as server:
        process, address = server
        async with grpc.aio.insecure_channel(address) as channel:
            yield Inference(address, channel, home)
        # The supervisor last: its workers would end in order, and slowly, when it is gone.
        for pid in _children(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()


@asynccontextmanager
async def _served(home: Path, transport: str, **settings: object) -> AsyncIterator[Inference]:
    values = {**_DEFAULTS, "home": home, **settings}
    listens = _by_command if transport == "envoy" else _in_this_process
    async with listens(values) as address, grpc.aio.insecure_channel(address) as channel:
        yield Inference(address, channel, home)


@asynccontextmanager
async def _in_this_process(settings: Settings) -> AsyncIterator[str]:
    """Grpcio's server, for it can run beside its test, which then starts at once."""
    configured = InferenceSettings.load(settings)
    async with application(configured) as app, listening(configured, app) as address:
        yield address


@asynccontextmanager
async def _by_command(settings: Settings) -> AsyncIterator[str]:
    """Envoy's server, for it is a process, and has to end in order."""
    async with _started(settings, "envoy") as (process, address):
        yield address
        process.terminate()
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 0, "the server did not end in order"


@asynccontextmanager
async def _started(settings: Settings, transport: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """The command as an operator gives it, and its address; whoever has it ends it."""
    ready_file = Path(f"{settings['home']}.ready")
    ready_file.unlink(missing_ok=True)
    told = {**settings, "transport": transport, "ready_file": ready_file}
    command = ("-m", "penstock.cli", "serve", "inference", *map(_option, told, told.values()))
    process = await asyncio.create_subprocess_exec(sys.executable, *command)

    async def ready() -> bool:
        assert process.returncode is None, "the server ended before it was ready"
        return ready_file.exists()

    try:
        await eventually(ready)
        yield process, ready_file.read_text(encoding="utf-8")
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _option(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


DATATYPE_NAMES = {
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    **{f"{kind}{bits}": f"{kind}{bits}".upper() for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def infer_request(
    model: str, inputs: dict[str, npt.NDArray[np.generic]], version: str = "", outputs: tuple[str, ...] = ()
) -> pb.ModelInferRequest:
    """A request with raw contents."""
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=DATATYPE_NAMES[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    return request


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Waits until a condition of another task or process holds."""
    async with asyncio.timeout(WAIT_S):
        while not await holds():  # noqa: ASYNC110  # the other side announces nothing
            await asyncio.sleep(0.02)


def put_model(
    folder: Path,
    name: str,
    bundle: Bundle,
    *,
    number: int = 1,
    config: str = "",
    labels: dict[str, list[str]] | None = None,
) -> None:
    """Writes a model into a folder in Triton's layout. `labels` are the class names of outputs."""
    version = folder / name / str(number)
    version.mkdir(parents=True, exist_ok=True)
    for file, data in bundle.files.items():
        (version / file).write_bytes(data)
    for output, classes in (labels or {}).items():
        (folder / name / f"{output}.txt").write_text("\n".join(classes))
        config += f'\noutput {{ name: "{output}" label_filename: "{output}.txt" }}'
    if config:
        (folder / name / "config.pbtxt").write_text(config)
