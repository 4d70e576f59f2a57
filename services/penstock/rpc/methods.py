"""The methods of a server's services, read out of the generated code, for any transport to call."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError

from penstock.rpc.application import Service
from penstock.rpc.errors import InvalidFieldError, LimitExceededError

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
else:  # generic in its type stubs only
    Handler = grpc.RpcMethodHandler

Buffer = bytes | bytearray | memoryview

# Probes come every few seconds and say nothing; they are answered while draining, and nobody waits for them.
PROBES = ("/grpc.health.v1.", "/grpc.reflection.")


class Encoded:
    """A message that its handler has serialized itself, as the buffers that make up its bytes.

    Large tensors are copied as late as a transport can: grpcio joins the parts, envoy sends large ones as they are.
    The buffers must not change after that.
    """

    __slots__ = ("parts", "size")

    def __init__(self, *parts: Buffer) -> None:
        self.parts: Sequence[Buffer] = parts
        self.size = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)

    def joined(self) -> bytes:
        first = self.parts[0] if len(self.parts) == 1 else None
        return first if isinstance(first, bytes) else b"".join(self.parts)


@dataclass(frozen=True, slots=True)
class Method:
    """One method: how its messages are read and written, and the servicer's function."""

    path: str
    function: Callable[..., Any]
    request_streaming: bool
    response_streaming: bool
    decode: Callable[[Any], Any]
    serialize: Callable[[Any], bytes]
    quiet: bool
    probe: bool
    max_message_bytes: int

    def read(self, data: Buffer) -> Any:  # noqa: ANN401  # any message
        """The request. Bytes that are no message are the caller's fault, not the server's."""
        try:
            return self.decode(data)
        except DecodeError as error:
            raise InvalidFieldError.of("request", "its bytes are not the message that this method takes") from error

    def write(self, response: Any) -> bytes | Encoded:  # noqa: ANN401  # any message
        """The answer's bytes. Above the limit a client could not take it, and would not learn what to do."""
        if type(response) is Encoded:
            size = response.size
            data: bytes | Encoded = response
        else:
            data = self.serialize(response)
            size = len(data)
        check_answer(size, self.max_message_bytes)
        return data


def check_answer(size: int, most: int) -> None:
    """Raises `LimitExceededError` for an answer of more bytes than a message may have."""
    if size > most:
        raise LimitExceededError(
            f"The answer has {size:,} bytes; this server sends at most {most:,} in a message. Ask for less at once, or "
            f"raise max_message_mib."
        )


class _Collector:
    """Stands in for a server while the generated `add_…_to_server` functions name their handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers come registered too."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        self.handlers.update({f"/{service}/{name}": handler for name, handler in handlers.items()})


def collect(services: Iterable[Service], max_message_bytes: int) -> dict[str, Method]:
    """Every method of the services by its path, `/package.Service/Method`."""
    methods = {}
    for service in services:
        collector = _Collector()
        service.add(cast("grpc.aio.Server", collector))
        for path, handler in collector.handlers.items():
            methods[path] = _method(path, handler, service, max_message_bytes)
    return methods


def _method(path: str, handler: Handler, service: Service, max_message_bytes: int) -> Method:
    functions = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    name = path.rpartition("/")[2]
    return Method(
        path=path,
        function=next(function for function in functions if function is not None),
        request_streaming=handler.request_streaming,
        response_streaming=handler.response_streaming,
        decode=service.readers.get(name) or handler.request_deserializer or bytes,
        serialize=handler.response_serializer or bytes,
        quiet=name in service.quiet,
        probe=path.startswith(PROBES),
        max_message_bytes=max_message_bytes,
    )
