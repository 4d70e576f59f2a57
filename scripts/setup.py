"""Sets the checkout up: a .venv with exactly what requirements.lock names, and Penstock itself, editable.

Needs python3 ≥ 3.11 and nothing else: on Debian's bare python3, which has neither pip nor ensurepip, pip comes out of
Debian's own package, unpacked into a temporary folder. Runs as root and as an ordinary user, and again at any time.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"

OLDEST, TOO_NEW = (3, 11), (3, 14)


def run(*command: "str | Path", **environment: str) -> None:
    """Runs a command with the variables added; its failure ends the set-up."""
    process = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if process.returncode:
        sys.exit(f"Set-up stopped: `{' '.join(map(str, command))}` failed with exit code {process.returncode}.")


def make_venv() -> None:
    """An empty environment, where there is none that works."""
    if PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, symlinks=True, with_pip=False)


def locked_uv() -> str:
    """The lines of the lock file that name uv's version and hashes."""
    match = re.search(r"^uv==(?:.*\\\n)*.*\n", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        sys.exit(f"Set-up stopped: {LOCK.name} does not name uv.")
    return match[0]


def install_uv() -> None:
    """Installs uv at the locked version, from the package index."""
    with tempfile.TemporaryDirectory(prefix="penstock-setup-") as folder:
        requirements = Path(folder) / "uv.txt"
        requirements.write_text(locked_uv(), encoding="utf-8")
        install = ("install", "--quiet", "--no-input", "--require-hashes", "-r", requirements)
        if importlib.util.find_spec("ensurepip"):
            run(PYTHON, "-m", "ensurepip", "--default-pip")
            run(PYTHON, "-m", "pip", *install)
        elif importlib.util.find_spec("pip"):
            run(sys.executable, "-m", "pip", "--python", PYTHON, *install)
        else:
            run(PYTHON, "-m", "pip", *install, PYTHONPATH=str(debian_pip(Path(folder))))


def debian_pip(folder: Path) -> Path:
    """The pip wheel of Debian's python3-pip-whl, fetched without installing anything and without being root."""
    if not shutil.which("apt-get"):
        sys.exit("Set-up stopped: this python3 has no pip. Install the packages for pip and venv of your system first.")
    print("This python3 has no pip; fetching Debian's own for the set-up alone.")
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True)
    options = ("-qq", "-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={folder}", "-o", "APT::Sandbox::User=")
    run("apt-get", *options, "update")
    subprocess.run(["apt-get", *options, "download", "python3-pip-whl"], cwd=folder, check=True)
    [package] = folder.glob("python3-pip-whl_*.deb")
    run("dpkg-deb", "-x", package, folder / "package")
    [wheel] = (folder / "package").rglob("pip-*.whl")
    return wheel


def main() -> None:
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        versions = f"{'.'.join(map(str, OLDEST))} or newer, before {'.'.join(map(str, TOO_NEW))}"
        sys.exit(f"Penstock needs Python {versions}; this is {sys.version.split()[0]}. Say `make PYTHON=python3.12 …`.")
    make_venv()
    if not UV.exists():
        install_uv()
    if not (PYTHON.parent / "penstock").exists():
        print("Installing 2 GB of packages, TensorFlow above all; the first time takes a minute or two.", flush=True)
    quiet = (*(() if sys.stderr.isatty() else ("--quiet",)), "--python", PYTHON)
    # Compiled once here rather than at each start: TensorFlow alone takes ten seconds to compile.
    run(UV, "pip", "sync", *quiet, "--compile-bytecode", "--require-hashes", LOCK)
    run(UV, "pip", "install", *quiet, "--no-deps", "--no-build-isolation", "--editable", ROOT)


if __name__ == "__main__":
    main()
