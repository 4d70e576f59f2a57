"""keras.ops as functional models use them, one model each."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops
from tests.conformance.keras.case import Case, Model, around

# Element by element on numbers of both signs.
_ELEMENTWISE = [
    "abs",
    "arctan",
    "arcsinh",
    "ceil",
    "cos",
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "isfinite",
    "isinf",
    "isnan",
    "negative",
    "nan_to_num",
    "reciprocal",
    "relu",
    "round",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "cosh",
    "square",
    "tan",
    "tanh",
    "trunc",
    "zeros_like",
    "ones_like",
    "logical_not",
    "deg2rad",
    "rad2deg",
    "signbit",
    "sinc",
    "cbrt",
    "isposinf",
    "isneginf",
    "fabs",
    "copy",
    "stop_gradient",
    "angle",
]
# On numbers above 0, that is |x| + 0.1.
_POSITIVE = ["log", "log10", "log1p", "log2", "rsqrt", "sqrt"]
_PAIRS = [
    "add",
    "arctan2",
    "divide",
    "divide_no_nan",
    "equal",
    "greater",
    "greater_equal",
    "hypot",
    "less",
    "less_equal",
    "logaddexp",
    "maximum",
    "minimum",
    "multiply",
    "not_equal",
    "subtract",
    "true_divide",
    "floor_divide",
    "mod",
    "logical_and",
    "logical_or",
    "logical_xor",
    "logaddexp2",
    "fmod",
    "isclose",
    "heaviside",
    "fmax",
    "fmin",
]
_REDUCTIONS = [
    "all",
    "any",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "count_nonzero",
    "logsumexp",
    "max",
    "mean",
    "min",
    "prod",
    "std",
    "sum",
    "var",
    "median",
    "ptp",
    "nansum",
    "nanmax",
    "nanmin",
    "nanmean",
]


def _one(name: str) -> Case:
    return Case(name, lambda: around(getattr(ops, name), (4,)))


def _positive(name: str) -> Case:
    return Case(name, lambda: around(lambda x: getattr(ops, name)(ops.abs(x) + 0.1), (4,)))


def _pair(name: str) -> Case:
    return Case(name, lambda: around(lambda pair: getattr(ops, name)(*pair), (4,), (4,)))


def _reduction(name: str) -> Case:
    return Case(name, lambda: around(lambda x: getattr(ops, name)(x, axis=-1), (3, 4)))


def _call(
    name: str, call: Callable[[Any], Any], *shapes: tuple[int | None, ...], dtype: str = "float32", refused: str = ""
) -> Case:
    reason = f"Neither tf2onnx nor Penstock translates {refused}." if refused else ""
    return Case(name, lambda: around(call, *shapes, dtype=dtype), refused, reason)


def _four_at_once() -> Model:
    x = keras.Input((6,), name="x")
    values, indices = ops.top_k(x, 2)
    return keras.Model(x, [values, indices, ops.argmax(x, axis=1), ops.logsumexp(x, axis=1), ops.cumsum(x, axis=1)])


def _positions() -> Model:
    """A tensor that no layer holds: positions added to embeddings."""
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    words = keras.layers.Embedding(5, 4)(tokens)
    return keras.Model(tokens, words + keras.layers.Embedding(7, 4)(ops.arange(7)))


CASES = [
    *map(_one, _ELEMENTWISE),
    *map(_positive, _POSITIVE),
    *map(_pair, _PAIRS),
    *map(_reduction, _REDUCTIONS),
    Case("top_k, argmax, logsumexp and cumsum", _four_at_once),
    Case("arange", _positions),
    _call("argsort", lambda x: ops.argsort(x, axis=-1), (5,)),
    _call("average_pool", lambda x: ops.average_pool(x, 2, padding="same"), (6, 6, 2)),
    _call("broadcast_to", lambda x: x + ops.broadcast_to(ops.ones((1, 4)), (3, 4)), (3, 4)),
    _call("cast", lambda x: ops.cast(x, "int32"), (4,)),
    _call("clip", lambda x: ops.clip(x, -0.5, 0.5), (4,)),
    _call("concatenate", lambda pair: ops.concatenate(pair, axis=-1), (4,), (2,)),
    _call("conv", lambda x: ops.conv(x, ops.ones((3, 3, 2, 4)), padding="same"), (6, 6, 2)),
    _call("cross", lambda pair: ops.cross(*pair), (3,), (3,)),
    _call("cumprod", lambda x: ops.cumprod(x, axis=1), (5,)),
    _call("cumsum", lambda x: ops.cumsum(x, axis=1), (5,)),
    _call("diagonal", lambda x: ops.diagonal(x, axis1=1, axis2=2), (4, 4)),
    _call("diff", lambda x: ops.diff(x, axis=1), (5,)),
    _call("digitize", lambda x: ops.digitize(x, np.array([-1.0, 0.0, 1.0])), (5,)),
    _call("depth_to_space", lambda x: ops.depth_to_space(x, 2), (4, 4, 8)),
    _call("dot", lambda x: ops.dot(x, ops.ones((4, 2))), (4,)),
    _call("dot_product_attention", lambda x: ops.dot_product_attention(x, x, x), (5, 2, 4)),
    _call("einsum", lambda pair: ops.einsum("bij,bjk->bik", *pair), (2, 3), (3, 4)),
    _call("expand_dims", lambda x: ops.expand_dims(x, 1), (4,)),
    _call("eye", lambda x: x + ops.eye(4), (4, 4)),
    _call("flip", lambda x: ops.flip(x, axis=1), (4,)),
    _call("fft", lambda x: ops.fft((x, x))[0], (8,)),
    _call("floor and floor_divide of integers", lambda x: ops.floor_divide(x - 3, 2), (4,), dtype="int32"),
    _call("full_like", lambda x: ops.full_like(x, 2.0) + x, (4,)),
    _call("get_item", lambda x: x[:, 1:-1, ::2], (5, 6)),
    _call("image.resize", lambda x: ops.image.resize(x, (8, 9)), (4, 5, 3)),
    _call("image.rgb_to_grayscale", ops.image.rgb_to_grayscale, (4, 5, 3)),
    _call("inner", lambda x: ops.inner(x, ops.ones((4,))), (4,)),
    _call("layer_normalization", ops.layer_normalization, (4,)),
    _call("linspace", lambda x: x + ops.linspace(0.0, 1.0, 4), (4,)),
    _call("matmul", lambda pair: ops.matmul(*pair), (2, 3), (3, 4)),
    _call("max_pool", lambda x: ops.max_pool(x, 2), (6, 6, 2)),
    _call("moments", lambda x: ops.moments(x, axes=[1]), (5,)),
    _call("moveaxis", lambda x: ops.moveaxis(x, 1, 2), (2, 3)),
    _call("norm", lambda x: ops.norm(x, axis=-1), (4,)),
    _call("normalize", lambda x: ops.normalize(x, axis=-1), (4,)),
    _call("one_hot", lambda x: ops.one_hot(x, 3), (4,), dtype="int32"),
    _call("multi_hot", lambda x: ops.multi_hot(x, 3), (4,), dtype="int32"),
    _call("outer", lambda x: ops.outer(ops.ones((2,)), ops.ones((4,))) + x, (2, 4)),
    _call("pad", lambda x: ops.pad(x, [[0, 0], [1, 2]]), (4,)),
    _call("pad (reflect)", lambda x: ops.pad(x, [[0, 0], [1, 2]], mode="reflect"), (4,)),
    _call("power", lambda x: ops.power(x, 2), (4,)),
    _call("quantile", lambda x: ops.quantile(x, 0.3, axis=-1), (5,)),
    _call("repeat", lambda x: ops.repeat(x, 2, axis=1), (4,)),
    _call("reshape", lambda x: ops.reshape(x, (-1, 6)), (2, 3)),
    _call("rfft", lambda x: ops.rfft(x)[0], (8,)),
    _call("rfft (imaginary, longer)", lambda x: ops.rfft(x, fft_length=12)[1], (2, 8)),
    _call("stft", lambda x: ops.stft(x, 16, 8, 16)[0], (64,)),
    _call("rms_normalization", lambda x: ops.rms_normalization(x, ops.ones((4,))), (4,)),
    _call("roll", lambda x: ops.roll(x, 1, axis=1), (4,)),
    _call("rot90", lambda x: ops.rot90(x, axes=(1, 2)), (3, 4)),
    _call(
        "slice_update",
        lambda x: ops.slice_update(x * 1.0, (0, 1), ops.zeros((1, 2))),
        (4,),
    ),
    _call("slice_update (beyond the end)", lambda x: ops.slice_update(x * 1.0, (0, 3), ops.ones((1, 2))), (4,)),
    _call(
        "searchsorted (right)",
        lambda x: ops.searchsorted(ops.convert_to_tensor([-1.0, 0.0, 1.0]), x[0], side="right"),
        (5,),
    ),
    _call(
        "searchsorted",
        lambda x: ops.searchsorted(ops.convert_to_tensor([-1.0, 0.0, 1.0]), x[0]),
        (5,),
    ),
    _call("select", lambda x: ops.select([x > 0, x < -1], [x, x * 2], 0), (4,)),
    _call("ones_like of any size", lambda x: ops.cumsum(ops.ones_like(x), axis=1) + x, (None,)),
    _call("slice", lambda x: ops.slice(x, (0, 1), (1, 2)), (4,)),
    _call("sort", lambda x: ops.sort(x, axis=-1), (5,)),
    _call("space_to_depth", lambda x: ops.space_to_depth(x, 2), (4, 4, 2)),
    _call("split", lambda x: ops.split(x, 2, axis=1), (4,)),
    _call("squeeze", lambda x: ops.squeeze(x, 1), (1, 4)),
    _call("stack", lambda pair: ops.stack(pair, axis=1), (4,), (4,)),
    _call("swapaxes", lambda x: ops.swapaxes(x, 1, 2), (2, 3)),
    _call("take", lambda x: ops.take(x, ops.convert_to_tensor([2, 0, -1]), axis=1), (4,)),
    _call("take_along_axis", lambda x: ops.take_along_axis(x, ops.argsort(x, axis=1), axis=1), (4,)),
    _call("tensordot", lambda x: ops.tensordot(x, ops.ones((4, 3)), axes=1), (2, 4)),
    _call("tile", lambda x: ops.tile(x, (1, 2)), (4,)),
    _call("trace", lambda x: ops.trace(x, axis1=1, axis2=2), (4, 4)),
    _call("transpose", lambda x: ops.transpose(x, (0, 2, 1)), (2, 3)),
    _call("tril", ops.tril, (4, 4)),
    _call("triu", ops.triu, (4, 4)),
    _call("unstack", lambda x: ops.unstack(x, axis=1), (2, 4)),
    _call("vectorized_map", lambda x: ops.vectorized_map(lambda row: row * 2, x), (4,)),
    _call("vstack", ops.vstack, (4,), (4,)),
    _call("hstack", ops.hstack, (4,), (4,)),
    _call("where", lambda x: ops.where(x > 0, x, 0.0), (4,)),
    _call("bitwise_and", lambda x: ops.bitwise_and(x, np.array(1, "int32")), (4,), dtype="int32"),
    _call("bitwise_or", lambda x: ops.bitwise_or(x, np.array(4, "int32")), (4,), dtype="int32"),
    _call("bitwise_xor", lambda x: ops.bitwise_xor(x, np.array(3, "int32")), (4,), dtype="int32"),
    _call("bitwise_not", ops.bitwise_not, (4,), dtype="int32"),
    _call("left_shift", lambda x: ops.left_shift(x, np.array(2, "int32")), (4,), dtype="int32"),
    _call("right_shift", lambda x: ops.right_shift(x, np.array(2, "int64")), (4,), dtype="int64"),
    _call("switch", lambda x: ops.switch(1, [ops.negative, ops.square], x), (4,), refused="_SwitchN"),
    _call("in_top_k", lambda x: ops.in_top_k(ops.argmin(x, axis=-1), x, k=2), (4,)),
    _call("irfft", lambda x: ops.irfft((x, x)), (5,), refused="IRFFT"),
    _call("det", ops.det, (3, 3)),
    _call("inv", lambda x: ops.inv(x + 4 * ops.eye(3)), (3, 3), refused="MatrixInverse"),
    _call("cholesky", lambda x: ops.cholesky(ops.eye(3) + 0 * x), (3, 3), refused="Cholesky"),
    _call(
        "solve",
        lambda x: ops.solve(x + 4 * ops.eye(3), ops.ones((3, 1)) + 0 * x[:, :, :1]),
        (3, 3),
        refused="MatrixSolve",
    ),
    _call("eigh", lambda x: ops.eigh(x + ops.transpose(x, (0, 2, 1))), (3, 3), refused="SelfAdjointEigV2"),
    _call("svd", lambda x: ops.svd(x, compute_uv=False), (3, 3), refused="Svd"),
    _call("qr", ops.qr, (3, 3), refused="Qr"),
    _call("erfinv", lambda x: ops.erfinv(ops.tanh(x)), (4,)),
    _call("gelu", ops.gelu, (4,)),
    _call("while_loop", lambda x: ops.fori_loop(0, 3, lambda _, carried: carried * 2, x), (4,)),
    _call("segment_sum", lambda x: ops.segment_sum(ops.transpose(x), np.array([0, 0, 1, 2]), num_segments=3), (4,)),
    _call("bincount", lambda x: ops.bincount(x, minlength=5), (4,), dtype="int32"),
    _call("extract_sequences", lambda x: ops.extract_sequences(x, 4, 2), (12,)),
    _call("meshgrid", lambda x: x + ops.meshgrid(ops.arange(4.0), ops.arange(3.0))[0], (3, 4)),
]
