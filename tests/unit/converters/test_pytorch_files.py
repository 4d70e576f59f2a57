"""Files of PyTorch are refused unread, with or without torch."""

from pathlib import Path

import pytest

from penstock.converters import ConversionError, UnsafeFileError, UnsupportedModelError, convert


@pytest.mark.parametrize("name", ["m.pt2", "m.pt", "m.PTH", "m.bin", "m.ckpt"])
def test_what_may_hold_a_pickle_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError, match=r"pickle.*live module.*torch\.onnx\.export") as caught:
        convert(tmp_path / name, tmp_path / "out.onnx")
    assert caught.value.rule == "no-pickle"
    assert name in str(caught.value)


def test_weights_alone_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"weights alone.*samples="):
        convert(tmp_path / "m.safetensors", tmp_path / "out.onnx")


def test_who_has_no_torch_is_told_of_the_extra(tmp_path: Path) -> None:
    """A class of torch stands here for a module: where there is one, torch is, but perhaps no onnxscript."""
    kind = type("Module", (), {"__module__": "torch.nn.modules.module"})
    with pytest.raises(ConversionError, match=r"penstock\[pytorch\]|torch\.nn\.Module"):
        convert(kind(), tmp_path / "out.onnx")
