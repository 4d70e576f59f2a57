"""What can go wrong in a conversion. Each text names the thing, what was expected, what came and what to do."""

import re

_ADDED = re.compile(r"\x1b\[[0-9;]*m|\{\{function_node [^}]*\}\}|\[Op:\w*\]|^\s*\(\d+\) [A-Z_]+:", re.MULTILINE)
"""What TensorFlow and Keras put around a message: colours, names that they made up, a status."""
_LAYER = re.compile(r"Exception encountered when calling (\w+)\.call\(\)\.\s*")
_NODE = re.compile(r"([^\n]*)\n\s*\[\[\{\{node ([^}]*)\}\}")
_SAID_CHARACTERS = 300


def said_by(error: Exception) -> str:
    """What a framework's error says in its first line: without the stack that TensorFlow begins with."""
    text = _LAYER.sub(r"\1: ", _ADDED.sub("", str(error)))
    if place := _NODE.search(text):
        text = f"{place[1].strip()} ({place[2]})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = (lines[0] if lines else type(error).__name__)[:_SAID_CHARACTERS]
    return said if said.endswith((".", "!", "?")) else f"{said}."


class ConversionError(Exception):
    """A model was not converted. No file was written."""


class InvalidSamplesError(ConversionError):
    """The given sample rows do not fit the model's inputs."""


class UnsupportedModelError(ConversionError):
    """ONNX, or this converter, cannot say what the model does."""


class UnsafeFileError(ConversionError):
    """A model file breaks a rule for files of unknown origin. `rule` is its short name: `absolute-name`, `no-code`."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{message} (rule: {rule})")
        self.rule = rule


class GateError(ConversionError):
    """The converted graph is not what was asked for.

    Where answers differ, `output` names the output, `row` is the index of the worst row within its batch, and
    `difference` is the largest absolute difference found there (infinite or NaN where one of the two answers is).
    Otherwise they are None.
    """

    def __init__(
        self, message: str, *, output: str | None = None, row: int | None = None, difference: float | None = None
    ) -> None:
        super().__init__(message)
        self.output = output
        self.row = row
        self.difference = difference
