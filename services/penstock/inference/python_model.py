"""Models written in Python: the operator's `model.py`, loaded fresh, and an engine for each instance of its class.

The file is code, and runs with all the rights of this server. It comes from the operator's own folder and nowhere else.
"""

import importlib.machinery
import importlib.util
import itertools
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from google.protobuf.message import Message

from penstock.inference.engine import Stop
from penstock.inference.inference import Parameter
from penstock.inference.model_config import instance_count
from penstock.inference.opening import ModelFiles
from penstock.inference.signature import Signature, Tensor
from penstock.inference.tensors import BYTES, Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import PenstockError, WrongStateError

_log = structlog.get_logger("penstock.inference.python")

_CLASS = "Model"
_numbers = itertools.count(1)
_NO_PARAMETERS: Mapping[str, Parameter] = {}


class _FreshLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source each time: kept bytecode is told from a newer file by nothing finer than seconds."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        code: types.CodeType = self.source_to_code(self.get_data(path), path)
        return code


class _Module:
    """A loaded file under a name of its own, in `sys.modules` until the last instance of its class is closed."""

    def __init__(self, title: str, path: Path) -> None:
        self._name = f"_penstock_python_model_{next(_numbers)}"
        self._users = 0
        self._lock = threading.Lock()
        loader = _FreshLoader(self._name, str(path))
        # A package, so that `from .helper import …` finds the files beside it, and nobody else's.
        spec = importlib.util.spec_from_file_location(
            self._name, path, loader=loader, submodule_search_locations=[str(path.parent)]
        )
        if spec is None:
            raise WrongStateError(f"{title}: {path.name} cannot be loaded.")
        importlib.invalidate_caches()
        module = importlib.util.module_from_spec(spec)
        sys.modules[self._name] = module
        try:
            loader.exec_module(module)
        except BaseException as error:
            self._forget()
            raise _failed(title, f"{path.name} could not be loaded", error, WrongStateError) from error
        self.model_class: Any = getattr(module, _CLASS, None)
        if not isinstance(self.model_class, type) or not callable(getattr(self.model_class, "infer", None)):
            self._forget()
            raise WrongStateError(f"{title}: expected {path.name} to define class {_CLASS} with a method infer.")

    def use(self) -> None:
        with self._lock:
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._forget()

    def _forget(self) -> None:
        for name in [name for name in sys.modules if name == self._name or name.startswith(f"{self._name}.")]:
            del sys.modules[name]


class _NoStop:
    """Nothing ends Python code that does not end by itself."""

    def stop(self) -> None:
        pass


class PythonEngine:
    """An `Engine` over one object of the class `Model`. Called from one thread at a time."""

    def __init__(self, title: str, model: Any, module: _Module, signature: Signature, *, decoupled: bool) -> None:  # noqa: ANN401  # the operator's class
        self.decoupled = decoupled
        self._title = title
        self._model = model
        self._module = module
        self._signature = signature
        module.use()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        """The one answer to inputs of one or of many requests, whose parameters it is not told."""
        return self.answer(inputs, outputs, _NO_PARAMETERS)

    def answer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Parameter]
    ) -> list[Array]:
        """The one answer of a model that is not decoupled.

        Raises `PenstockError` that names the model if it raises, or gives what it has not declared.
        """
        return self._checked(self._infer(inputs, parameters), inputs, outputs)

    def answers(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Parameter]
    ) -> Iterator[list[Array]]:
        """The answers of a decoupled model, each computed when it is asked for. Raises as `answer`.

        A generator: closing it closes the model's.
        """
        given = self._infer(inputs, parameters)
        if isinstance(given, Mapping) or not hasattr(given, "__iter__"):
            raise PenstockError(
                f"{self._title}: expected infer of a decoupled model to yield answers; got {type(given).__name__}."
            )
        iterator = iter(given)
        try:
            while True:
                try:
                    one = next(iterator)
                except StopIteration:
                    return
                except BaseException as error:
                    raise _failed(self._title, "infer", error) from error
                yield self._checked(one, inputs, outputs)
        finally:
            self._end(iterator)

    def stopper(self) -> Stop:
        return _NoStop()

    def close(self) -> None:
        model, self._model = self._model, None
        try:
            if callable(close := getattr(model, "close", None)):
                close()
        except BaseException:
            _log.exception("the model's close failed", version=self._title)
        finally:
            self._module.release()

    def _infer(self, inputs: Mapping[str, Array], parameters: Mapping[str, Parameter]) -> Any:  # noqa: ANN401  # whatever it returns
        try:
            return self._model.infer(dict(inputs), dict(parameters))
        # SystemExit, too, must end this request and not the server.
        except BaseException as error:
            raise _failed(self._title, "infer", error) from error

    def _end(self, iterator: Any) -> None:  # noqa: ANN401  # whatever iterates
        try:
            if callable(close := getattr(iterator, "close", None)):
                close()
        except BaseException:
            _log.exception("closing the model's generator failed", version=self._title)

    def _checked(self, given: Any, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:  # noqa: ANN401  # whatever it gave
        if not isinstance(given, Mapping):
            hint = " Set model_transaction_policy { decoupled: true }." if isinstance(given, Iterator) else ""
            raise PenstockError(
                f"{self._title}: expected infer to give a dict of arrays; got {type(given).__name__}.{hint}"
            )
        declared = self._signature.outputs
        if unknown := [name for name in given if name not in declared and name not in outputs]:
            raise PenstockError(f"{self._title} gave output {unknown[0]!r}; it declares {', '.join(declared)}.")
        if missing := [name for name in outputs if name not in given]:
            raise PenstockError(f"{self._title} did not give output {missing[0]!r}.")
        rows = len(next(iter(inputs.values()))) if self._signature.batched and inputs else None
        return [self._array(name, given[name], rows) for name in outputs]

    def _array(self, name: str, array: Any, rows: int | None) -> Array:  # noqa: ANN401  # whatever it gave
        """The model's array, copied: it may be the model's own buffer, or its input."""
        if not isinstance(array, np.ndarray):
            raise PenstockError(
                f"{self._title}: expected a numpy array as output {name!r}; got {type(array).__name__}."
            )
        tensor = self._signature.outputs.get(name)
        if tensor is None:
            # A state of a sequence, which is checked where it is kept.
            return np.array(array, order="C")
        is_text = tensor.datatype is BYTES and array.dtype.kind in "OUS"
        if not (is_text or array.dtype == tensor.datatype.dtype) or not _fits(tensor, array.shape, rows):
            of_rows = "" if rows is None else f" for {rows} rows"
            raise PenstockError(
                f"{self._title}: expected output '{tensor}'{of_rows}; got {array.dtype} {list(array.shape)}."
            )
        return self._texts(name, array) if is_text else np.array(array, order="C")

    def _texts(self, name: str, array: Array) -> Array:
        texts = np.empty(array.size, object)
        for index, element in enumerate(array.ravel().tolist()):
            texts[index] = _text(element) if isinstance(element, bytes) else element
            if not isinstance(element, str | bytes):
                raise PenstockError(
                    f"{self._title}: expected str or bytes in output {name!r}; got {type(element).__name__}."
                )
        return texts.reshape(array.shape)


def open_python_model(
    files: ModelFiles, config: ModelConfig, signature: Signature, *, trusted: bool
) -> list[PythonEngine]:
    """An engine for each instance that the complete configuration asks for. Blocks: runs the operator's code.

    `trusted`: the folder is the operator's own. Raises `WrongStateError` if it is not, and if the file is missing,
    raises, or has no class `Model` that can be made.
    """
    if not trusted:
        raise WrongStateError(f"{files.title} is Python code, which runs only from this server's own model repository.")
    module = _Module(files.title, files.path())
    engines: list[PythonEngine] = []
    try:
        for _ in range(instance_count(config)):
            try:
                model = module.model_class(plain(config))
            except BaseException as error:
                raise _failed(files.title, f"{_CLASS}(config)", error, WrongStateError) from error
            decoupled = config.model_transaction_policy.decoupled
            engines.append(PythonEngine(files.title, model, module, signature, decoupled=decoupled))
    except BaseException:
        module.use()
        for engine in engines:
            engine.close()
        module.release()
        raise
    return engines


def plain(message: Message) -> dict[str, Any]:
    """A message as a dict of all its fields, by the names of config.pbtxt: numbers are numbers, enums are names."""
    fields: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of_messages = field.message_type.fields_by_name["value"].message_type is not None
            fields[field.name] = {key: plain(one) if of_messages else one for key, one in value.items()}
            continue
        many = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        values = list(value) if many else [value]
        if field.message_type is not None:
            values = [plain(one) for one in values]
        elif field.enum_type is not None:
            values = [field.enum_type.values_by_number[one].name for one in values]
        fields[field.name] = values if many else values[0]
    return fields


def _text(element: bytes) -> str | bytes:
    """As a client's elements come: text where they are."""
    try:
        return element.decode()
    except UnicodeDecodeError:
        return element


def _fits(tensor: Tensor, shape: Sequence[int], rows: int | None) -> bool:
    if len(shape) != len(tensor.shape) or (rows is not None and shape[:1] != (rows,)):
        return False
    return all(isinstance(axis, str) or axis == size for axis, size in zip(tensor.shape, shape, strict=True))


def _failed(title: str, what: str, error: BaseException, kind: type[PenstockError] = PenstockError) -> PenstockError:
    """What strangers may know of an error in the operator's code; the log has all of it."""
    _log.error("the model's code failed", version=title, doing=what, exc_info=error)
    return kind(f"{title}: {what} raised {type(error).__name__}: {' '.join(str(error).split())[:500]}")
