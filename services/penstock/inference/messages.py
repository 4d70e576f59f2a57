"""Messages about versions: metadata, statistics, index."""

from collections.abc import Iterable

from google.protobuf.message import Message

from penstock.inference.served_version import ServedVersion
from penstock.inference.signature import Tensor
from penstock.inference.statistics import Duration, Statistics
from penstock.oip import inference_pb2 as pb


def tensor_metadata(tensor: Tensor) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype.name, shape=tensor.wire_shape
    )


def model_metadata(name: str, version: ServedVersion, ready: Iterable[ServedVersion]) -> pb.ModelMetadataResponse:
    signature = version.signature
    return pb.ModelMetadataResponse(
        name=name,
        versions=[str(held.number) for held in ready],
        platform=version.config.platform,
        inputs=map(tensor_metadata, signature.inputs.values()),
        outputs=map(tensor_metadata, signature.outputs.values()),
    )


def model_statistics(version: ServedVersion) -> pb.ModelStatistics:
    held = version.statistics
    return pb.ModelStatistics(
        name=version.model,
        version=str(version.number),
        last_inference=held.last_inference_ms,
        inference_count=held.inference_count,
        execution_count=held.execution_count,
        inference_stats=_inference_statistics(held),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=rows,
                compute_input=_duration(batch.gather),
                compute_infer=_duration(batch.run),
                compute_output=_duration(batch.settle),
            )
            for rows, batch in sorted(held.batches.items())
        ],
    )


def _inference_statistics(held: Statistics) -> pb.InferStatistics:
    return pb.InferStatistics(
        success=_duration(held.success),
        fail=_duration(held.fail),
        queue=_duration(held.queue),
        compute_input=_duration(held.gather),
        compute_infer=_duration(held.run),
        compute_output=_duration(held.settle),
        cache_hit=_duration(held.cache_hit),
        cache_miss=_duration(held.cache_miss),
    )


def merged_statistics(workers: Iterable[pb.ModelStatisticsResponse]) -> pb.ModelStatisticsResponse:
    """Each version's statistics on all workers: counts and times are sums, the last inference is the latest."""
    merged = pb.ModelStatisticsResponse()
    versions: dict[tuple[str, str], pb.ModelStatistics] = {}
    for worker in workers:
        for one in worker.model_stats:
            key = one.name, one.version
            if key in versions:
                _add_statistics(versions[key], one)
            else:
                versions[key] = merged.model_stats.add()
                versions[key].CopyFrom(one)
    return merged


def _add_statistics(total: pb.ModelStatistics, more: pb.ModelStatistics) -> None:
    total.last_inference = max(total.last_inference, more.last_inference)
    total.inference_count += more.inference_count
    total.execution_count += more.execution_count
    _add_durations(total.inference_stats, more.inference_stats)
    batches = {batch.batch_size: batch for batch in total.batch_stats}
    for batch in more.batch_stats:
        if batch.batch_size in batches:
            _add_durations(batches[batch.batch_size], batch)
        else:
            batches[batch.batch_size] = pb.InferBatchStatistics()
            batches[batch.batch_size].CopyFrom(batch)
    merged = [batches[size] for size in sorted(batches)]
    del total.batch_stats[:]
    total.batch_stats.extend(merged)


def _add_durations(total: Message, more: Message) -> None:
    """Adds up every field that is a `StatisticDuration`."""
    for field, value in more.ListFields():
        if isinstance(value, pb.StatisticDuration):
            sum_ = getattr(total, field.name)
            sum_.count += value.count
            sum_.ns += value.ns


def _duration(held: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=held.count, ns=max(0, held.ns))
