"""What people see while they wait. It goes to standard error, and only where a person watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from penstock.api.training.v1.job_pb2 import JobEvent, JobState, LogSeverity, Phase
from penstock.cli.output import enum_word, interactive, visible

FINAL = {JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED}


@contextmanager
def working(what: str) -> Iterator[None]:
    """A sign of life beside `what` until the block ends."""
    if not interactive():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def transferring(what: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar that grows by the bytes it is told of, until the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not interactive(), transient=True) as bar:
        task = bar.add_task(what, total=size_bytes)
        yield lambda count: bar.advance(task, count)


class JobProgress:
    """A bar for the phase a job is in, and a line for each epoch that has ended."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=32),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._part = "queued"
        self._task = self._progress.add_task(self._part, total=1.0, metrics="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: JobEvent) -> None:
        """Shows one event of the job's history."""
        match event.WhichOneof("event"):
            case "state_change":
                self._show_state(event)
            case "epoch_metrics":
                self._show_epoch(event)
            case "progress":
                phase = enum_word(Phase.DESCRIPTOR, event.progress.phase)
                self._advance(phase, event.progress.fraction)
            case "log_line" if event.log_line.severity != LogSeverity.LOG_SEVERITY_INFO:
                severity = enum_word(LogSeverity.DESCRIPTOR, event.log_line.severity)
                self._console.print(f"{severity}: {visible(event.log_line.text)}", markup=False, highlight=False)

    def _advance(self, part: str, fraction: float) -> None:
        """Moves the bar; each part of the job has a clock of its own."""
        if part != self._part:
            self._part = part
            self._progress.reset(self._task, description=part, metrics="")
        self._progress.update(self._task, completed=fraction)

    def _show_state(self, event: JobEvent) -> None:
        state = enum_word(JobState.DESCRIPTOR, event.state_change.state)
        self._advance(state, 1.0 if event.state_change.state in FINAL else 0.0)
        if event.state_change.message:
            self._console.print(f"{state}: {visible(event.state_change.message)}", markup=False, highlight=False)

    def _show_epoch(self, event: JobEvent) -> None:
        epoch = event.epoch_metrics
        values = "  ".join(f"{name} {value:.4f}" for name, value in sorted(epoch.values.items()))
        self._progress.update(self._task, completed=epoch.epoch / epoch.epoch_count, metrics=values)
        self._console.print(
            f"epoch {epoch.epoch:>3}/{epoch.epoch_count}  {visible(values)}", markup=False, highlight=False
        )
