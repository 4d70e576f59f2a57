"""One declared settings object a service: flags first, then environment, then a TOML file, then defaults.

A subclass sets `section`, the table of the TOML file that PENSTOCK_CONFIG names, and `env_prefix` in its
`model_config`: `PENSTOCK_REGISTRY_` makes PENSTOCK_REGISTRY_PORT the variable of `port`.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from penstock.rpc.errors import StartupError
from penstock.rpc.logs import LogFormat, LogLevel

MIB = 1024 * 1024

# Addresses that one can listen on but not call.
_CALLABLE_HOSTS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # nothing is bound here

# A service whose calls are many and small makes `auto` its default.
Transport = Annotated[
    Literal["auto", "envoy", "grpcio"],
    Field(
        description="What carries the calls. 'envoy' answers several times as many small calls a second; it runs the "
        "service inside an Envoy process and needs the package pyvoy. 'grpcio' runs on any platform and takes less "
        "memory. 'auto' is envoy where it can run, else grpcio."
    ),
]


def default_home() -> Path:
    """`PENSTOCK_HOME`, or `penstock` under the user's data folder (XDG base directory specification)."""
    if configured := os.environ.get("PENSTOCK_HOME"):
        return Path(configured)
    data = Path(os.environ.get("XDG_DATA_HOME", ""))
    # The specification has relative paths ignored.
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "penstock"


class ServerSettings(BaseSettings):
    """What every server can be told. A subclass adds what is its own and names its section."""

    section: ClassVar[str]
    # Whether several processes can each keep a home of their own: not where the home is what the service is for.
    allows_workers: ClassVar[bool] = False
    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    host: Annotated[
        str,
        Field(
            description="Address to listen on. Beyond loopback, anyone who can reach it may call every RPC: "
            "put a proxy that authenticates in front."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 0
    home: Annotated[
        Path,
        Field(
            default_factory=default_home,
            description="Folder that keeps everything; PENSTOCK_HOME sets it for all services.",
        ),
    ]
    transport: Transport = "grpcio"
    workers: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="Processes behind the port; the kernel gives each connection to one of them. More use more "
            "cores, and each takes its own memory and loads its own models. A client has to open several connections "
            "to reach them all, and to send all steps of one sequence over one: sequences, like the response cache, "
            "are a worker's own.",
        ),
    ] = 1
    tls_cert: Annotated[
        Path | None,
        Field(description="PEM file of the certificate and its chain. With tls_key, only TLS is spoken on the port."),
    ] = None
    tls_key: Annotated[Path | None, Field(description="PEM file of the certificate's private key, unencrypted.")] = None
    tls_client_ca: Annotated[
        Path | None,
        Field(
            description="PEM file of authorities. Only clients with a certificate of theirs are let in; without it, "
            "TLS hides the calls but lets anyone make them."
        ),
    ] = None
    response_compression: Annotated[
        Literal["none", "gzip"],
        Field(
            description="'gzip' compresses answers to clients that take it: less network for more CPU, which seldom "
            "pays for tensors. Compressed requests are always taken."
        ),
    ] = "none"
    max_message_mib: Annotated[
        int,
        Field(
            ge=1, le=1024, description="Largest message taken or sent, MiB. A larger one fails with RESOURCE_EXHAUSTED."
        ),
    ] = 64
    max_concurrent_calls: Annotated[
        int, Field(ge=1, description="Calls in progress at once; one more is refused with RESOURCE_EXHAUSTED.")
    ] = 10_000
    unary_timeout_s: Annotated[
        float,
        Field(gt=0, description="Longest a unary call may take, seconds, also for a caller that set no deadline."),
    ] = 120.0
    drain_s: Annotated[
        float,
        Field(
            ge=0,
            description="How long a stopping server waits for the calls in progress, seconds; then it cuts them off.",
        ),
    ] = 20.0
    reflection: Annotated[bool, Field(description="Tell tools like grpcurl the services and messages.")] = True
    log_format: Annotated[LogFormat, Field(description="'json' for machines, 'console' for people.")] = "console"
    log_level: Annotated[
        LogLevel, Field(description="'info' logs every call; 'warning' only what needs attention.")
    ] = "info"
    ready_file: Annotated[
        Path | None, Field(description="File to write host:port into once the server takes calls; removed on exit.")
    ] = None
    stop_on_eof: Annotated[
        bool, Field(description="Stop when standard input ends: for a supervisor that holds the other end.")
    ] = False

    _worker: int | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fitting_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; only one is set")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key: only a TLS server can ask for certificates")
        if self.workers > 1 and not self.allows_workers:
            raise ValueError("workers must be 1: this service keeps its state in its home, for one process alone")
        return self

    @property
    def service_home(self) -> Path:
        """This process's own folder under the home."""
        home = self.home / self.section
        return home if self._worker is None else home / f"worker-{self._worker}"

    def of_worker(self, number: int, folder: Path) -> Self:
        """The settings of one of several workers, which has a home of its own. In `folder` they reach each other."""
        copy = self.model_copy()
        copy._worker, copy._folder = number, folder  # noqa: SLF001  # our own
        return copy

    @property
    def worker(self) -> int | None:
        """Which of several workers this process is; None for the only one."""
        return self._worker

    def worker_address(self, number: int) -> str:
        """Where one of several workers takes the calls of the others: a socket that only their owner reaches."""
        return f"unix:{self._folder}/worker-{number}.sock"

    @property
    def bracketed_host(self) -> str:
        """The host as it stands before a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def callable_host(self) -> str:
        """A host under which this machine itself reaches the server."""
        return _CALLABLE_HOSTS.get(self.bracketed_host, self.bracketed_host)

    def cannot_listen(self) -> StartupError:
        return StartupError(
            f"Cannot listen on {self.bracketed_host}:{self.port}: the address is not this machine's, or something "
            f"listens there already. Stop that, or choose another port with --port (0 takes a free one)."
        )

    @property
    def max_message_bytes(self) -> int:
        return self.max_message_mib * MIB

    @classmethod
    def load(cls, flags: Mapping[str, object]) -> Self:
        """Settings from all sources, the flags first.

        Raises `StartupError` that names the setting, where a value is wrong or a key is unknown.
        """
        values = dict(flags)
        if (home := os.environ.get("PENSTOCK_HOME")) and f"{cls.model_config['env_prefix']}HOME" not in os.environ:
            values.setdefault("home", home)
        try:
            loaded = cls(**values)  # type: ignore[arg-type]  # pydantic checks and converts them
        except ValidationError as error:
            problems = "; ".join(_problem(item) for item in error.errors(include_url=False))
            raise StartupError(f"Wrong configuration of {cls.section}: {problems}.") from error
        except SettingsError as error:
            raise StartupError(f"Wrong configuration of {cls.section}: {error}.") from error
        for name in ("tls_cert", "tls_key", "tls_client_ca"):
            _check_readable(name, getattr(loaded, name))
        return loaded

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The documented order; pydantic-settings' own TOML source cannot do with a table that is absent."""
        return (init_settings, env_settings, InitSettingsSource(settings_cls, _toml_table(cls.section)))


def _check_readable(name: str, path: Path | None) -> None:
    try:
        if path is not None:
            path.read_bytes()
    except OSError as error:
        raise StartupError(f"Cannot read {name}, {path}: {error.strerror}.") from error


def _problem(item: ErrorDetails) -> str:
    if not item["loc"]:
        return item["msg"].removeprefix("Value error, ")
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"there is no setting {name!r}"
    return f"{name}: {item['msg']}; got {item['input']!r}"


def _toml_table(section: str) -> dict[str, Any]:
    """The service's table of the file that PENSTOCK_CONFIG names."""
    path = os.environ.get("PENSTOCK_CONFIG")
    if not path:
        return {}
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8")).get(section, {})
    except OSError as error:
        raise StartupError(f"Cannot read the configuration file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise StartupError(f"The configuration file {path} is not TOML: {error}.") from error
    if not isinstance(table, dict):
        raise StartupError(f"In {path}, [{section}] must be a table; got {type(table).__name__}.")
    return table
