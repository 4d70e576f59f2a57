"""Messages about versions: metadata, statistics, index."""

from collections.abc import Iterable

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


def _duration(held: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=held.count, ns=max(0, held.ns))
