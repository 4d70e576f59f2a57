"""The handwritten digits that scikit-learn carries, and what the demo trains on them."""

import csv
from pathlib import Path

from penstock.api.dataset.v1.dataset_pb2 import Dataset, DatasetFormat, SplitRecipe
from penstock.api.training.v1.job_pb2 import Activation, JobSpec, MlpSpec, MlpTask, Registration

MODEL = "digits"
ALIAS = "champion"
LABEL = "digit"

# 8 × 8 grey levels, 0 to 16.
PIXELS = [f"pixel_{row}_{column}" for row in range(8) for column in range(8)]

DATASET = Dataset(
    name="digits",
    description="1,797 images of handwritten digits (UCI, Optical Recognition of Handwritten Digits).",
    format=DatasetFormat.DATASET_FORMAT_CSV,
    split=SplitRecipe(train=0.7, validation=0.15, test=0.15, seed=1),
)

JOB = JobSpec(
    dataset=DATASET.name,
    mlp=MlpSpec(
        task=MlpTask.MLP_TASK_CLASSIFICATION,
        label_column=LABEL,
        hidden_units=[128, 128],
        activation=Activation.ACTIVATION_RELU,
        epochs=20,
    ),
    registration=Registration(model=MODEL, alias=ALIAS, description="A multilayer perceptron, from penstock demo."),
    seed=1,
)


def write_digits(path: Path) -> None:
    """Writes the images as CSV: 64 pixels and the digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*PIXELS, LABEL])
        for image, label in zip(digits.data.astype(int).tolist(), digits.target.tolist(), strict=True):
            writer.writerow([*image, label])
