"""The process in which `sandbox.ask` has a foreign file read. It speaks frames over standard input and output."""

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, get_type_hints

from penstock.converters.limits import OUT_OF_MEMORY, Limits, confine

# By module, because what one needs takes others seconds to load.
_TASKS = {
    "convert": ("conversion", "convert_here"),
    "verify": ("conversion", "verify_here"),
    "inspect": ("onnx_inspection", "inspect_here"),
}


def main() -> None:
    confine(Limits(**json.loads(sys.argv[1])))
    from penstock.converters.codec import decode, encode, encode_error  # noqa: PLC0415 after `confine`
    from penstock.converters.errors import ConversionError  # noqa: PLC0415 after `confine`
    from penstock.converters.tensor_frames import read_frame, write_frame  # noqa: PLC0415 loads NumPy

    # What libraries print must not come between frames.
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request, samples = read_frame(sys.stdin.buffer)

    def say(head: dict[str, Any]) -> None:
        write_frame(frames, head, {})

    try:
        task = _task(request["task"])
        hints = get_type_hints(task)
        arguments = {name: decode(hints[name], value) for name, value in request["arguments"].items()}
        if request["has_samples"]:
            arguments["samples"] = samples
        if request["has_steps"]:
            arguments["on_step"] = lambda step: say({"step": step})
        answer = {"answer": encode(task(**arguments))}
    except Exception as error:  # whatever a model or a library raises
        if rule := _exceeded(error):
            answer = {"exceeded": rule}
        elif isinstance(error, ConversionError):
            answer = {"error": encode_error(error)}
        else:
            unexpected = ConversionError(
                f"Something failed that should not: {type(error).__name__}: {error}. Please report it with the model."
            )
            unexpected.add_note(traceback.format_exc())
            answer = {"error": encode_error(unexpected)}
    say(answer)
    # Libraries take their time to end in an orderly way, and nothing is left to be put in order.
    os._exit(0)


def _task(name: str) -> Callable[..., Any]:
    module, function = _TASKS[name]
    found: Callable[..., Any] = getattr(import_module(f"penstock.converters.{module}"), function)
    return found


def _exceeded(error: BaseException) -> str | None:
    """The limit that an error comes from, if one."""
    return next((rule for cause in _causes(error) if (rule := _rule(cause))), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _rule(error: BaseException) -> str | None:
    from penstock.converters.runtime import RuntimeDeathError  # noqa: PLC0415 loads NumPy

    if isinstance(error, RuntimeDeathError) and error.rule:
        return error.rule
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "file-size"
    is_memory = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error).encode(errors="replace"))
    return "memory" if is_memory else None


if __name__ == "__main__":
    main()
