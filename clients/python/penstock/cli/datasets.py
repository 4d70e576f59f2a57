"""`penstock datasets`."""

from pathlib import Path

import click

from penstock.api.dataset.v1.dataset_pb2 import ColumnType, Dataset, DatasetFormat, SplitRecipe
from penstock.cli.output import (
    connected,
    enum_word,
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

FORMATS = {".csv": DatasetFormat.DATASET_FORMAT_CSV, ".jsonl": DatasetFormat.DATASET_FORMAT_JSON_LINES}


@click.group
def datasets() -> None:
    """Upload, show and delete rows to train on."""


@datasets.command
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--description", default="", help="For people.")
@click.option(
    "--split",
    type=(float, float, float),
    default=(0.7, 0.15, 0.15),
    show_default=True,
    metavar="TRAIN VALIDATION TEST",
    help="Shares of the rows for training, for watching it, and for the final measurement. They add up to 1.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, another split.")
@json_option
@connected
def create(
    client: Client,
    name: str,
    file: Path,
    description: str,
    split: tuple[float, float, float],
    seed: int,
    as_json: bool,
) -> None:
    """Upload FILE, a .csv with a header line or a .jsonl, as the dataset NAME.

    Column types are read off the rows. An upload that was cut off goes on where it stood when the command is repeated.
    """
    if file.suffix not in FORMATS:
        raise click.BadParameter(
            f"expected a name that ends in {' or '.join(FORMATS)}; got {file.name!r}", param_hint="FILE"
        )
    train, validation, test = split
    recipe = SplitRecipe(train=train, validation=validation, test=test, seed=seed)
    wanted = Dataset(name=name, description=description, format=FORMATS[file.suffix], split=recipe)
    with transferring("Uploading", file.stat().st_size) as progress:
        made = client.datasets.create(wanted, file, progress)
    _show(made, as_json)


@datasets.command("list")
@json_option
@connected
def list_datasets(client: Client, as_json: bool) -> None:
    """List all datasets."""
    found = client.datasets.list()
    if as_json:
        print_messages(found)
        return
    rows = [
        (
            item.name,
            f"{item.row_count:,}",
            len(item.columns),
            size_text(item.content.size_bytes),
            when(item.create_time),
        )
        for item in found
    ]
    print_table(
        ("NAME", "ROWS", "COLUMNS", "SIZE", "CREATED (UTC)"),
        rows,
        "There are no datasets. Upload one with `penstock datasets create NAME FILE`.",
    )


@datasets.command
@click.argument("name")
@json_option
@connected
def get(client: Client, name: str, as_json: bool) -> None:
    """Show the dataset NAME."""
    _show(client.datasets.get(name), as_json)


@datasets.command
@click.argument("name")
@json_option
@connected
def delete(client: Client, name: str, as_json: bool) -> None:
    """Delete the dataset NAME and its rows. Models trained on it stay."""
    client.datasets.delete(name)
    if as_json:
        print_json({})
    else:
        click.echo(f"Deleted dataset {name}.")


def _show(dataset: Dataset, as_json: bool) -> None:
    if as_json:
        print_message(dataset)
        return
    counts = dataset.split_counts
    columns = [f"{column.name} ({enum_word(ColumnType.DESCRIPTOR, column.type)})" for column in dataset.columns]
    shown = columns if len(columns) <= 8 else [*columns[:4], f"… {len(columns) - 5} more …", columns[-1]]
    print_fields(
        [
            ("name", dataset.name),
            ("description", dataset.description),
            ("rows", f"{dataset.row_count:,}"),
            ("split", f"{counts.train:,} train, {counts.validation:,} validation, {counts.test:,} test"),
            ("columns", ", ".join(shown)),
            ("size", size_text(dataset.content.size_bytes)),
            ("content", dataset.content.digest),
            ("created", when(dataset.create_time)),
        ]
    )
