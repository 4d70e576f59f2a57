"""`penstock completion`."""

import click
from click.shell_completion import get_completion_class


@click.command
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes penstock commands in SHELL.

    For bash, for example: `penstock completion bash >> ~/.bash_completion`. Open a new shell to use it.
    """
    from penstock.cli.main import penstock

    script = get_completion_class(shell)
    if script is None:
        raise click.ClickException(f"This version of click cannot complete in {shell}.")
    click.echo(script(penstock, {}, "penstock", "_PENSTOCK_COMPLETE").source())
