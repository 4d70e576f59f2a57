"""From a version's answer to a ModelInferResponse, as the parts of its bytes."""

from collections.abc import Callable, Mapping, Sequence

from penstock.inference.classification import classify
from penstock.inference.inference import Inference, Parameter
from penstock.inference.request import region_of
from penstock.inference.served_version import ServedVersion
from penstock.inference.shared_memory import BYTE_SIZE, OFFSET, REGION
from penstock.inference.tensors import BYTES, Array, encode_raw
from penstock.inference.wire import raw_output_parts
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError

# Writes bytes into a region of shared memory, from an offset on, into no more than a number of bytes.
RegionWriter = Callable[[str, int, int, bytes | memoryview], None]
Parts = list[bytes | memoryview]

_CLASSIFICATION = "classification"
_FINAL = "triton_final_response"


class ResponseWriter:
    """Writes the responses of this server."""

    def __init__(self, write_region: RegionWriter) -> None:
        self._write_region = write_region

    def write(
        self,
        request: pb.ModelInferRequest,
        version: ServedVersion,
        inference: Inference,
        arrays: Sequence[Array],
        *,
        timings: bool = False,
        final: bool | None = None,
    ) -> Parts:
        """The parts of a response with these arrays, the wanted outputs in their order.

        Raises `InvalidFieldError` where an output's parameters cannot be done. `final` is told in a stream.
        """
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(version.number), id=request.id
        )
        if timings:
            _set(response.parameters, _timings(inference))
        if final is not None:
            response.parameters[_FINAL].bool_param = final
        asked = {one.name: one.parameters for one in request.outputs if one.parameters}
        raw: Parts = []
        outputs = version.signature.outputs
        for name, array in zip(inference.outputs, arrays, strict=True):
            datatype = outputs[name].datatype
            if name in asked:
                raw.append(self._special(response, version, name, array, asked[name]))
                continue
            response.outputs.add(name=name, datatype=datatype.name, shape=array.shape)
            raw.append(encode_raw(datatype, array))
        return [response.SerializeToString(), *raw_output_parts(raw)]

    def _special(
        self,
        response: pb.ModelInferResponse,
        version: ServedVersion,
        name: str,
        array: Array,
        parameters: Mapping[str, pb.InferParameter],
    ) -> bytes | memoryview:
        """An output that is to be classified, or to be left in shared memory: then its raw contents are empty."""
        datatype = version.signature.outputs[name].datatype
        if _CLASSIFICATION in parameters:
            batched = version.signature.batched
            count = parameters[_CLASSIFICATION].int64_param
            array, datatype = classify(array, count, version.labels.get(name, ()), batched=batched), BYTES
        raw = encode_raw(datatype, array)
        output = response.outputs.add(name=name, datatype=datatype.name, shape=array.shape)
        if REGION not in parameters:
            return raw
        region, offset, byte_size = region_of(f"outputs[{name[:80]}]", parameters)
        if len(raw) > byte_size:
            raise InvalidFieldError.of(
                f"outputs[{name[:80]}].parameters",
                f"expected room for {len(raw)} bytes; the region was given {byte_size}",
            )
        self._write_region(region, offset, byte_size, raw)
        output.parameters[REGION].string_param = region
        output.parameters[BYTE_SIZE].int64_param = len(raw)
        if offset:
            output.parameters[OFFSET].int64_param = offset
        return b""


def final_only(request: pb.ModelInferRequest, version: ServedVersion) -> Parts:
    """The parts of an empty response that only says that no other follows."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version=str(version.number), id=request.id)
    response.parameters[_FINAL].bool_param = True
    return [response.SerializeToString()]


def stream_error(request: pb.ModelInferRequest, message: str) -> bytes:
    """A stream's response to a request that failed."""
    failed = pb.ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
    failed.parameters[_FINAL].bool_param = True
    return pb.ModelStreamInferResponse(error_message=message, infer_response=failed).SerializeToString()


def _timings(inference: Inference) -> dict[str, Parameter]:
    run = inference.run
    if run is None:
        return {}
    return {
        "queue_ns": run.start_ns - inference.arrival_ns,
        "gather_ns": run.gathered_ns - run.start_ns,
        "run_ns": run.ran_ns - run.gathered_ns,
        "settle_ns": run.settled_ns - run.ran_ns,
        "batch_rows": run.rows,
    }


def _set(parameters: Mapping[str, pb.InferParameter], values: Mapping[str, Parameter]) -> None:
    for key, value in values.items():
        parameters[key].int64_param = int(value)
