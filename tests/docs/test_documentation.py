"""What the documentation says is there, is there; what is there, is documented."""

import re
from pathlib import Path

import click
import pytest

from penstock.cli.main import COMMANDS, penstock

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/why.md",
        "docs/operations.md",
        "docs/serving.md",
        "docs/coverage-keras.md",
        "docs/coverage-scikit-learn.md",
    )
]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def commands(group: click.Group, context: click.Context, path: tuple[str, ...]) -> "list[tuple[str, ...]]":
    """Every command below a group, as the words to type."""
    found = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        words = (*path, name)
        inner = commands(command, context, words) if isinstance(command, click.Group) else [words]
        found.extend(inner)
    return found


ALL_COMMANDS = commands(penstock, click.Context(penstock), ("penstock",))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_every_command_is_in_the_operations_guide(words: tuple[str, ...]):
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"`{' '.join(words)}" in guide or f"\n{' '.join(words)}" in guide


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_every_command_and_option_explains_itself(words: tuple[str, ...]):
    command: click.Command = penstock
    context = click.Context(penstock)
    for word in words[1:]:
        assert isinstance(command, click.Group)
        found = command.get_command(context, word)
        assert found is not None
        command = found
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            obvious = {
                "--batch-size",
                "--epochs",
                "--task",
                "--activation",
                "--seed",
                "--registry-port",
                "--training-port",
            }
            assert option.help or set(option.opts) & {*obvious, "--inference-port"}, option.opts


def test_commands_named_in_the_documentation_exist():
    named = re.compile(r"penstock ((?:[a-z]+ ?)+)")
    known = {" ".join(words) for words in ALL_COMMANDS}
    for page in PAGES:
        for block in re.findall(r"```(?:sh|shell|bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                match = named.match(line.strip())
                if match:
                    words = match[1].split()
                    assert any(" ".join(["penstock", *words[:n]]) in known for n in range(1, len(words) + 1)), line


def test_the_table_of_commands_has_the_short_help_of_each():
    context = click.Context(penstock)
    for name in COMMANDS:
        assert penstock.get_command(context, name) is not None
