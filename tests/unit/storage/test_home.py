"""One process at a time holds a home."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.rpc.errors import StartupError
from penstock.storage.home import locked_home

HOLDER = """
import sys, time
from pathlib import Path
from penstock.storage.home import locked_home
with locked_home(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_home_is_for_its_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    with locked_home(home) as held:
        assert held == home
        assert home.stat().st_mode & 0o777 == 0o700
        assert (home / "lock").stat().st_mode & 0o777 == 0o600
    with locked_home(home):
        pass


def test_a_second_holder_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with locked_home(tmp_path), pytest.raises(StartupError, match=str(os.getpid())), locked_home(tmp_path):
        pass


def test_another_process_is_named_and_leaves_no_lock_when_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(StartupError, match=rf"{tmp_path} is in use by process {holder.pid}\. .*--home"),
            locked_home(tmp_path),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with locked_home(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("home", ["/dev/null/home", "/proc/home"])
def test_a_home_that_cannot_be_made_is_named(home: str) -> None:
    with pytest.raises(StartupError, match=rf"Cannot use the home {home}: .*--home"), locked_home(Path(home)):
        pass


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(StartupError, match=r"Cannot use the home .*: File exists"), locked_home(tmp_path / "home"):
        pass
