from pathlib import Path

import pytest

from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
pytest.importorskip("keras")

from tests.conformance.keras.case import Case  # noqa: E402 TensorFlow must find its settings
from tests.conformance.keras.checks import check  # noqa: E402
from tests.conformance.keras.datatypes import CASES  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converts_or_says_why_not(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
