"""The service process loads no training library: only a worker does."""

import subprocess
import sys

SCRIPT = """
import sys
import penstock.training.app
import penstock.training.families
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"tensorflow", "keras", "tf2onnx", "onnx", "onnxruntime", "sklearn"}))
"""


def test_the_service_imports_no_training_library() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
