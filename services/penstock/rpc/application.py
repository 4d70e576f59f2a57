"""What a server serves, whatever carries its calls."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor


@dataclass(frozen=True)
class Service:
    """A servicer as the server needs it: the file that declares it, and what adds it to a server.

    Successes of the methods named in `quiet` are logged at debug: at twenty thousand calls a second a line for each
    would be the bottleneck. `readers` replace the parsers of requests, for a method that reads its bytes itself; they
    raise `DecodeError` or a `PenstockError` for bytes that are no request.
    """

    file: FileDescriptor
    add: Callable[[grpc.aio.Server], None]
    quiet: frozenset[str] = frozenset()
    readers: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(service.full_name for service in self.file.services_by_name.values())


@dataclass(frozen=True)
class Application:
    """What a server serves.

    `drain` ends its long-lived streams before it stops: they would outlast any limit. `started` is told where this
    machine can call the server, once it can.
    """

    services: Sequence[Service]
    drain: Callable[[], Awaitable[None]]
    started: Callable[[str], None] = lambda _: None
