"""One instance of a model at work: an engine, the thread that runs it, and how much of it the event loop may run."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns

import structlog

from penstock.inference.engine import Engine, Stop
from penstock.inference.gather import Gatherer
from penstock.inference.inference import Inference, Run
from penstock.inference.padding import Padding
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.rpc.errors import PenstockError

Outcome = list[Array] | Exception


@dataclass(frozen=True, slots=True)
class Executed:
    """One run, and what each of its requests got."""

    run: Run
    outcomes: Sequence[Outcome]


_log = structlog.get_logger("penstock.inference.instance")


class Instance:
    """Runs one batch at a time. `loop_rows` rows at most run on the event loop itself; 0: none do."""

    def __init__(self, engine: Engine, signature: Signature, padding: Padding | None, loop_rows: int) -> None:
        self.loop_rows = loop_rows
        self._engine = engine
        self._gatherer = Gatherer(signature, padding)
        self._thread: ThreadPoolExecutor | None = None

    def run(self, title: str, batch: Sequence[Inference], stop: Stop | None = None) -> list[Executed]:
        """One run; or, after one that failed, a run for each request: only the request at fault fails."""
        run = Run(sum([one.rows for one in batch]))
        try:
            return [Executed(run, self._together(batch, run, stop))]
        except Exception as error:  # whatever it is, it belongs to the caller and not to this thread
            if len(batch) == 1:
                return [Executed(run, [public_error(title, error)])]
            _log.warning("batch failed, running its requests one by one", version=title, error=str(error))
        return [executed for one in batch for executed in self.run(title, [one], stop)]

    def run_on_thread(self, title: str, batch: Sequence[Inference]) -> "tuple[asyncio.Future[list[Executed]], Stop]":
        """As `run`, on the instance's own thread; the second thing ends the run."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-engine")
        stop = self._engine.stopper()
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self.run, title, batch, stop), stop

    async def close(self) -> None:
        """Gives the model's memory back. Nothing may be running."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)
        self._engine.close()

    def _together(self, batch: Sequence[Inference], run: Run, stop: Stop | None) -> Sequence[list[Array]]:
        run.start_ns = perf_counter_ns()
        inputs, names = self._gatherer.inputs(batch), self._gatherer.wanted(batch)
        run.gathered_ns = perf_counter_ns()
        arrays = self._engine.run(inputs, names, stop)
        run.ran_ns = perf_counter_ns()
        return self._gatherer.answers(batch, names, arrays)


def public_error(title: str, error: Exception) -> PenstockError:
    """What a failed run's caller may know of it; the log has all of what nobody expected.

    A future takes any error but StopIteration: its caller would wait for ever.
    """
    if isinstance(error, PenstockError):
        return error
    _log.error("a run failed unexpectedly", version=title, exc_info=error)
    return PenstockError(f"{title}: unexpected {type(error).__name__} while running; the server's log has the details.")
