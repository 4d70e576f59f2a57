"""What the training service can be told."""

from typing import Annotated, ClassVar

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from penstock.rpc.config import ServerSettings


class TrainingSettings(ServerSettings):
    """Flags, PENSTOCK_TRAINING_… variables or the table [training] of the configuration file."""

    section: ClassVar[str] = "training"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_TRAINING_", extra="forbid", frozen=True)

    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8021
    database_url: Annotated[
        SecretStr | None,
        Field(
            description="SQLAlchemy URL of another database: 'postgresql+asyncpg://…', its driver installed. For one "
            "training service alone. Left out: training.db in the home."
        ),
    ] = None
    blob_url: Annotated[
        str | None,
        Field(
            description="Object store for datasets and checkpoints: 's3://bucket/prefix', 'gs://…', 'az://…'; "
            "credentials come from the environment. Uploads are still staged in the home. Left out: folders of it."
        ),
    ] = None
    registry: Annotated[
        str,
        Field(description="host:port of the registry. While it cannot be reached, finished jobs wait as REGISTERING."),
    ] = "127.0.0.1:8011"
    max_parallel_jobs: Annotated[
        int,
        Field(ge=1, le=64, description="Workers at once. Each wants a core and the memory of its dataset and model."),
    ] = 1
    lease_s: Annotated[
        float,
        Field(
            gt=0,
            description="How long a silent worker keeps its job, seconds. Shorter finds a dead machine sooner; too "
            "short takes the job from a worker that is only slow.",
        ),
    ] = 30.0
    cancel_grace_s: Annotated[
        float,
        Field(ge=0, description="How long a worker has to stop by itself once its job is cancelled, seconds."),
    ] = 2.0
    checkpoint_interval_s: Annotated[
        float,
        Field(
            ge=0,
            description="Least time between two checkpoints of a job, seconds; 0 makes one after every epoch. What was "
            "learned since the last one is lost with the worker.",
        ),
    ] = 5.0
