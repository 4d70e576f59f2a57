"""What the registry can be told."""

from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from penstock.rpc.config import ServerSettings


class RegistrySettings(ServerSettings):
    """The registry's settings."""

    section = "registry"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_REGISTRY_", extra="forbid", frozen=True)

    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8011
    database_url: Annotated[
        SecretStr | None,
        Field(
            description="SQLAlchemy URL of another database: 'postgresql+asyncpg://…', its driver installed. "
            "Several registries may share it if they share blob_url too. Left out: registry.db in the home."
        ),
    ] = None
    blob_url: Annotated[
        str | None,
        Field(
            description="Object store for the files of versions: 's3://bucket/prefix', 'gs://…', 'az://…'; credentials "
            "come from the environment. Uploads are still staged in the home. Left out: a folder in the home."
        ),
    ] = None
