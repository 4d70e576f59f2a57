"""Strangers' text, a full disk, a wrong address: the command shows text or says a sentence, never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from penstock.api.training.v1.job_pb2 import JobState
from penstock.cli.models import import_version
from penstock.cli.output import enum_word, explain, print_fields, print_table
from penstock.client import PenstockError
from penstock.client.channel import Addresses

PENSTOCK = Path(sys.executable).parent / "penstock"

STRANGE = {
    "[/x] [bold]b[/bold]": "[/x] [bold]b[/bold]",
    "\x1b[31mred\x1b]0;title\x07": r"\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe": r"\u202egnp.exe",
    "a\rb\0": r"a\rb\x00",
    "名前 é": "名前 é",
}


@pytest.mark.parametrize("text", STRANGE)
def test_a_terminal_shows_text_and_obeys_none(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "100")
    print_table(("NAME", "DESCRIPTION"), [("digits", text)], "none")
    assert STRANGE[text] in capsys.readouterr().out
    print_fields([("description", text)])
    assert STRANGE[text] in capsys.readouterr().out


def test_a_name_is_whole_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "20")
    name = "abcdefghijklmnopqrstuvwxyz0123456789"
    print_table(("NAME", "DESCRIPTION"), [(name, "x" * 50)], "none")
    first_column = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert "".join(first_column).removeprefix("NAME") == name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the file that is always full is Linux's")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output_is_told(unbuffered: str):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [PENSTOCK, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ")
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_graph_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"garbage" * 100)
    result = CliRunner().invoke(import_version, ["digits", str(path)])
    assert result.exit_code == 1
    assert "model.onnx is not an ONNX file" in result.output
    assert result.exception.__class__ is SystemExit


def test_a_service_at_the_wrong_address_is_explained():
    text = explain(PenstockError("Method not found!", grpc.StatusCode.UNIMPLEMENTED))
    assert "another service" in text
    assert "PENSTOCK_REGISTRY_ADDRESS" in text
    refused = PenstockError("No sequences.", grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED")
    assert explain(refused) == "No sequences."


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(os.environ, "PENSTOCK_REGISTRY_ADDRESS", "")
    assert Addresses().registry == "127.0.0.1:8011"


def test_a_value_that_only_a_newer_server_knows_is_shown_as_its_number():
    assert enum_word(JobState.DESCRIPTOR, JobState.JOB_STATE_RUNNING) == "running"
    assert enum_word(JobState.DESCRIPTOR, 4711) == "4711"
