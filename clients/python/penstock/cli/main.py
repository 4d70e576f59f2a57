"""The `penstock` command itself. What a command needs is imported when it runs, so that help answers at once."""

import importlib
import os
import sys
from importlib.metadata import version

try:
    import click
except ModuleNotFoundError:
    sys.exit("The penstock command needs more than the client library: pip install 'penstock[cli]'")

# Each command: the module that has it under its own name, and its line in the help.
COMMANDS = {
    "up": ("penstock.cli.up", "Run registry, training and inference together, for a laptop."),
    "serve": ("penstock.cli.serve", "Run one service, for a container."),
    "demo": ("penstock.cli.demo.command", "Train, convert, register, deploy and query a real model in under a minute."),
    "datasets": ("penstock.cli.datasets", "Upload, show and delete rows to train on."),
    "jobs": ("penstock.cli.jobs", "Train models; watch and cancel training jobs."),
    "models": ("penstock.cli.models", "Show and import models and versions; move aliases."),
    "deploy": ("penstock.cli.deploy", "Say which versions are served, and see whether they are."),
    "infer": ("penstock.cli.infer", "Ask a deployed model for answers."),
    "convert": ("penstock.cli.convert", "Convert a trained model to ONNX and compare the two."),
    "inspect": ("penstock.cli.inspect", "Show what an ONNX model is and what can run it here."),
    "completion": ("penstock.cli.completion", "Print the script that completes commands in your shell."),
}


class LazyGroup(click.Group):
    """A group that imports a command only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), cmd_name)
        except ModuleNotFoundError as error:
            if error.name and not error.name.startswith("penstock"):
                raise click.ClickException(
                    f"`penstock {cmd_name}` needs the package {error.name!r}, which is not installed: "
                    f"pip install 'penstock[all]'"
                ) from error
            raise
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(version("penstock"), prog_name="penstock")
def penstock() -> None:
    """AI models as a service: train, register, convert, deploy and serve over gRPC.

    `penstock demo` shows the whole way on real data. `penstock up` starts the services here; the other commands then
    talk to them. To talk to services elsewhere, set PENSTOCK_REGISTRY_ADDRESS, PENSTOCK_TRAINING_ADDRESS and
    PENSTOCK_INFERENCE_ADDRESS to their host:port.
    """


def main() -> None:
    """Runs the command of this process's arguments and exits."""
    try:
        try:
            penstock(prog_name="penstock")
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except OSError as error:
        # What is still buffered cannot be written when the interpreter ends either; it would say so with a trace.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # A reader who has left wants to hear nothing more; else this is a full disk, or a file that cannot be had.
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"Error: {error}")
