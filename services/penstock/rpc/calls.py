"""The calls of one server, whatever carries them: admission, drain, errors to status, access log."""

import asyncio
import contextlib
import itertools
import os
import re
import time
from collections.abc import Iterator

import grpc
import structlog

from penstock.rpc.errors import DeadlineError, LimitExceededError, NotReadyError, PenstockError, UnimplementedError
from penstock.rpc.logs import current_logging
from penstock.rpc.methods import Method
from penstock.rpc.status import DETAILS_KEY, to_status

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_log = structlog.get_logger("penstock.access")

Trailers = tuple[tuple[str, str | bytes], ...]


def fitting_request_id(sent: object) -> str | None:
    """The caller's own id where it sent a fitting one, so that its log and ours can be joined."""
    return sent if isinstance(sent, str) and _REQUEST_ID.fullmatch(sent) else None


class Calls:
    """Counts the calls in progress and refuses those that come too late or are too many."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self._draining = False
        self._ended = asyncio.Event()
        # Unique on this server, and to other servers by chance; a uuid for each call costs as much as parsing it.
        self._prefix = os.urandom(8).hex()
        self._numbers = itertools.count(int.from_bytes(os.urandom(4)))
        self.in_progress = 0
        self._probes = 0

    def next_id(self) -> str:
        """An id for a call whose caller sent none: 32 hexadecimal digits."""
        return f"{self._prefix}{next(self._numbers):016x}"

    def drain(self) -> None:
        """Refuses every call that comes from now on, with a status that lets its caller go elsewhere."""
        self._draining = True

    async def finished(self, limit_s: float) -> None:
        """Returns when no call is in progress any more, or at the limit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.in_progress:
                    self._ended.clear()
                    await self._ended.wait()

    @contextlib.contextmanager
    def admitted(self, method: Method) -> Iterator[None]:
        """Counts the call while the block runs; raises the error it is refused with."""
        self.enter(method)
        try:
            yield
        finally:
            self.leave(method)

    def enter(self, method: Method) -> None:
        """Admits a call, which has to leave, or raises the error it is refused with.

        Probes are answered whatever else goes on; only those that stay are counted, by themselves.
        """
        if method.probe:
            if method.response_streaming:
                if self._probes >= self._max_concurrent:
                    raise LimitExceededError(f"{self._probes:,} probes stay open, as many as this server takes.")
                self._probes += 1
            return
        if self._draining:
            raise NotReadyError("The server is shutting down. Call another one, or this one again later.")
        if self.in_progress >= self._max_concurrent:
            raise LimitExceededError(
                f"{self.in_progress:,} calls are in progress, as many as this server takes. Call again later."
            )
        self.in_progress += 1

    def leave(self, method: Method) -> None:
        if method.probe:
            self._probes -= method.response_streaming
            return
        self.in_progress -= 1
        if self._draining:
            self._ended.set()


def late() -> DeadlineError:
    return DeadlineError("The call took longer than its deadline, or than this server allows.")


def answer_to(
    error: BaseException, method: Method, request_id: str, code: grpc.StatusCode | None
) -> tuple[grpc.StatusCode, str, Trailers]:
    """Status, text and trailers for an error that a handler raised after it had set `code`.

    What only the operator may read goes to the log.
    """
    if isinstance(error, NotImplementedError) and code is grpc.StatusCode.UNIMPLEMENTED:
        # What generated code does in place of a method that its servicer leaves out.
        error = UnimplementedError(f"This server does not offer {method.path}.")
    status_code, status = to_status(error, request_id)
    if not isinstance(error, PenstockError):
        _log.error("unexpected error", method=method.path, exc_info=error)
    trailers = ((REQUEST_ID_KEY, request_id), (DETAILS_KEY, status.SerializeToString()))
    return status_code, status.message, trailers


def log_call(method: Method, status: str, started: float, peer: str, **fields: str) -> None:
    """The access log's line. Callers leave it out for successes whose level is off, which `logs_successes` tells."""
    if not method.probe:
        write = _log.debug if method.quiet and status == "OK" else _log.info
        duration_ms = round((time.monotonic() - started) * 1000, 2)
        write("call", method=method.path, status=status, duration_ms=duration_ms, peer=peer, **fields)


def logs_successes(method: Method) -> bool:
    """Whether a success of this method leaves a line, with the levels as they are now."""
    enabled = current_logging()
    return not method.probe and (enabled.debug if method.quiet else enabled.info)
