"""The numbers of several workers as one server's: sums, and what only one of them has."""

from prometheus_client import Metric

from penstock.inference.messages import merged_statistics
from penstock.inference.metrics import LoadMetrics, MetricsCollector, VersionMetrics, exposition
from penstock.inference.statistics import Statistics
from penstock.inference.worker_metrics import ServerCollector, WorkerCollector, merged, packed, unpacked
from penstock.oip import inference_pb2 as pb


def worker(*models: str, loads: int = 0) -> MetricsCollector:
    versions = []
    for rows, model in enumerate(models, 1):
        statistics = Statistics()
        statistics.inference_count = rows
        statistics.rows_histogram.observe(rows)
        statistics.failures["STRANGE"] = rows
        versions.append(VersionMetrics(model, "1", statistics, pending=rows))
    done = LoadMetrics()
    for _ in range(loads):
        done.record(20_000_000, succeeded=True)
    return MetricsCollector(lambda: versions, done)


def test_what_is_packed_comes_out_as_it_was() -> None:
    families = list(worker('quote " \n', loads=2).collect())
    assert exposition([_Told(unpacked(packed(families)))]) == exposition([_Told(families)])


def test_counters_gauges_and_histograms_add_up() -> None:
    one, other = worker("a", "b", loads=1), worker("b", "c", loads=2)
    lines = exposition([_Told(merged([one.collect(), other.collect()]))]).splitlines()
    for model, count in (("a", 1), ("b", 3), ("c", 2)):
        for name in ("nv_inference_count", "nv_inference_pending_request_count", "penstock_inference_batch_rows_sum"):
            assert f'{name}{{model="{model}",version="1"}} {count}' in lines
        assert f'nv_inference_request_failure{{model="{model}",version="1",reason="STRANGE"}} {count}' in lines
    for bound, count in (("1.0", 1), ("2.0", 2), ("+Inf", 2)):
        assert f'penstock_inference_batch_rows_bucket{{model="b",version="1",le="{bound}"}} {count}' in lines
    assert 'penstock_model_loads_total{result="success"} 3' in lines
    # Each family is told once, and each of its label sets in one piece.
    assert len([line for line in lines if line.startswith("# TYPE")]) == len(
        {line for line in lines if line.startswith("# TYPE")}
    )
    rows = [line for line in lines if line.startswith("penstock_inference_batch_rows_bucket{")]
    assert [line.split('"')[1] for line in rows] == sorted(line.split('"')[1] for line in rows)


def test_each_process_is_told_for_itself() -> None:
    others = [packed(WorkerCollector(worker("a"), number).collect()) for number in (1, 2)]
    collector = ServerCollector(WorkerCollector(worker("a"), 0), lambda: others)
    text = exposition([collector])
    for number in range(3):
        assert f'\nprocess_resident_memory_bytes{{worker="{number}"}} ' in text
        assert f'\nprocess_cpu_seconds_total{{worker="{number}"}} ' in text
    assert '\nnv_inference_count{model="a",version="1"} 3\n' in text


def statistics(model: str, last: int, rows: dict[int, int]) -> pb.ModelStatistics:
    one = pb.ModelStatistics(name=model, version="1", last_inference=last, execution_count=sum(rows.values()))
    for size, count in rows.items():
        batch = one.batch_stats.add(batch_size=size)
        batch.compute_infer.count, batch.compute_infer.ns = count, count * 10
        one.inference_count += size * count
    one.inference_stats.success.count = 5
    one.inference_stats.cache_hit.ns = last
    return one


def test_statistics_are_sums_and_the_last_inference_the_latest() -> None:
    workers = [
        pb.ModelStatisticsResponse(model_stats=[statistics("a", 30, {1: 2, 8: 1})]),
        pb.ModelStatisticsResponse(model_stats=[statistics("a", 20, {8: 3, 4: 1}), statistics("b", 10, {2: 1})]),
        pb.ModelStatisticsResponse(),
    ]
    expected = statistics("a", 30, {1: 2, 4: 1, 8: 4})
    expected.inference_stats.success.count = 10
    expected.inference_stats.cache_hit.ns = 50
    assert list(merged_statistics(workers).model_stats) == [expected, statistics("b", 10, {2: 1})]


class _Told:
    """A collector of what is there."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
