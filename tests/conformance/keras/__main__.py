"""Writes the table of coverage: `make coverage`."""

from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()

from tests.conformance.keras.coverage import DOCUMENT, document  # noqa: E402 TensorFlow must find its settings

DOCUMENT.write_text(document(), encoding="utf-8")
