"""What the command imports before it is told what to do."""

import subprocess
import sys

HEAVY = {
    "grpc",
    "google",
    "numpy",
    "rich",
    "pydantic",
    "sqlalchemy",
    "onnxruntime",
    "onnx",
    "tensorflow",
    "keras",
    "sklearn",
}


def modules_after(*arguments: str) -> set[str]:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('MODULES', *{name.split('.')[0] for name in sys.modules}))\n"
        "from penstock.cli.main import main\n"
        f"sys.argv = ['penstock', *{arguments!r}]\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.rpartition("MODULES")[2].split())


def test_help_imports_nothing_heavy():
    assert not modules_after("--help") & HEAVY


def test_the_help_of_a_service_imports_neither_tensorflow_nor_the_others_libraries():
    assert not modules_after("serve", "inference", "--help") & {"tensorflow", "keras", "sqlalchemy", "onnx"}
