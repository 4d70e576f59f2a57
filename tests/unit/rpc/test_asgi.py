"""The ASGI adapter against a server that does anything: whatever comes, one well-formed answer, and no exception."""

import asyncio
import base64
import gzip
import random
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from penstock.rpc import frames
from penstock.rpc.asgi import GrpcApplication
from penstock.rpc.asgi_call import AsgiCall, Event
from penstock.rpc.calls import Calls
from penstock.rpc.errors import InvalidFieldError, LimitExceededError, UnimplementedError, WrongStateError
from penstock.rpc.methods import Encoded, Method

MAX_BYTES = 10_000


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Tracebacks written out would take most of the time."""
    with capture_logs():
        yield


FUZZ_S = 4.0


async def unary(request: bytes, context: Any) -> Any:
    if request[:1] in _FAULTS:
        raise _FAULTS[request[:1]]
    match request[:1]:
        case b"a":
            await context.abort(grpc.StatusCode.ABORTED, "ü")
        case b"m":
            context.set_trailing_metadata((("BAD KEY", "ü"),))
        case b"i":
            await context.send_initial_metadata((("key", "\n"),))
        case b"w":
            await asyncio.sleep(0.001)
        case b"e":
            return Encoded(request, bytearray(request), memoryview(request))
        case b"x":
            return "no bytes at all"
        case b"l":
            return bytes(MAX_BYTES + 1)
    context.invocation_metadata()
    context.peer()
    return request


_FAULTS: dict[bytes, BaseException] = {
    b"c": asyncio.CancelledError(),
    b"g": GeneratorExit(),
    b"k": KeyboardInterrupt(),
    b"r": RuntimeError("secret"),
    b"s": SystemExit(1),
    b"t": TimeoutError(),
    b"z": WrongStateError("no\nway ü"),
}


async def down(request: bytes, context: Any) -> AsyncIterator[Any]:
    for part in request[:5]:
        yield await unary(bytes((part,)), context)


async def up(requests: AsyncIterator[bytes], context: Any) -> Any:
    return b"".join([bytes(request) async for request in requests])[:5]


async def both(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        yield await unary(bytes(request), context)


def not_async(request: bytes, context: Any) -> Any:
    context.set_code(grpc.StatusCode.UNIMPLEMENTED)
    raise NotImplementedError("Method not implemented!")


SHAPES = {"unary": (unary, 0, 0), "quick": (unary, 0, 0), "down": (down, 0, 1), "up": (up, 1, 0), "both": (both, 1, 1)}
SHAPES |= {"missing": (not_async, 0, 0), "missing_down": (not_async, 0, 1)}
METHODS = {
    f"/s/{name}": Method(
        f"/s/{name}", function, bool(up_), bool(down_), bytes, bytes, name == "quick", False, MAX_BYTES
    )
    for name, (function, up_, down_) in SHAPES.items()
}


def application(max_concurrent: int = 1000, *, compress: bool = False) -> GrpcApplication:
    return GrpcApplication(METHODS, Calls(max_concurrent), 0.5, compress=compress)


class Exchange:
    """One request, and what became of it."""

    def __init__(self, path: str, chunks: list[bytes], headers: list[tuple[bytes, bytes]], **scope: Any) -> None:
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": None, **scope}
        self.chunks = chunks
        self.sent: list[dict[str, Any]] = []
        self.left = False
        self.cut_off = False
        self.breaks_after = 1 << 30

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.chunks:
            body = self.chunks.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self.chunks) or self.cut_off}
        if self.cut_off:
            self.left = True
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, event: dict[str, Any]) -> None:
        """Takes the event at once, as pyvoy does; what is waited for is the client's reading."""
        if len(self.sent) >= self.breaks_after:
            self.left = True
            raise OSError("the client has gone")
        self.sent.append(event)
        await asyncio.sleep(0)

    async def run(self, app: GrpcApplication) -> "Exchange":
        await app(self.scope, self.receive, self.send)
        return self

    def status(self) -> int | None:
        """The grpc-status, once the whole answer has proved well-formed; None for an answer that is not gRPC."""
        start, *rest = self.sent
        assert start["type"] == "http.response.start"
        assert [event["type"] for event in self.sent].count("http.response.start") == 1
        bodies = [event for event in rest if event["type"] == "http.response.body"]
        assert [event["more_body"] for event in bodies] == [True] * (len(bodies) - 1) + [False]
        assert all(type(event["body"]) is bytes for event in bodies)
        trailers = rest[len(bodies) :]
        assert [event["type"] for event in trailers] == ["http.response.trailers"] * bool(start.get("trailers"))
        headers = [*start["headers"], *(header for event in trailers for header in event["headers"])]
        for name, value in headers:
            assert type(name) is type(value) is bytes
            assert name == name.lower()
            assert b"\n" not in value
        if start["status"] != 200:
            return None
        data = b"".join(event["body"] for event in bodies)
        while data:
            size = int.from_bytes(data[1:5], "big")
            assert data[0] in {0, 1}
            assert len(data) >= 5 + size
            data = data[5 + size :]
        (status,) = [value for name, value in headers if name == b"grpc-status"]
        return int(status)


GRPC = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]


def framed(data: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize("path", METHODS)
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (framed(b"OK"), [], 0),
        (framed(b""), [], 0),
        (framed(gzip.compress(b"OK"), 1), [(b"grpc-encoding", b"gzip")], 0),
        (framed(zlib.compress(b"OK"), 1), [(b"grpc-encoding", b"deflate")], 0),
        (framed(b"OK"), [(b"grpc-encoding", b"gzip")], 0),
        (framed(gzip.compress(bytes(MAX_BYTES + 1)), 1), [(b"grpc-encoding", b"gzip")], 8),
        (framed(gzip.compress(bytes(1 << 24)), 1), [(b"grpc-encoding", b"gzip")], 8),
        (framed(gzip.compress(b"OK")[:-4], 1), [(b"grpc-encoding", b"gzip")], 3),
        (framed(b"no gzip", 1), [(b"grpc-encoding", b"gzip")], 3),
        (framed(b"OK", 1), [], 3),
        (framed(b"OK", 2), [], 3),
        (framed(b"OK"), [(b"grpc-encoding", b"snappy")], 12),
        (framed(b"OK"), [(b"grpc-timeout", b"soon")], 3),
        (framed(b"OK"), [(b"grpc-timeout", b"0n")], None),
        (framed(b"OK")[:-1], [], 3),
        (b"\0", [], 3),
        (b"\0" + (MAX_BYTES + 1).to_bytes(4, "big"), [], 8),
    ],
)
async def test_requests(path: str, body: bytes, headers: list[tuple[bytes, bytes]], status: int | None) -> None:
    if "missing" in path:
        status = 12 if status in {0, 12} else status
    for size in (len(body) or 1, 1):
        chunks = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        exchange = await Exchange(path, chunks, [*GRPC, *headers]).run(application())
        assert status in {None, exchange.status()}


@pytest.mark.parametrize(
    ("scope", "headers", "status"),
    [
        ({"method": "GET"}, GRPC, 405),
        ({}, [], 415),
        ({}, [(b"content-type", b"application/grpc-web")], 415),
        ({}, [(b"content-type", b"application/grpc+proto")], 200),
        ({"path": "/nothing"}, GRPC, 200),
    ],
)
async def test_who_does_not_speak_grpc(scope: dict[str, str], headers: list[tuple[bytes, bytes]], status: int) -> None:
    exchange = Exchange("/s/unary", [framed(b"OK")], headers)
    exchange.scope |= scope
    await exchange.run(application())
    assert exchange.sent[0]["status"] == status
    assert exchange.status() == (None if status != 200 else 12 if "path" in scope else 0)


async def test_large_parts_are_not_joined() -> None:
    large = bytes(100_000)

    async def function(request: bytes, context: object) -> Encoded:
        return Encoded(b"head", large, b"tail")

    method = Method("/s/large", function, False, False, bytes, bytes, True, False, 1 << 20)
    exchange = await Exchange("/s/large", [framed(b"")], GRPC).run(GrpcApplication({"/s/large": method}, Calls(1), 1.0))
    assert exchange.status() == 0
    assert any(event.get("body") is large for event in exchange.sent)


def random_exchange(rng: random.Random) -> Exchange:
    body = b"".join(
        rng.choice([framed(rng.choice(b"abcegiklmrstwxz").to_bytes() * rng.randrange(4), rng.randrange(2)), b"\0", b""])
        for _ in range(rng.randrange(4))
    )
    if rng.random() < 0.3:
        body = rng.choice(
            [rng.randbytes(rng.randrange(20)), body[: rng.randrange(len(body) + 1)], framed(bytes(20_000))]
        )
    size = rng.choice([1, 3, 7, 1000])
    pool = [
        *((b"grpc-timeout", value) for value in (b"1m", b"0u", b"99999999H", b"-1S", b"", rng.randbytes(3))),
        *((b"grpc-encoding", value) for value in (b"gzip", b"identity", b"deflate", b"\xff", b"")),
        *((b"x-request-id", value) for value in (b"mine", b"\xff", b"a b", b"x" * 99)),
        *((b"some-bin", value) for value in (b"!", b"AA", base64.b64encode(rng.randbytes(5)))),
        (b"grpc-accept-encoding", b"gzip"),
        (b"content-type", rng.choice([b"text/plain", b"application/grpc+x", b"\xff"])),
    ]
    headers = [*GRPC, *rng.sample(pool, rng.randrange(4))]
    path = rng.choice([*METHODS, "/", "", "/s/none\n\udc80"])
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    exchange = Exchange(path, chunks, headers, method=rng.choice(["POST"] * 9 + ["GET"]))
    exchange.cut_off = rng.random() < 0.2
    if rng.random() < 0.2:
        exchange.breaks_after = rng.randrange(4)
    return exchange


async def test_random_requests_get_one_well_formed_answer() -> None:
    rng = random.Random(7)
    apps = [application(), application(compress=True), application(max_concurrent=1)]
    count, until = 0, time.monotonic() + FUZZ_S
    while time.monotonic() < until:
        app = rng.choice(apps)
        async with app.watching():
            exchanges = [random_exchange(rng) for _ in range(20)]
            async with asyncio.timeout(20):
                await asyncio.gather(*(exchange.run(app) for exchange in exchanges))
        for exchange in exchanges:
            count += 1
            if not exchange.left:
                exchange.status()
    assert count > 100
    assert [app._calls.in_progress for app in apps] == [0, 0, 0]
    assert not any(app._young for app in apps)


async def test_calls_that_last_are_looked_after() -> None:
    async def wait(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    methods = {"/s/wait": Method("/s/wait", wait, False, False, bytes, bytes, True, False, 100)}
    app = GrpcApplication(methods, Calls(10), 0.3)
    async with app.watching(), asyncio.timeout(5):
        late = await Exchange("/s/wait", [framed(b"")], GRPC).run(app)
        assert late.status() == 4
        left = Exchange("/s/wait", [framed(b"")], GRPC)
        running = asyncio.ensure_future(left.run(app))
        await asyncio.sleep(0.1)
        left.cut_off = True
        await running
        assert left.sent == []
        cut = Exchange("/s/wait", [framed(b"")], GRPC)
        running = asyncio.ensure_future(cut.run(app))
        await asyncio.sleep(0.1)
        app.cut_off()
        assert (await running).status() == 14


async def test_what_came_while_nobody_read_does_not_wait_for_more() -> None:
    asked: list[asyncio.Future[Event]] = []

    def receive() -> asyncio.Future[Event]:
        asked.append(asyncio.get_running_loop().create_future())
        return asked[-1]

    call = AsgiCall(METHODS["/s/both"], {"headers": []}, receive, Exchange("/s/both", [], []).send)
    requests = call.requests()
    for number, value in enumerate((b"a", b"b")):
        await call.look()
        asked[number].set_result({"type": "http.request", "body": framed(value), "more_body": True})
        await asyncio.sleep(0)
    # The client is looked for again before the handler reads: its answer may be long in coming.
    await call.look()
    async with asyncio.timeout(1):
        assert [bytes(await anext(requests)) for _ in range(2)] == [b"a", b"b"]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("value", "seconds"), [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6), (b"99999999n", 0.1)]
)
def test_timeouts(value: bytes, seconds: float) -> None:
    assert frames.timeout_s(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"1", b"S", b"1s", b"-1S", b"1.5S", b"123456789S", b"1S ", "١S".encode()])
def test_timeouts_that_are_none(value: bytes) -> None:
    with pytest.raises(InvalidFieldError):
        frames.timeout_s(value)


@pytest.mark.parametrize(
    ("text", "encoded"), [("plain: ~ok!", b"plain: ~ok!"), ("100%", b"100%25"), ("ü\n", b"%C3%BC%0A"), ("\udc80", b"?")]
)
def test_messages_are_percent_encoded(text: str, encoded: bytes) -> None:
    assert frames.percent_encoded(text) == encoded


def test_bounds_and_encodings() -> None:
    with pytest.raises(LimitExceededError):
        frames.message_size(b"\0\0\0\0\x0b", 10)
    assert frames.message_size(b"\0\0\0\0\x0a", 10) == 10
    with pytest.raises(UnimplementedError):
        frames.check_encoding(b"br")
    with pytest.raises(ValueError, match="printable"):
        frames.metadata_headers([("key", "ü")])
    with pytest.raises(ValueError, match="metadata key"):
        frames.metadata_headers([("Key", "u")])
    assert frames.metadata_headers([("key-bin", b"\xff")]) == [(b"key-bin", b"/w")]
    assert frames.metadata([(b"key-bin", b"/w,/w=="), (b"te", b"trailers"), (b"grpc-x", b"1"), (b"k", b"v")]) == (
        ("key-bin", b"\xff"),
        ("key-bin", b"\xff"),
        ("k", "v"),
    )
