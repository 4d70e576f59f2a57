"""The metrics of several workers as one server's: what they count is added up, each process is told for itself."""

import json
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import PROCESS_COLLECTOR, Metric

from penstock.inference.metrics import Collector


class WorkerCollector:
    """One worker's metrics; those of its process carry its number."""

    def __init__(self, collector: Collector, number: int) -> None:
        self._collector = collector
        self._worker = str(number)

    def collect(self) -> Iterator[Metric]:
        yield from self._collector.collect()
        for family in PROCESS_COLLECTOR.collect():
            own = Metric(family.name, family.documentation, family.type)
            for sample in family.samples:
                own.add_sample(sample.name, {**sample.labels, "worker": self._worker}, sample.value)
            yield own


class ServerCollector:
    """The metrics of all workers. `others` asks the other workers for theirs, packed, and raises if any is silent."""

    def __init__(self, own: Collector, others: Callable[[], Iterable[bytes]]) -> None:
        self._own = own
        self._others = others

    def collect(self) -> Iterable[Metric]:
        others = [unpacked(one) for one in self._others()]
        return merged([self._own.collect(), *others])


def packed(families: Iterable[Metric]) -> bytes:
    return json.dumps(
        [
            [family.name, family.documentation, family.type, [list(sample[:3]) for sample in family.samples]]
            for family in families
        ]
    ).encode()


def unpacked(data: bytes) -> list[Metric]:
    families = []
    for name, meaning, kind, samples in json.loads(data):
        families.append(Metric(name, meaning, kind))
        for sample in samples:
            families[-1].add_sample(*sample)
    return families


def merged(workers: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Every family once, with one sample for each name and labels: the sum of the workers' values."""
    families: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for worker in workers:
        for family in worker:
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            values = sums.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                values[key] = values.get(key, 0) + sample.value
    for name, values in sums.items():
        for (sample_name, labels), value in values.items():
            families[name].add_sample(sample_name, dict(labels), value)
    return list(families.values())
