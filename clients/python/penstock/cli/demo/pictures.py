"""The pictures that the demo leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from penstock.cli.demo.answers import Ints

INK = "#1f4e79"
ACCENT = "#c8553d"


def draw_confusion(path: Path, truth: Ints, predicted: Ints, labels: Sequence[str]) -> None:
    """A matrix of counts: rows are what an image shows, columns what the served model said."""
    from matplotlib.figure import Figure

    counts = np.zeros((len(labels), len(labels)), int)
    np.add.at(counts, (truth, predicted), 1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="Blues")
    figure.colorbar(image, ax=axes, label="images")
    axes.set(xlabel="answer of the served model", ylabel="digit in the image", title=f"{len(truth)} test images")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(labels)), labels)
    for row, column in zip(*np.nonzero(counts), strict=True):
        light = counts[row, column] > counts.max() / 2
        axes.text(column, row, counts[row, column], ha="center", va="center", color="white" if light else "black")
    figure.savefig(path, dpi=120)


def draw_curves(path: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Loss and accuracy by epoch, of the training and the validation split."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    numbers = range(1, len(epochs) + 1)
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, label, color in ((metric, "training", INK), (f"val_{metric}", "validation", ACCENT)):
            axes.plot(numbers, [values[name] for values in epochs], label=label, color=color)
        axes.set(xlabel="epoch", title=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
