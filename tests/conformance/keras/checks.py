"""What every case of the table is put to: it converts and answers like Keras, or is refused with the words it names."""

from pathlib import Path

import keras
import pytest
from tests.conformance.keras.case import Case

from penstock.converters import Tolerance, UnsupportedModelError, convert


def check(case: Case, folder: Path) -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)
    model, path = case.build(), folder / "model.onnx"
    tolerance = None if case.tolerance is None else Tolerance(absolute=case.tolerance)
    if case.refused:
        with pytest.raises(UnsupportedModelError, match=case.refused):
            convert(model, path, samples=case.samples, tolerance=tolerance)
        assert not path.exists()
    else:
        assert convert(model, path, samples=case.samples, tolerance=tolerance).path == path
