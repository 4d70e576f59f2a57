"""One model of every family of keras.applications, of small images. `make check-applications` runs all of them."""

from pathlib import Path

import pytest

from penstock.converters import convert
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")

# The smallest images that they take, or a little more.
DEFAULT = {"EfficientNetB0": 32, "MobileNetV3Small": 32}
SLOW = {
    "ConvNeXtTiny": 32,
    "DenseNet121": 32,
    "EfficientNetV2B0": 32,
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Large": 32,
    "NASNetMobile": 64,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "VGG16": 32,
    "VGG19": 32,
    "Xception": 71,
}


@pytest.mark.parametrize(
    ("name", "pixels"),
    [*DEFAULT.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())],
)
def test_an_architecture(name: str, pixels: int, tmp_path: Path) -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)
    model = getattr(keras.applications, name)(weights=None, input_shape=(pixels, pixels, 3), classes=10)
    assert convert(model, tmp_path / "model.onnx").parity.cases
