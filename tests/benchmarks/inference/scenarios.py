"""What is measured: each section starts its servers, takes its windows in turn, and adds its rows."""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.harness import BenchError, Taken, compare, in_turn, step
from tests.benchmarks.inference import servers
from tests.benchmarks.inference.bare import Bare, bare
from tests.benchmarks.inference.load import Target, Window
from tests.benchmarks.inference.loads import load_once, loads, side_by_side
from tests.benchmarks.inference.models import ECHO_WIDTH, model
from tests.benchmarks.inference.wire import Request, answer_size, request
from tests.benchmarks.report import Aim, Curve, Results, Row

ENVOY, GRPCIO = "envoy", "grpcio"
UNBATCHED, MLSERVER, BARE = "grpcio without batching", "MLServer", "bare ONNX Runtime"
CONCURRENCY = 128  # 8 connections × 16 streams
RATE, LATENCY = "requests/s", "median ms"
MIB = 1 << 20

Measure = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """How long a run takes: rounds of windows, and the seconds of a window for small and for large models."""

    rounds: int = 3
    small_s: float = 2.0
    large_s: float = 6.0


def target(server: servers.Server, asked: Request) -> Target:
    """A server that has answered right."""
    try:
        return Target(server.name, server.address, asked, answer_size(server.address, asked))
    except BenchError as error:
        raise BenchError(f"{server.name}: {error}") from error


def small_servers(stack: ExitStack, name: str, kinds: Sequence[str]) -> dict[str, Target]:
    """Servers of one small model, all at once: those that are not asked sleep."""
    served = model(name)
    asked = request(served)
    starts = {
        ENVOY: lambda: servers.penstock(ENVOY, served, "--transport", "envoy"),
        GRPCIO: lambda: servers.penstock(GRPCIO, served, "--transport", "grpcio"),
        UNBATCHED: lambda: servers.penstock(UNBATCHED, served, "--transport", "grpcio", "--max-batch-size", "1"),
        MLSERVER: lambda: servers.mlserver_with(served),
    }
    return {kind: target(stack.enter_context(starts[kind]()), asked) for kind in kinds}


def rates(targets: Mapping[str, Target], concurrency: int, seconds: float, rounds: int, what: str) -> Taken:
    """Requests a second of each, in turn, after a window each that does not count."""
    warm_up(targets, concurrency, seconds / 2, what)
    measures = {
        name: lambda aimed=aimed: aimed.load(concurrency, seconds).per_second for name, aimed in targets.items()
    }
    return in_turn(measures, rounds, what)


def warm_up(targets: Mapping[str, Target], concurrency: int, seconds: float, what: str) -> None:
    for name, aimed in targets.items():
        step(f"{what}: {name}, warming up")
        aimed.load(concurrency, seconds)


def latencies(targets: Mapping[str, Target], seconds: float) -> dict[str, Measure]:
    """Measures of the median milliseconds with one request at a time."""
    return {
        name: lambda aimed=aimed: 1000 * aimed.load(1, seconds, single=True).quantile_s(0.5)
        for name, aimed in targets.items()
    }


def mlp(results: Results, pace: Pace) -> None:
    """The small model where the transport is everything: throughput, latency, growth."""
    section = "MLP 784-128-128-10"
    with ExitStack() as stack:
        targets = small_servers(stack, "mlp", (ENVOY, GRPCIO, UNBATCHED, MLSERVER))
        taken = rates(targets, CONCURRENCY, pace.small_s, pace.rounds, "MLP, 8 × 16")
        what = f"{ENVOY}, 8 connections × 16 streams"
        for reference, bound in ((UNBATCHED, 5), (MLSERVER, 15)):
            results.rows.append(compare(section, what, RATE, taken, ENVOY, reference, Aim("ratio", bound, True)))
        results.rows.append(compare(section, f"{GRPCIO}, 8 × 16", RATE, taken, GRPCIO, UNBATCHED))
        what = "MLP, one stream"
        warm_up(targets, 1, pace.small_s / 2, what)
        taken = in_turn(latencies(targets, pace.small_s), pace.rounds, what)
        aim = Aim("ratio", 0.5, False)
        results.rows.append(compare(section, f"{ENVOY}, one stream", LATENCY, taken, ENVOY, GRPCIO, aim))
        results.rows.append(compare(section, f"{ENVOY}, one stream", LATENCY, taken, ENVOY, MLSERVER))
        grow({name: targets[name] for name in (ENVOY, GRPCIO, UNBATCHED, MLSERVER)}, results, pace)


def grow(targets: Mapping[str, Target], results: Results, pace: Pace) -> None:
    """Requests a second from 1 to 512 in flight."""
    concurrency = [1 << power for power in range(10)]
    curves: dict[str, list[float]] = {name: [] for name in targets}
    for number in concurrency:
        for name, aimed in targets.items():
            step(f"MLP, growth: {name}, {number} in flight")
            try:
                rate = aimed.load(number, pace.small_s / 2).per_second
            except BenchError as error:
                # A reference that breaks down under load is a result, too.
                step(f"{name} at {number}: {error}")
                rate = float("nan")
            curves[name].append(rate)
    results.growth.extend(Curve(name, concurrency, rates) for name, rates in curves.items())


def small(name: str, section: str, results: Results, pace: Pace) -> None:
    """A small model at 8 × 16 beside the references; no aim is set for these."""
    with ExitStack() as stack:
        session = stack.enter_context(bare(model(name)))
        targets = small_servers(stack, name, (ENVOY, GRPCIO, UNBATCHED, MLSERVER))
        batch = session.best_batch(512, pace.small_s / 8)
        warm_up(targets, CONCURRENCY, pace.small_s / 2, section)
        measures = {
            name: lambda aimed=aimed: aimed.load(CONCURRENCY, pace.small_s).per_second
            for name, aimed in targets.items()
        }
        measures[BARE] = lambda: session.rows_per_second(batch, pace.small_s)
        taken = in_turn(measures, pace.rounds, section)
        for measured, reference in ((ENVOY, UNBATCHED), (ENVOY, MLSERVER), (ENVOY, BARE), (GRPCIO, UNBATCHED)):
            results.rows.append(compare(section, f"{measured}, 8 × 16", RATE, taken, measured, reference))


def lstm(results: Results, pace: Pace) -> None:
    small("lstm", "LSTM text classifier, 100 tokens", results, pace)


def forest(results: Results, pace: Pace) -> None:
    small("forest", "Random forest, 100 trees", results, pace)


def large(name: str, section: str, largest_batch: int, results: Results, pace: Pace) -> None:
    """A large model beside bare ONNX Runtime with the same threads: at saturation, and one row at a time."""
    served = model(name)
    asked = request(served)
    with ExitStack() as stack:
        session = stack.enter_context(bare(served))
        batch = session.best_batch(largest_batch, pace.large_s / 4)
        # As whoever runs such a model would set it.
        flags = ("--max-batch-size", str(batch))
        targets = {
            transport: target(
                stack.enter_context(servers.penstock(transport, served, "--transport", transport, *flags)), asked
            )
            for transport in (ENVOY, GRPCIO)
        }
        saturate(section, targets, session, batch, results, pace)
        what = f"{section}, one row at a time"
        measures = latencies(targets, pace.large_s / 2)
        measures[BARE] = lambda: 1000 * statistics.median(session.runs(1, pace.large_s / 2))
        taken = in_turn(measures, pace.rounds, what)
        for transport in targets:
            aim = Aim("excess", 0.5, False)
            row = compare(section, f"{transport}, one row at a time", "ms", taken, transport, BARE, aim)
            results.rows.append(row)


def saturate(
    section: str, targets: Mapping[str, Target], session: Bare, batch: int, results: Results, pace: Pace
) -> None:
    """As many requests in flight as keep the next batch waiting while one runs."""
    concurrency = max(3 * batch, 8)
    round_s = concurrency / session.rows_per_second(batch, 0)
    # Long enough for its rate: three rounds of everything that is in flight.
    seconds = max(pace.large_s, 3.5 * round_s)
    measures: dict[str, Measure] = {
        name: lambda aimed=aimed: aimed.load(concurrency, seconds, steady=True).per_second
        for name, aimed in targets.items()
    }
    measures[BARE] = lambda: session.rows_per_second(batch, seconds)
    taken = in_turn(measures, pace.rounds, f"{section}, saturated")
    for transport in targets:
        what = f"{transport}, {concurrency} in flight, batches ≤ {batch}"
        row = compare(section, what, "rows/s", taken, transport, BARE, Aim("ratio", 0.95, True))
        results.rows.append(row)


def resnet50(results: Results, pace: Pace) -> None:
    large("resnet50", "ResNet-50, 224 × 224", 32, results, pace)


def bert(results: Results, pace: Pace) -> None:
    large("bert", "BERT-base size, 128 tokens", 8, results, pace)


def tensors(results: Results, pace: Pace) -> None:
    """16 MB in, 16 MB out through an identity, beside grpc.aio that answers the bytes it got."""
    section, served = "16 MB tensors, identity", model("echo")
    asked, reference = request(served), "grpc.aio echo of bytes"
    with ExitStack() as stack:
        targets = {
            transport: target(stack.enter_context(servers.penstock(transport, served, "--transport", transport)), asked)
            for transport in (ENVOY, GRPCIO)
        }
        echo = stack.enter_context(servers.echo())
        targets[reference] = Target(reference, echo.address, asked, 5 + len(asked.message))
        warm_up(targets, 1, pace.small_s / 2, section)
        for concurrency in (1, 4):
            # Ten of them take a good part of a second.
            measures = {
                name: lambda aimed=aimed, at=concurrency: (
                    aimed.load(at, 2 * pace.small_s, steady=True).per_second * 4 * ECHO_WIDTH / MIB
                )
                for name, aimed in targets.items()
            }
            taken = in_turn(measures, pace.rounds, f"{section}, {concurrency} in flight")
            for transport in (ENVOY, GRPCIO):
                what = f"{transport}, {concurrency} in flight"
                row = compare(section, what, "MiB/s each way", taken, transport, reference, Aim("ratio", 0.5, True))
                results.rows.append(row)


def process(results: Results, pace: Pace) -> None:
    """Start and memory with no model."""
    section = "The process with no model"
    for transport, limit in ((ENVOY, 220), (GRPCIO, 120)):
        started: list[float] = []
        resident: list[float] = []
        for _ in range(pace.rounds):
            with servers.penstock(transport, None, "--transport", transport) as server:
                started.append(server.started_s)
                resident.append(server.rss_mib())
        for what, unit, values, bound in (
            ("start to ready", "s", started, 2),
            ("RSS, whole tree", "MiB", resident, limit),
        ):
            aim = Aim("value", bound, False)
            median = statistics.median(values)
            results.rows.append(Row(section, f"{transport}, {what}", unit, median, aim=aim, windows={unit: values}))


def loading(results: Results, pace: Pace) -> None:
    """A small model's latencies while nothing else happens, and while a large one is loaded and unloaded."""
    section, served, large = "MLP, one stream, while 500 MB are loaded", model("mlp"), model("weighty")
    asked, quiet, busy = request(served), "nothing is loaded", "loading"
    for transport in (ENVOY, GRPCIO):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
            both = replace(served, repository=side_by_side(folder, served, large))
            flags = ("--transport", transport, "--mode", "explicit", "--load-model", served.name)
            aimed = target(stack.enter_context(servers.penstock(transport, both, *flags)), asked)
            warm_up({transport: aimed}, 1, pace.small_s / 2, section)
            alone = [load_once(aimed.address, large.name) for _ in range(pace.rounds + 1)][1:]
            beside: list[float] = []

            def window(aimed: Target = aimed) -> Window:
                return aimed.load(1, pace.large_s, single=True)

            def window_beside(aimed: Target = aimed, beside: list[float] = beside) -> Window:
                with loads(aimed.address, large.name) as taken:
                    measured = window(aimed)
                # A load that goes on past the window has the machine to itself in the end.
                beside.extend(taken[:-1])
                return measured

            taken = in_turn({quiet: window, busy: window_beside}, pace.rounds, f"{section}: {transport}")
            results.rows.extend(stalls(section, transport, taken, busy, quiet))
            windows = {"beside requests": beside, "with nothing else": alone}
            results.rows.append(
                Row(
                    section,
                    f"{transport}, one load",
                    "s",
                    statistics.median(beside),
                    "with nothing else",
                    statistics.median(alone),
                    ratio=statistics.median(beside) / statistics.median(alone),
                    windows=windows,
                )
            )
    results.notes.append(
        f"{section}: server, client and the thread that loads share the cores, so a request also waits for its turn "
        "on a core; an idle core would hide that."
    )


def stalls(
    section: str, transport: str, taken: Mapping[str, Sequence[Window]], measured: str, reference: str
) -> list[Row]:
    """Median, 99th percentile and longest latency, milliseconds."""
    rows = []
    for what, share, aim in (
        ("median", 0.5, None),
        ("p99", 0.99, Aim("ratio", 3, False)),
        ("longest", 1, Aim("excess", 50, False)),
    ):
        latencies = {name: [1000 * window.quantile_s(share) for window in windows] for name, windows in taken.items()}
        row = compare(section, f"{transport}, {what}", "ms", latencies, measured, reference, aim)
        rows.append(replace(row, steady=aim is None))
    return rows


SECTIONS: dict[str, Callable[[Results, Pace], None]] = {
    section.__name__: section for section in (process, mlp, lstm, forest, resnet50, bert, tensors, loading)
}
