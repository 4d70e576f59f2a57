"""Modules of PyTorch, and the signature that is expected of each. Skipped where torch is not installed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from penstock.converters import (
    GateError,
    InvalidSamplesError,
    UnsupportedModelError,
    convert,
    verify,
)

torch = pytest.importorskip("torch", reason="needs the extra `pytorch`, which no lock file installs")
pytest.importorskip("onnxscript", reason="needs the extra `pytorch`, which no lock file installs")
from torch import nn  # noqa: E402 there is no torch before it is asked for

torch.manual_seed(0)
RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((3, 6))
STEPS = RANDOM.standard_normal((3, 9, 8))
IMAGES = RANDOM.standard_normal((2, 3, 20, 24))
IDS = RANDOM.integers(1, 50, (3, 9))
MASK = np.arange(9) < np.array([[9], [4], [1]])


class Reader(nn.Module):
    """What an embedding and a recurrent layer make of words."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.steps = kind(8, 6, batch_first=True, **options)

    def forward(self, ids: Any) -> Any:
        steps, last = self.steps(self.words(ids))
        return steps, last


class Encoder(nn.Module):
    """Words and their mask, like BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.positions = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Any, mask: Any = None) -> dict[str, Any]:
        rows = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        hidden = self.layers(rows, src_key_padding_mask=None if mask is None else ~mask)
        return {"logits": self.head(hidden[:, 0]), "hidden": hidden, "loss": None}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, rows: Any, mask: Any) -> Any:
        causal = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).triu(1)
        return self.attention(rows, rows, rows, key_padding_mask=~mask, attn_mask=causal, need_weights=False)[0]


class Pixels(nn.Module):
    """A U-Net of one step, which takes even heights and widths alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 3, 2, 2)

    def forward(self, image: Any) -> Any:
        return torch.cat([image, self.up(self.down(image))], 1)


class Both(nn.Module):
    """The second parameter of two may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, left: Any, right: Any, scale: Any = None) -> Any:
        total = self.left(left) + self.right(right)
        return total if scale is None else total * scale


class Pair(NamedTuple):
    mean: Any
    best: Any


@dataclass
class Spread:
    low: Any
    high: Any
    unset: Any = None


torch.export.register_dataclass(Spread)


class Gives(nn.Module):
    """Whatever a function makes of `x`."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Any) -> Any:
        return self.answer(x)


def cnn() -> nn.Module:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    module(torch.randn(16, 3, 8, 8))  # gives the normalization something to remember
    return module


MLP = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(16), nn.Linear(16, 3))

CASES: dict[str, tuple[nn.Module, dict[str, Any], list[str], list[str]]] = {
    "mlp": (MLP, {"input": ROWS}, ["input FP32 [batch, 6]"], ["output FP32 [batch, 3]"]),
    "half": (
        nn.Sequential(nn.Linear(6, 4), nn.Tanh()).half(),
        {"input": ROWS},
        ["input FP16 [batch, 6]"],
        ["output FP16 [batch, 4]"],
    ),
    "double": (nn.Linear(6, 4).double(), {"input": ROWS}, ["input FP64 [batch, 6]"], ["output FP64 [batch, 4]"]),
    "cnn": (cnn(), {"input": IMAGES}, ["input FP32 [batch, 3, height, width]"], ["output FP32 [batch, 5]"]),
    "u-net": (Pixels(), {"image": IMAGES}, ["image FP32 [batch, 3, 20, 24]"], ["output FP32 [batch, 6, 20, 24]"]),
    "lstm": (
        Reader(nn.LSTM, num_layers=2, bidirectional=True),
        {"ids": IDS},
        ["ids INT64 [batch, 9]"],
        [
            "output_0 FP32 [batch, 9, 12]",
            "output_1_0 FP32 [4, batch, 6]",
            "output_1_1 FP32 [4, batch, 6]",
        ],
    ),
    "gru": (
        Reader(nn.GRU),
        {"ids": IDS.astype(np.int32)},
        ["ids INT32 [batch, 9]"],
        ["output_0 FP32 [batch, 9, 6]", "output_1 FP32 [1, batch, 6]"],
    ),
    "layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        {"src": STEPS},
        ["src FP32 [batch, sequence, 8]"],
        ["output FP32 [batch, sequence, 8]"],
    ),
    "encoder": (
        Encoder(),
        {"ids": IDS},
        ["ids INT64 [batch, sequence]"],
        ["logits FP32 [batch, 3]", "hidden FP32 [batch, sequence, 16]"],
    ),
    "masked encoder": (
        Encoder(),
        {"mask": MASK, "ids": IDS},
        ["ids INT64 [batch, sequence]", "mask BOOL [batch, sequence]"],
        ["logits FP32 [batch, 3]", "hidden FP32 [batch, sequence, 16]"],
    ),
    "attention": (
        Attention(),
        {"rows": STEPS, "mask": MASK},
        ["rows FP32 [batch, sequence, 8]", "mask BOOL [batch, sequence]"],
        ["output FP32 [batch, sequence, 8]"],
    ),
    "two inputs": (
        Both(),
        {"right": ROWS[:, :3], "left": ROWS},
        ["left FP32 [batch, 6]", "right FP32 [batch, 3]"],
        ["output FP32 [batch, 4]"],
    ),
    "left-out input": (
        Both(),
        {"left": ROWS, "right": ROWS[:, :3], "scale": ROWS[:, :1]},
        ["left FP32 [batch, 6]", "right FP32 [batch, 3]", "scale FP32 [batch, 1]"],
        ["output FP32 [batch, 4]"],
    ),
    "named tuple": (
        Gives(lambda x: Pair(mean=x.mean(-1), best=x.softmax(-1).argmax(-1))),
        {"x": ROWS},
        ["x FP32 [batch, sequence]"],
        ["mean FP32 [batch]", "best INT64 [batch]"],
    ),
    "dataclass": (
        Gives(lambda x: Spread(low=x.amin(-1), high=x.amax(-1))),
        {"x": ROWS},
        ["x FP32 [batch, sequence]"],
        ["low FP32 [batch]", "high FP32 [batch]"],
    ),
    "nested": (
        Gives(lambda x: {"b": [x + 1, x * 2], "a": {"c": x - 1}}),
        {"x": ROWS},
        ["x FP32 [batch, sequence]"],
        ["b_0 FP32 [batch, sequence]", "b_1 FP32 [batch, sequence]", "a_c FP32 [batch, sequence]"],
    ),
    "the input": (
        Gives(lambda x: {"x": x, "twice": x * 2}),
        {"x": ROWS},
        ["x FP32 [batch, sequence]"],
        ["x_1 FP32 [batch, sequence]", "twice FP32 [batch, sequence]"],
    ),
}


@pytest.mark.parametrize(("module", "samples", "taken", "given"), CASES.values(), ids=CASES)
def test_converts(
    module: nn.Module, samples: dict[str, Any], taken: list[str], given: list[str], tmp_path: Path
) -> None:
    conversion = convert(module, tmp_path / "model.onnx", samples=samples)
    assert [str(spec) for spec in conversion.signature.inputs] == taken
    assert [str(spec) for spec in conversion.signature.outputs] == given
    asked = {(case.rows, case.batch_size) for case in conversion.parity.cases}
    assert asked >= {("random", size) for size in (1, 2, 7, 32)} | {("sample", len(next(iter(samples.values()))))}
    assert conversion.parity.source == f"torch {torch.__version__}"


@pytest.mark.parametrize("case", ["mlp", "attention"])
def test_converting_twice_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    module, samples, _, _ = CASES[case]
    for name in ("one.onnx", "other.onnx"):
        convert(module, tmp_path / name, samples=samples)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_every_part_has_its_mode_back(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    module[1].eval()  # a normalization that somebody froze
    seen = module[1].num_batches_tracked.clone()
    convert(module, tmp_path / "model.onnx", samples={"input": ROWS})
    assert [part.training for part in module.modules()] == [True, True, False, True, True]
    assert module[1].num_batches_tracked == seen
    assert {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node} <= {"Gemm", "BatchNormalization"}
    with pytest.raises(InvalidSamplesError):
        convert(module, tmp_path / "model.onnx", samples={"input": ROWS, "mask": ROWS})
    assert [part.training for part in module.modules()] == [True, True, False, True, True]


def test_integers_are_those_of_the_samples(tmp_path: Path) -> None:
    """An embedding of three rows would fail on any other."""
    few = Gives(nn.Embedding(3, 4))
    conversion = convert(few, tmp_path / "model.onnx", samples={"x": np.array([[0, 2, 1]])})
    assert [str(spec) for spec in conversion.signature.inputs] == ["x INT64 [batch, sequence]"]


def test_a_query_that_may_look_at_nothing_is_answered_as_in_torch(tmp_path: Path) -> None:
    samples = {"rows": STEPS, "mask": np.zeros((3, 9), bool)}
    convert(Attention(), tmp_path / "model.onnx", samples=samples)


def test_grouped_queries_and_scale(tmp_path: Path) -> None:
    def attention(x: Any) -> Any:
        query, key = x.unflatten(-1, (4, 2)).transpose(1, 2), x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(
            query, key, key, is_causal=True, scale=0.3, enable_gqa=True
        ).mean((1, 3))

    conversion = convert(Gives(attention), tmp_path / "model.onnx", samples={"x": STEPS})
    assert [str(spec) for spec in conversion.signature.outputs] == ["output FP32 [batch, sequence]"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch.compile loads it
def test_a_compiled_module_is_the_module_it_wraps(tmp_path: Path) -> None:
    conversion = convert(torch.compile(MLP), tmp_path / "model.onnx", samples={"input": ROWS})
    assert [str(spec) for spec in conversion.signature.inputs] == ["input FP32 [batch, 6]"]


def test_another_opset(tmp_path: Path) -> None:
    assert convert(MLP, tmp_path / "model.onnx", samples={"input": ROWS}, opset=20).opset == 20


def test_a_graph_is_verified_against_the_module(tmp_path: Path) -> None:
    convert(MLP, tmp_path / "model.onnx", samples={"input": ROWS})
    other = nn.Sequential(*[nn.Linear(6, 3)])
    assert verify(tmp_path / "model.onnx", MLP, samples={"input": ROWS}).row_count > 42
    with pytest.raises(GateError, match="'output' differs"):
        verify(tmp_path / "model.onnx", other, samples={"input": ROWS})


def program(module: nn.Module, *rows: Any, **axes: Any) -> Any:
    with torch.no_grad():
        return torch.export.export(module.eval(), rows, dynamic_shapes=axes or None)


def test_a_program_has_the_axes_it_was_exported_with(tmp_path: Path) -> None:
    exported = program(
        Encoder(),
        torch.tensor(IDS),
        torch.tensor(MASK),
        ids={0: torch.export.Dim("rows"), 1: torch.export.Dim("words", max=60)},
        mask={0: torch.export.Dim("rows"), 1: torch.export.Dim("words", max=60)},
    )
    conversion = convert(exported, tmp_path / "model.onnx")
    assert list(map(str, conversion.signature.inputs)) == ["ids INT64 [batch, sequence]", "mask BOOL [batch, sequence]"]
    assert list(map(str, conversion.signature.outputs)) == [
        "logits FP32 [batch, 3]",
        "hidden FP32 [batch, sequence, 16]",
    ]
    fixed = convert(program(MLP, torch.randn(4, 6)), tmp_path / "model.onnx", samples={"input": RANDOM.random((4, 6))})
    assert list(map(str, fixed.signature.inputs)) == ["input FP32 [4, 6]"]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        self.seen += len(x)
        return x / self.seen


REFUSED: dict[str, tuple[Any, dict[str, Any] | None, type[Exception], str]] = {
    "no samples": (MLP, None, InvalidSamplesError, r"say what it takes.*samples.*\['input'\]"),
    "other names": (MLP, {"x": ROWS}, InvalidSamplesError, r"parameters of forward, \['input'\].*Got \['x'\]"),
    "one of two": (Both(), {"left": ROWS}, InvalidSamplesError, r"\['left', 'right'\] must be given"),
    "no rows": (MLP, {"input": ROWS[:0]}, InvalidSamplesError, r"at least one row of numbers; got float64 \[0, 6\]"),
    "a number": (MLP, {"input": 3.0}, InvalidSamplesError, "at least one row"),
    "texts": (MLP, {"input": np.array([["a"] * 6])}, InvalidSamplesError, "rows of numbers|row of numbers"),
    "too wide": (MLP, {"input": ROWS[:, :5]}, UnsupportedModelError, "itself fails on the samples: mat1 and mat2"),
    "control flow": (
        Gives(lambda x: x if x.sum() > 0 else -x),
        {"x": ROWS},
        UnsupportedModelError,
        r"cannot follow forward: Could not guard on data-dependent.*test_pytorch_conversion.py, line \d+.*torch.where",
    ),
    "fixed rows": (
        Gives(lambda x: x.reshape(3, 6) * 2),
        {"x": ROWS},
        UnsupportedModelError,
        "fails on 5 rows.*must be the batch",
    ),
    "rows of one number": (
        Gives(lambda x: x.reshape(5, -1) if len(x) == 5 else x),
        {"x": ROWS},
        UnsupportedModelError,
        "fixes the first axis of 'x', the batch, at 5",
    ),
    "no operator": (
        Gives(lambda x: torch.linalg.svd(x.reshape(-1, 2, 3))[1]),
        {"x": ROWS},
        UnsupportedModelError,
        "cannot say the module in ONNX: No ONNX function found.*linalg_svd",
    ),
    "state": (Counting(), {"x": ROWS}, UnsupportedModelError, "changes the buffer 'seen'"),
    "a number out": (Gives(lambda x: {"n": x.ndim}), {"x": ROWS}, UnsupportedModelError, "'n' is of type int"),
    "bfloat16": (
        nn.Linear(6, 3).bfloat16(),
        {"input": ROWS},
        UnsupportedModelError,
        r"'weight' of Linear is of type bfloat16.*\.float\(\)",
    ),
    "another device": (nn.Linear(6, 3, device="meta"), {"input": ROWS}, UnsupportedModelError, r"on meta.*\.cpu\(\)"),
    "a tensor": (torch.zeros(3), None, UnsupportedModelError, "not a Tensor"),
}


@pytest.mark.parametrize(("module", "samples", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_is_refused(
    module: Any, samples: dict[str, Any] | None, kind: type[Exception], message: str, tmp_path: Path, capfd: Any
) -> None:
    with pytest.raises(kind, match=message):
        convert(module, tmp_path / "model.onnx", samples=samples)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_script_is_refused(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        script = torch.jit.script(nn.Linear(6, 3))
    with pytest.raises(UnsupportedModelError, match="TorchScript"):
        convert(script, tmp_path / "model.onnx", samples={"input": ROWS})
