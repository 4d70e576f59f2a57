"""What the inference service can be told."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from penstock.rpc.config import MIB, ServerSettings, Transport


class InferenceSettings(ServerSettings):
    """Flags, `PENSTOCK_INFERENCE_…` variables, or the `[inference]` table of the TOML file."""

    section: ClassVar[str] = "inference"
    allows_workers: ClassVar[bool] = True
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_INFERENCE_", extra="forbid", frozen=True)

    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8001
    transport: Transport = "auto"
    registry: Annotated[
        str,
        Field(
            min_length=1,
            description="host:port of the registry whose deployments are served. While it cannot be reached, what was "
            "deployed last goes on being served, also after a restart.",
        ),
    ] = "127.0.0.1:8011"
    repository: Annotated[
        Path | None,
        Field(
            description="Folder of models in Triton's layout, which is then served in place of the registry's "
            "deployments. Python models in it are run: it must be the operator's own."
        ),
    ] = None
    mode: Annotated[
        Literal["none", "poll", "explicit"],
        Field(
            description="Of a repository: 'none' serves all its models as they are at the start; 'poll' follows its "
            "changes; 'explicit' serves what clients load, and lets them upload ONNX models."
        ),
    ] = "none"
    poll_interval_s: Annotated[
        float, Field(gt=0, description="Seconds between two looks at the repository in mode 'poll'.")
    ] = 15.0
    load_model: Annotated[
        str,
        Field(description="Models that mode 'explicit' loads at the start, separated by commas; '*' for all."),
    ] = ""
    allow_client_shm: Annotated[
        bool,
        Field(
            description="Let clients on this machine pass tensors in shared memory. They then name objects under "
            "/dev/shm for this server to read and write."
        ),
    ] = False
    server_name: Annotated[
        str,
        Field(
            min_length=1,
            description="The name that ServerMetadata tells. Some clients want 'triton' here before they go on.",
        ),
    ] = "penstock"
    max_batch_size: Annotated[
        int,
        Field(
            ge=1,
            description="Most rows in one run of a model, and in one request. More rows a run mean more requests a "
            "second under load, and more memory and a longer wait for whoever comes next.",
        ),
    ] = 128
    max_queue_size: Annotated[
        int,
        Field(
            ge=1,
            description="Most requests that wait for one version. One more is refused (queue_full), so that "
            "callers back off instead of waiting for answers that come too late. Waiting requests hold their tensors "
            "in memory.",
        ),
    ] = 1000
    queue_full: Annotated[
        Literal["unavailable", "resource_exhausted"],
        Field(
            description="The status of a request that finds the queue full. Clients repeat UNAVAILABLE by themselves, "
            "which suits several servers behind one name; RESOURCE_EXHAUSTED they hand to their caller."
        ),
    ] = "unavailable"
    intra_op_threads: Annotated[
        int,
        Field(
            ge=0,
            description="Threads that one run of one version may use; 0 shares the CPUs of this process, or its "
            "cgroup's quota, out among a model's instances. Fewer suit many small models served side by side, more "
            "shorten single runs of a large one.",
        ),
    ] = 0
    inline_threshold_us: Annotated[
        int,
        Field(
            ge=0,
            description="Runs that take less, microseconds, are made on the event loop, which saves them the way to "
            "a thread and holds everything else up for as long. The warm-up measures how many rows that are. 0: none.",
        ),
    ] = 1000
    execution_providers: Annotated[
        str,
        Field(
            description="What runs models, in order of preference; the first that ONNX Runtime has here is taken. "
            "ModelConfig tells which one it was."
        ),
    ] = "tensorrt,cuda,openvino,cpu"
    cache_mib: Annotated[
        int,
        Field(
            ge=0,
            description="Memory for answers that are given again to equal requests, MiB, for models whose "
            "configuration enables response_cache; 0: none. Each of several workers has its own.",
        ),
    ] = 0
    metrics_port: Annotated[
        int,
        Field(
            ge=-1,
            le=65535,
            description="Port of Prometheus' /metrics on the same host, for all workers together; 0 takes a free one, "
            "-1 serves none.",
        ),
    ] = 8002
    trace_file: Annotated[
        str,
        Field(
            description="File that traces in Triton's form are written to, where clients switch them on. Of several "
            "workers each writes its own, with .worker-N behind the name."
        ),
    ] = ""
    otlp_endpoint: Annotated[
        str,
        Field(description="http://host:port of an OpenTelemetry collector (gRPC); needs the extra 'tracing'."),
    ] = ""
    warm_up: Annotated[
        bool,
        Field(
            description="Run a version on generated rows before it serves: its first caller waits no longer than "
            "others, and a version that cannot run never replaces one that can. Switch it off for models that refuse "
            "made-up rows.",
        ),
    ] = True

    @property
    def cache_bytes(self) -> int:
        return self.cache_mib * MIB
