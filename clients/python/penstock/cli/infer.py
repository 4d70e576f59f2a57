"""`penstock infer`."""

import json
from pathlib import Path

import click
import numpy as np

from penstock.cli.output import connected, json_option, print_json, print_table
from penstock.client import Client
from penstock.client.tensors import DTYPES, Array
from penstock.oip import inference_pb2 as pb


@click.command
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, metavar="[NAME=]VALUE...")
@click.option("--version", default="", help="A version's number.  [default: the deployed one]")
@click.option("--output", "outputs", multiple=True, help="Only this output; repeat it.")
@click.option("--timeout", "timeout_s", type=float, help="Seconds after which a request that still waits is never run.")
@json_option
@connected
def infer(
    client: Client,
    model: str,
    inputs: tuple[str, ...],
    version: str,
    outputs: tuple[str, ...],
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Ask the deployed MODEL for answers.

    Each VALUE is JSON, `[[5.1, 3.5, 1.4, 0.2]]`, or @FILE with a .json, .npy or .csv (numbers, no header). Give the
    input's NAME where the model has several. The first axis is the batch; one missing there is added.
    """
    client_inference = client.asynchronous.inference
    metadata = client.wait(client_inference.model_metadata(model, version))
    parsed = [_parse(text, metadata) for text in inputs]
    arrays = dict(parsed)
    if len(arrays) < len(parsed):
        raise click.BadParameter("an input is given twice", param_hint="VALUE")
    try:
        result = client.inference.infer(model, arrays, version, outputs, timeout_s)
    except (TypeError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="VALUE") from error
    if as_json:
        print_json(
            {"model": result.model, "version": result.version}
            | {"outputs": {name: _plain(array) for name, array in result.outputs.items()}}
        )
        return
    labels = _labels(client, model, result.version)
    for name, array in result.outputs.items():
        click.echo(f"{name} {list(array.shape)}, {result.model} version {result.version}")
        _print_rows(array, labels)


def _parse(text: str, metadata: pb.ModelMetadataResponse) -> tuple[str, Array]:
    tensors = {tensor.name: tensor for tensor in metadata.inputs}
    name, equals, value = text.partition("=")
    if not equals or name not in tensors:
        if len(tensors) > 1:
            raise click.BadParameter(
                f"{text[:40]!r}: begin with one of {', '.join(f'{known}=' for known in tensors)}", param_hint="VALUE"
            )
        name, value = next(iter(tensors)), text
    tensor = tensors[name]
    dtype = DTYPES.get(tensor.datatype, np.dtype(object))
    try:
        array = np.asarray(_load(value), dtype)
    except (OSError, ValueError, TypeError) as error:
        raise click.BadParameter(
            f"input {name!r} is no {tensor.datatype} tensor: {error}", param_hint="VALUE"
        ) from error
    return name, array[np.newaxis] if array.ndim == len(tensor.shape) - 1 else array


def _load(value: str) -> object:
    if not value.startswith("@"):
        return json.loads(value)
    path = Path(value[1:])
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".csv":
        return np.loadtxt(path, delimiter=",", ndmin=2)
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(array: Array) -> object:
    """An array as JSON has it; bytes as text where they are text."""
    values = array.tolist()

    def text(value: object) -> object:
        if isinstance(value, list):
            return [text(item) for item in value]
        return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value

    return text(values)


def _labels(client: Client, model: str, version: str) -> list[str]:
    """The class names of a version; none where no registry says them."""
    from penstock.client import PenstockError

    try:
        return list(client.models.get_version(model, int(version)).labels)
    except (PenstockError, ValueError):
        return []


def _print_rows(array: Array, labels: list[str]) -> None:
    classes = array.ndim == 2 and len(labels) == array.shape[1]
    if not classes:
        click.echo(np.array2string(array, precision=6, threshold=200))
        return
    best = np.argsort(-array.astype(np.float64), axis=1)[:, :3]
    rows = [
        (row, labels[order[0]], "  ".join(f"{labels[index]} {float(array[row, index]):.4f}" for index in order))
        for row, order in enumerate(best)
    ]
    print_table(("ROW", "CLASS", "LARGEST"), rows, "No rows.")
