"""`penstock serve`: one service, in this process or below it. Its options are the fields of its settings."""

import importlib
import os
import types
import typing
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError

# Each service: its settings class; its application is in the module `app` beside that.
SERVICES = {
    "registry": ("penstock.registry.settings", "RegistrySettings", "Keep models, versions, aliases and deployments."),
    "training": ("penstock.training.settings", "TrainingSettings", "Keep datasets and run training jobs."),
    "inference": ("penstock.inference.settings", "InferenceSettings", "Answer requests with the deployed models."),
}


class ServiceGroup(click.Group):
    """One command for each service."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SERVICES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return service_command(cmd_name) if cmd_name in SERVICES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Services"):
            formatter.write_dl([(name, line) for name, (_, _, line) in SERVICES.items()])


@click.group(cls=ServiceGroup)
@click.option("--config", type=click.Path(dir_okay=False), help="TOML file with a table for each service.")
def serve(config: str | None) -> None:
    """Run one service until SIGTERM or Ctrl-C, then finish the calls in progress and stop.

    Every option can also be set by a variable, PENSTOCK_REGISTRY_PORT for example, or in the service's table of the
    TOML file. An option counts before a variable, a variable before the file.
    """
    if config:
        os.environ["PENSTOCK_CONFIG"] = config


def service_command(name: str) -> click.Command:
    """The command that serves `name`, with an option for each of its settings."""
    module, class_name, line = SERVICES[name]
    settings: type[ServerSettings] = getattr(importlib.import_module(module), class_name)

    def run(**flags: object) -> None:
        from penstock.rpc.launch import run as run_application

        given = {field: value for field, value in flags.items() if value is not None}
        try:
            run_application(settings.load(given), module.replace(".settings", ".app") + ":application")
        except StartupError as error:
            raise click.ClickException(str(error)) from error

    options: list[click.Parameter] = [_option(field, info) for field, info in settings.model_fields.items()]
    return click.Command(name, params=options, callback=run, help=line, short_help=line)


def _option(field: str, info: FieldInfo) -> click.Option:
    """The option of a settings field. The default stays the settings' own: what is not given is not passed on."""
    flag = "--" + field.replace("_", "-")
    default = "" if info.default_factory or info.default is None else f"  [default: {info.default}]"
    help_text = (info.description or "") + default
    kind = _inner_type(info.annotation)
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=help_text)
    if get_origin(kind) is Literal:
        return click.Option([flag], type=click.Choice(get_args(kind)), help=help_text)
    return click.Option([flag], type=kind if kind in (int, float) else str, help=help_text)


def _inner_type(annotation: Any) -> Any:  # noqa: ANN401  # annotations have no common type
    """The type of an optional field without its None."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        [inner] = [part for part in get_args(annotation) if part is not type(None)]
        return inner
    return annotation
