"""What the inference service can be told."""

import os
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from penstock.rpc.config import ServerSettings


class InferenceSettings(ServerSettings):
    """Flags, `PENSTOCK_INFERENCE_…` variables, or the `[inference]` table of the TOML file."""

    section: ClassVar[str] = "inference"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_INFERENCE_", extra="forbid", frozen=True)

    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8001
    registry: Annotated[
        str,
        Field(
            min_length=1,
            description="host:port of the registry whose deployments are served. While it cannot be reached, what was "
            "deployed last goes on being served, also after a restart.",
        ),
    ] = "127.0.0.1:8011"
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
            description="Most requests that wait for one version. One more is refused with UNAVAILABLE, so that "
            "callers back off instead of waiting for answers that come too late. Waiting requests hold their tensors "
            "in memory.",
        ),
    ] = 1000
    intra_op_threads: Annotated[
        int,
        Field(
            ge=0,
            description="Threads that one run of one version may use; 0 means one for each CPU of this process. Fewer "
            "suit many small models served side by side, more shorten single runs of a large one.",
        ),
    ] = 0
    warm_up: Annotated[
        bool,
        Field(
            description="Run a version on generated rows before it serves: its first caller waits no longer than "
            "others, and a version that cannot run never replaces one that can. Switch it off for models that refuse "
            "made-up rows.",
        ),
    ] = True

    @property
    def threads_per_run(self) -> int:
        """`intra_op_threads`, its 0 resolved."""
        return self.intra_op_threads or len(os.sched_getaffinity(0))
