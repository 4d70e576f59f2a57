"""What can go wrong in a conversion. Each text names the thing, what was expected, what came and what to do."""


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
