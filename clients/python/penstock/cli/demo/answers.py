"""The same rows put to the served model, by two clients, and to the trained one."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from penstock.api.dataset.v1.dataset_pb2 import Split
from penstock.cli.demo.digits import DATASET, LABEL, MODEL, PIXELS
from penstock.client import Client

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

KERAS_TIMEOUT_S = 120.0


class KerasFailedError(Exception):
    """The trained model could not be asked. The text has the last of what its process said."""


@dataclass(frozen=True)
class Served:
    """What one client got: a row of probabilities for each image, and how long each answer took."""

    client: str
    probabilities: Floats
    latencies_ms: npt.NDArray[np.float64]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies_ms, percent))


def read_test_rows(client: Client) -> tuple[Floats, Ints]:
    """The test split as the service keeps it: images [rows, 64] and digits [rows]."""
    columns = client.datasets.read(DATASET.name, Split.SPLIT_TEST)
    images = np.stack([columns[pixel] for pixel in PIXELS], axis=1).astype(np.float32)
    return images, np.asarray(columns[LABEL], np.int64)


def ask_with_penstock(client: Client, images: Floats) -> Served:
    """One row a request, by `penstock.client`."""
    return _ask(
        "penstock", lambda row: client.inference.infer(MODEL, {"features": row}).outputs["probabilities"], images
    )


def ask_with_tritonclient(address: str, images: Floats) -> Served:
    """One row a request, by NVIDIA's tritonclient, which knows nothing of Penstock."""
    import tritonclient.grpc as triton

    def infer(row: Floats) -> object:
        features = triton.InferInput("features", list(row.shape), "FP32")
        features.set_data_from_numpy(row)
        return client.infer(MODEL, [features]).as_numpy("probabilities")

    client = triton.InferenceServerClient(address)
    try:
        return _ask("tritonclient", infer, images)
    finally:
        client.close()


def ask_keras(model: Path, images: Floats, folder: Path) -> Floats:
    """The trained model's own answers, from a process of its own: nothing here imports TensorFlow."""
    rows, answers = folder / "rows.npy", folder / "keras.npy"
    np.save(rows, images)
    command = [sys.executable, "-m", "penstock.cli.demo.keras_answers", str(model), str(rows), str(answers)]
    # TensorFlow greets on standard error; it is shown only if something went wrong.
    process = subprocess.run(command, capture_output=True, text=True, timeout=KERAS_TIMEOUT_S, check=False)  # noqa: S603
    if process.returncode:
        raise KerasFailedError(f"Keras could not answer with {model.name}: {process.stderr.strip()[-2000:]}")
    loaded: Floats = np.load(answers, allow_pickle=False)
    return loaded


def _ask(client: str, infer: Callable[[Floats], object], images: Floats) -> Served:
    # The first call makes the connection; it is no measure of an answer.
    infer(images[:1])
    probabilities, latencies_ms = [], []
    for row in range(len(images)):
        started = time.perf_counter()
        answer = infer(images[row : row + 1])
        latencies_ms.append((time.perf_counter() - started) * 1000)
        probabilities.append(np.asarray(answer, np.float32))
    return Served(client, np.concatenate(probabilities), np.array(latencies_ms))
