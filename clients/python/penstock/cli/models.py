"""`penstock models`."""

from pathlib import Path

import click

from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.signature_pb2 import TensorSpec
from penstock.cli.output import (
    connected,
    json_option,
    print_fields,
    print_json,
    print_message,
    print_messages,
    print_table,
    size_text,
    when,
)
from penstock.cli.progress import transferring
from penstock.client import Client


@click.group
def models() -> None:
    """Show and import models and versions; move aliases."""


@models.command("list")
@json_option
@connected
def list_models(client: Client, as_json: bool) -> None:
    """List all models."""
    found = client.models.list()
    if as_json:
        print_messages(found)
        return
    rows = [(model.name, model.latest_version or "", model.description, when(model.create_time)) for model in found]
    print_table(
        ("NAME", "LATEST", "DESCRIPTION", "CREATED (UTC)"),
        rows,
        "There are no models. Train one with `penstock jobs create mlp`, or import one with `penstock models import`.",
    )


@models.command
@click.argument("model")
@json_option
@connected
def versions(client: Client, model: str, as_json: bool) -> None:
    """List the versions of MODEL, newest first."""
    found = client.models.list_versions(model)
    if as_json:
        print_messages(found)
        return
    aliases: dict[int, list[str]] = {}
    for alias in client.models.list_aliases(model):
        aliases.setdefault(alias.version, []).append(alias.name)
    rows = [
        (
            version.number,
            ", ".join(aliases.get(version.number, [])),
            _metrics(version),
            version.provenance.job_id,
            when(version.create_time),
        )
        for version in found
    ]
    print_table(("VERSION", "ALIASES", "METRICS", "JOB", "CREATED (UTC)"), rows, f"Model {model} has no versions.")


@models.command
@click.argument("model")
@click.option("--version", "number", type=click.IntRange(min=1), help="A version's number.")
@click.option("--alias", help="An alias that stands for the version.")
@json_option
@connected
def get(client: Client, model: str, number: int | None, alias: str | None, as_json: bool) -> None:
    """Show a version of MODEL: the newest one, or the one that --version or --alias names."""
    _show(client.models.get_version(model, number, alias), as_json)


@models.command("import")
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--alias", help="An alias to set to the new version.")
@click.option("--description", default="", help="For people.")
@json_option
@connected
def import_version(client: Client, model: str, file: Path, alias: str | None, description: str, as_json: bool) -> None:
    """Register FILE, an .onnx made elsewhere, as a new version of MODEL.

    Its signature is read from the graph. It carries no parity report: there is nothing to compare it with here.
    """
    from penstock.converters import ConversionError, read_signature
    from penstock.training.messages import signature_message

    try:
        signature = signature_message(read_signature(file))
    except ConversionError as error:
        raise click.ClickException(str(error)) from error
    wanted = Version(model=model, signature=signature, description=description)
    with transferring("Uploading", file.stat().st_size) as progress:
        if model not in {known.name for known in client.models.list()}:
            client.models.create(model)
        version = client.models.create_version(wanted, {"model.onnx": file}, progress=progress)
        if alias:
            client.models.set_alias(model, alias, version.number, f"import of {file.name}")
    _show(version, as_json)


@models.command
@click.argument("model")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--version", "number", type=click.IntRange(min=1), help="A version's number.")
@click.option("--alias", help="An alias that stands for the version.")
@json_option
@connected
def download(client: Client, model: str, folder: Path, number: int | None, alias: str | None, as_json: bool) -> None:
    """Fetch the files of a version of MODEL into FOLDER; each is checked against its digest."""
    version = client.models.get_version(model, number, alias)
    folder.mkdir(parents=True, exist_ok=True)
    with transferring("Fetching", sum(blob.size_bytes for blob in version.files.values())) as progress:
        try:
            client.models.download(version, folder, progress)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        print_json({name: str(folder / name) for name in sorted(version.files)})
    else:
        click.echo(f"{model} version {version.number} is in {folder}: {', '.join(sorted(version.files))}")


@models.command
@click.argument("model")
@click.argument("alias")
@click.argument("version", type=click.IntRange(min=1))
@click.option("--reason", default="", help="Kept in the alias's history.")
@json_option
@connected
def alias(client: Client, model: str, alias: str, version: int, reason: str, as_json: bool) -> None:
    """Point ALIAS of MODEL at VERSION. Deployments of the alias follow at once."""
    moved = client.models.set_alias(model, alias, version, reason)
    if as_json:
        print_message(moved)
    else:
        click.echo(f"{model}: {alias} is version {moved.version}.")


@models.command
@click.argument("model")
@click.argument("alias")
@json_option
@connected
def history(client: Client, model: str, alias: str, as_json: bool) -> None:
    """List where ALIAS of MODEL has pointed, newest move first."""
    moves = client.models.list_alias_moves(model, alias)
    if as_json:
        print_messages(moves)
        return
    rows = [(when(move.time), move.from_version or "–", move.to_version or "deleted", move.reason) for move in moves]
    print_table(("WHEN (UTC)", "FROM", "TO", "REASON"), rows, f"{alias} has never moved.")


@models.command
@click.argument("model")
@click.option("--version", "number", type=click.IntRange(min=1), help="Only this version.  [default: the whole model]")
@click.option("--alias", help="Only this alias; the version it stands for stays.")
@json_option
@connected
def delete(client: Client, model: str, number: int | None, alias: str | None, as_json: bool) -> None:
    """Delete MODEL with all its versions and aliases, or only one of them. What is deployed cannot be deleted."""
    if alias:
        client.models.delete_alias(model, alias)
        what = f"alias {alias} of {model}"
    elif number:
        client.models.delete_version(model, number)
        what = f"version {number} of {model}"
    else:
        client.models.delete(model)
        what = f"model {model}"
    if as_json:
        print_json({})
    else:
        click.echo(f"Deleted {what}.")


def _show(version: Version, as_json: bool) -> None:
    if as_json:
        print_message(version)
        return
    parity = f"largest difference {version.parity.max_absolute_error:.2g}, by {version.parity.source}"
    print_fields(
        [
            ("model", version.model),
            ("version", version.number),
            ("description", version.description),
            ("inputs", "  ".join(map(_tensor, version.signature.inputs))),
            ("outputs", "  ".join(map(_tensor, version.signature.outputs))),
            ("labels", ", ".join(version.labels)),
            ("metrics", _metrics(version)),
            ("parity", parity if version.HasField("parity") else "not converted here"),
            ("job", version.provenance.job_id),
            ("dataset", version.provenance.dataset),
            (
                "files",
                "  ".join(f"{name} ({size_text(blob.size_bytes)})" for name, blob in sorted(version.files.items())),
            ),
            ("bundle", version.bundle_digest),
            ("created", when(version.create_time)),
        ]
    )


def _tensor(spec: TensorSpec) -> str:
    shape = ", ".join(axis.name or str(axis.size) for axis in spec.shape)
    return f"{spec.name} {spec.datatype} [{shape}]"


def _metrics(version: Version) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in sorted(version.metrics.items()))
