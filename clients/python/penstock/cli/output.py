"""How commands talk to people and to programs."""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC
from typing import Any, ParamSpec, TypeVar

import click
import grpc
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from penstock.client import Client, PenstockError

P = ParamSpec("P")
R = TypeVar("R")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON for programs, in the contract's field names."
)


def connected(command: Callable[P, R]) -> Callable[..., R]:
    """Gives a command a client as its first argument; a call that fails ends it with a message instead of a trace."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with Client() as client:
            try:
                return command(client, *args, **kwargs)  # type: ignore[arg-type]  # the wrapped one has no client
            except PenstockError as error:
                raise click.ClickException(visible(explain(error))) from error

    return run


def explain(error: PenstockError) -> str:
    """What went wrong and what to do about it."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return (
            f"A service cannot be reached: {error.message}. Start the services with `penstock up`, or say where "
            f"they are with PENSTOCK_REGISTRY_ADDRESS, PENSTOCK_TRAINING_ADDRESS and PENSTOCK_INFERENCE_ADDRESS."
        )
    if error.code is grpc.StatusCode.UNIMPLEMENTED and not error.reason:
        return (
            f"The server there does not know this call: {error.message} It may be another service, or an older one: "
            f"look at PENSTOCK_REGISTRY_ADDRESS, PENSTOCK_TRAINING_ADDRESS and PENSTOCK_INFERENCE_ADDRESS."
        )
    if error.violations:
        return "\n  ".join(["The request is wrong:", *(f"{v.field}: {v.description}" for v in error.violations)])
    return error.message


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_message(message: Message) -> None:
    print_json(as_dict(message))


def print_messages(messages: Iterable[Message]) -> None:
    print_json([as_dict(message) for message in messages])


def as_dict(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """A table for people; `empty` is said instead of one without rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Folded, not cut off: a name that is not whole is of no use.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(value)) for value in row))
    if table.row_count:
        Console().print(table)
    else:
        click.echo(empty)


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """One thing's facts, a line each; empty ones are left out."""
    shown = [(name, value) for name, value in fields if value not in ("", None)]
    width = max(len(name) for name, _ in shown)
    for name, value in shown:
        click.echo(f"{name:<{width}}  {visible(value)}")


def visible(value: object) -> str:
    """Text as a terminal may show it. It may be a stranger's: what could move the cursor or turn a line is escaped."""
    text = str(value)
    return "".join(
        character if character.isprintable() or character == "\n" else character.encode("unicode_escape").decode()
        for character in text
    )


def when(timestamp: Timestamp) -> str:
    """A time in UTC, to the second."""
    return timestamp.ToDatetime(UTC).strftime("%Y-%m-%d %H:%M:%S") if timestamp.seconds else ""


def enum_word(enum: EnumDescriptor, value: int) -> str:
    """A value as a person reads it: `running` for `JOB_STATE_RUNNING`; its number if a newer server sent it."""
    if value not in enum.values_by_number:
        return str(value)
    # Every name begins with that of the zero value, less its own last word.
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return enum.values_by_number[value].name.removeprefix(prefix).lower().replace("_", " ")


def size_text(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"


def interactive() -> bool:
    """Whether a person watches: then there are progress bars."""
    return sys.stderr.isatty()
