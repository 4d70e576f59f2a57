"""Run as a process: `python -m penstock.cli.demo.keras_answers model.keras rows.npy answers.npy`."""

import sys
from pathlib import Path

import numpy as np

from penstock.converters.keras_source import load


def main(model: Path, rows: Path, answers: Path) -> None:
    """Writes the Keras model's own answers to the rows."""
    np.save(answers, load(model).predict(np.load(rows, allow_pickle=False), verbose=0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
