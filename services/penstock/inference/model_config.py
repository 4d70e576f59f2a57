"""A model's configuration: what its owner wrote, completed from the graph, and the signature that follows from both."""

from collections.abc import Sequence
from dataclasses import replace

from penstock.inference.onnx_engine import GraphTensor
from penstock.inference.padding import AXIS
from penstock.inference.signature import BATCH, Axis, Signature, Tensor
from penstock.inference.tensors import DATATYPES
from penstock.oip import model_config_pb2 as pb
from penstock.rpc.errors import WrongStateError

Written = pb.ModelInput | pb.ModelOutput

ONNX, PYTHON, ENSEMBLE = "onnxruntime", "python", "ensemble"
_PLATFORMS = {ONNX: "onnxruntime_onnx", PYTHON: "python", ENSEMBLE: "ensemble"}
_BY_PLATFORM = {platform: backend for backend, platform in _PLATFORMS.items()}
MODEL_FILES = {ONNX: "model.onnx", PYTHON: "model.py", ENSEMBLE: ""}

_TYPES = {name: pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}") for name in DATATYPES}
DATATYPE_NAMES = {number: name for name, number in _TYPES.items()}


def backend_of(config: pb.ModelConfig) -> str:
    """What runs the model. Raises `WrongStateError` for one that this server does not have."""
    if config.WhichOneof("scheduling_choice") == "ensemble_scheduling":
        return ENSEMBLE
    named = config.backend or _BY_PLATFORM.get(config.platform, config.platform) or ONNX
    if named not in _PLATFORMS:
        raise WrongStateError(f"The configuration asks for backend {named!r}; this server has {', '.join(_PLATFORMS)}.")
    return named


def model_file(config: pb.ModelConfig) -> str:
    """The name of the file or folder with the model, below its version's folder."""
    return config.default_model_filename or MODEL_FILES[backend_of(config)]


def signature_of(
    config: pb.ModelConfig,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    hidden: frozenset[str] = frozenset(),
) -> Signature:
    """The signature of a graph under a configuration, which may name fewer outputs, and sizes for dynamic axes.

    `hidden` tensors are the server's, not its clients', and no part of the lists of inputs and outputs.
    Raises `WrongStateError` where the two do not agree.
    """
    _check_names("input", config.input, inputs, hidden)
    _check_names("output", config.output, outputs, hidden | {tensor.name for tensor in outputs})
    batched = _is_batched(config, [*inputs, *outputs])
    written = _written(config)
    served = [graph for graph in outputs if not config.output or graph.name in written or graph.name in hidden]
    return Signature.made(
        [_freed(_tensor(graph, written.get(graph.name), batched), written.get(graph.name), config) for graph in inputs],
        [_tensor(graph, written.get(graph.name), batched) for graph in served],
    )


def check_graph(signature: Signature, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> None:
    """Raises `WrongStateError` unless a graph has exactly this signature, order included."""
    problems = [
        *_differences("input", inputs, list(signature.inputs.values())),
        *_differences("output", outputs, list(signature.outputs.values())),
    ]
    if problems:
        raise WrongStateError(f"model.onnx differs from the version's signature: {'; '.join(problems)}.")


def declared_signature(config: pb.ModelConfig) -> Signature:
    """The signature of a model without a graph, all of which its configuration has to tell.

    Raises `WrongStateError` if it does not.
    """
    if not config.input or not config.output:
        raise WrongStateError(
            f"The configuration of a model with backend {backend_of(config)!r} has to list its inputs and outputs."
        )
    batched = config.max_batch_size > 0
    return Signature.made(
        [_declared(one, batched, optional=one.optional) for one in config.input],
        [_declared(one, batched, optional=False) for one in config.output],
    )


def completed(
    config: pb.ModelConfig, name: str, signature: Signature, max_batch_size: int, providers: Sequence[str]
) -> pb.ModelConfig:
    """The configuration as clients see it: nothing that follows from the model is left out."""
    backend = backend_of(config)
    complete = pb.ModelConfig()
    complete.CopyFrom(config)
    complete.name, complete.backend, complete.platform = name, backend, _PLATFORMS[backend]
    if backend == ENSEMBLE:
        complete.backend = ""
    complete.default_model_filename = model_file(config)
    complete.max_batch_size = (config.max_batch_size or max_batch_size) if signature.batched else 0
    if not config.HasField("version_policy"):
        complete.version_policy.latest.num_versions = 1
    _complete_tensors(complete, signature)
    # A Python model sees each request's parameters unless its owner wants batches.
    if backend == ONNX and not config.WhichOneof("scheduling_choice") and signature.batched:
        complete.dynamic_batching.SetInParent()
    if backend != ENSEMBLE and not config.instance_group:
        complete.instance_group.add(count=1)
    for number, group in enumerate(complete.instance_group):
        group.name = group.name or f"{name}_{number}"
        group.count = group.count or 1
        if group.kind == pb.ModelInstanceGroup.KIND_AUTO:
            on_gpu = any("CUDA" in provider or "Tensorrt" in provider for provider in providers)
            group.kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    if providers:
        complete.parameters["execution_providers"].string_value = ",".join(providers)
    return complete


def instance_count(config: pb.ModelConfig) -> int:
    """How many instances a complete configuration asks for."""
    return max(1, sum(group.count for group in config.instance_group))


def _complete_tensors(config: pb.ModelConfig, signature: Signature) -> None:
    written = _written(config)
    for tensor in signature.inputs.values():
        _complete_tensor(written.get(tensor.name) or config.input.add(name=tensor.name), tensor, signature)
    for tensor in signature.outputs.values():
        _complete_tensor(written.get(tensor.name) or config.output.add(name=tensor.name), tensor, signature)


def _complete_tensor(written: Written, tensor: Tensor, signature: Signature) -> None:
    written.data_type = _TYPES[tensor.datatype.name]
    if not written.dims:
        written.dims.extend(tensor.wire_shape[1 if signature.batched else 0 :])


def _written(config: pb.ModelConfig) -> dict[str, Written]:
    inputs: dict[str, Written] = {one.name: one for one in config.input}
    return inputs | {one.name: one for one in config.output}


def _is_batched(config: pb.ModelConfig, graph: Sequence[GraphTensor]) -> bool:
    """A written batch size decides; else that dims are written; else whether all first axes are one dynamic axis."""
    if config.max_batch_size > 0:
        return True
    if any(one.dims for one in config.input) or any(one.dims for one in config.output):
        return False
    first = {tensor.axes[0] if tensor.axes else 0 for tensor in graph}
    return len(first) == 1 and not isinstance(next(iter(first)), int)


def _tensor(graph: GraphTensor, written: Written | None, batched: bool) -> Tensor:
    if graph.datatype not in DATATYPES:
        raise WrongStateError(
            f"Tensor {graph.name!r} is {graph.datatype}; only tensors of numbers and strings are served."
        )
    if written is not None and written.data_type not in (pb.TYPE_INVALID, _TYPES[graph.datatype]):
        raise WrongStateError(
            f"The configuration says that {graph.name!r} is {DATATYPE_NAMES.get(written.data_type, 'unknown')}; the "
            f"graph has {graph}."
        )
    axes: list[Axis] = [
        axis if isinstance(axis, int) else axis or f"{graph.name}.{index}" for index, axis in enumerate(graph.axes)
    ]
    if batched:
        if not axes or isinstance(graph.axes[0], int):
            raise WrongStateError(
                f"The configuration's max_batch_size asks for a batch axis; the graph has {graph}, whose first axis is "
                f"not dynamic. Leave max_batch_size out."
            )
        axes[0] = BATCH
    elif axes[:1] == [BATCH]:
        # Rows that are no batch must not be taken for one.
        axes[0] = "rows"
    tensor = Tensor(graph.name, DATATYPES[graph.datatype], tuple(axes))
    return tensor if written is None or not written.dims else _as_written(tensor, written, batched)


def _as_written(tensor: Tensor, written: Written, batched: bool) -> Tensor:
    head = tensor.shape[:1] if batched else ()
    reshaped = written.HasField("reshape")
    dims = list(written.reshape.shape if reshaped else written.dims)
    graph = tensor.shape[len(head) :]
    if len(dims) != len(graph) or any(
        isinstance(axis, int) and dim not in (-1, axis) for dim, axis in zip(dims, graph, strict=True)
    ):
        raise WrongStateError(f"The configuration says that {tensor.name!r} has dims {dims}; the graph has {tensor}.")
    if reshaped:
        shape = tuple(dim if dim >= 0 else f"{tensor.name}.{index}" for index, dim in enumerate(written.dims))
        return replace(tensor, shape=(*head, *shape), reshape=tuple(dims))
    narrowed = tuple(axis if dim < 0 else dim for dim, axis in zip(dims, graph, strict=True))
    return replace(tensor, shape=(*head, *narrowed))


def _freed(tensor: Tensor, written: Written | None, config: pb.ModelConfig) -> Tensor:
    """Dims of −1 say of an input that any size will do, whatever the graph calls its axes.

    A padded axis is one for all inputs: they are padded, and their outputs trimmed, to one length.
    """
    if written is None or written.HasField("reshape"):
        return tensor
    names = tensor.shape[len(tensor.shape) - len(written.dims) :]
    padded = config.parameters[AXIS].string_value if AXIS in config.parameters else None
    free = [name for name, dim in zip(names, written.dims, strict=True) if dim < 0 and isinstance(name, str)]
    return replace(tensor, free=frozenset(name for name in free if name != padded))


def _declared(written: Written, batched: bool, *, optional: bool) -> Tensor:
    if written.data_type not in DATATYPE_NAMES:
        raise WrongStateError(f"The configuration gives tensor {written.name!r} no data_type.")
    shape = tuple(dim if dim >= 0 else f"{written.name}.{index}" for index, dim in enumerate(written.dims))
    datatype = DATATYPES[DATATYPE_NAMES[written.data_type]]
    return Tensor(written.name, datatype, (BATCH, *shape) if batched else shape, optional)


def _check_names(
    kind: str,
    written: Sequence[Written],
    graph: Sequence[GraphTensor],
    spared: frozenset[str],
) -> None:
    names, known = [one.name for one in written], [tensor.name for tensor in graph]
    unknown = [name for name in names if name not in known]
    missing = [name for name in known if name not in names and name not in spared] if names else []
    if unknown or missing or len(set(names)) < len(names):
        raise WrongStateError(
            f"The configuration lists the {kind}s {names}; the graph has {', '.join(map(str, graph)) or 'none'}."
        )


def _differences(kind: str, graph: Sequence[GraphTensor], wanted: Sequence[Tensor]) -> list[str]:
    """What tells the graph's inputs or outputs from the signature's; their order counts."""
    if len(wanted) == len(graph) and all(map(_agrees, graph, wanted)):
        return []
    return [f"expected {kind}s {', '.join(map(str, wanted))}; the graph has {', '.join(map(str, graph)) or 'none'}"]


def _agrees(graph: GraphTensor, wanted: Tensor) -> bool:
    return (graph.name, graph.datatype, len(graph.axes)) == (
        wanted.name,
        wanted.datatype.name,
        len(wanted.shape),
    ) and all(_axis_agrees(axis, size) for axis, size in zip(graph.axes, wanted.shape, strict=True))


def _axis_agrees(axis: int | str | None, wanted: Axis) -> bool:
    """The graph may leave a dynamic axis without a name; where it gives one, the signature's is the same."""
    return isinstance(wanted, str) if axis is None else axis == wanted
