"""The command and its story."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from penstock.api.registry.v1.deployment_service_pb2 import Deployment, DeploymentTarget
from penstock.api.training.v1.job_pb2 import Job, JobState
from penstock.cli.demo.answers import (
    Floats,
    Ints,
    KerasFailedError,
    Served,
    ask_keras,
    ask_with_penstock,
    ask_with_tritonclient,
    read_test_rows,
)
from penstock.cli.demo.digits import ALIAS, DATASET, JOB, LABEL, MODEL, write_digits
from penstock.cli.demo.pictures import draw_confusion, draw_curves
from penstock.cli.deploy import wait_until_ready
from penstock.cli.jobs import follow
from penstock.cli.output import enum_word, explain, print_json
from penstock.cli.progress import working
from penstock.cli.supervisor import ServiceDiedError, running_services
from penstock.client import Addresses, Client, PenstockError

LEAST_ACCURACY = 0.95


@dataclass(frozen=True)
class Outcome:
    """What the demo found on the test rows."""

    job: Job
    digits: Ints
    keras: Floats
    served: tuple[Served, ...]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Over the wire; the least of the clients'."""
        return min(_accuracy(found.probabilities, self.digits) for found in self.served)

    @property
    def keras_accuracy(self) -> float:
        return _accuracy(self.keras, self.digits)

    @property
    def largest_difference(self) -> float:
        """Of any probability, between Keras and any client."""
        return max(float(np.abs(found.probabilities - self.keras).max()) for found in self.served)

    @property
    def differing_classes(self) -> int:
        """How many predicted classes are not Keras's, over all clients."""
        expected = self.keras.argmax(axis=1)
        return sum(int((found.probabilities.argmax(axis=1) != expected).sum()) for found in self.served)

    @property
    def passed(self) -> bool:
        return self.accuracy >= LEAST_ACCURACY and self.differing_classes == 0


@click.command
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="penstock-demo",
    show_default=True,
    help="Folder for the data and the pictures.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def demo(output: Path, as_json: bool) -> None:
    """Train, convert, register, deploy and query a real model, on this machine alone, in under a minute.

    Starts the three services with a throw-away home, trains a perceptron on 1,797 handwritten digits, serves it, and
    sends it every test image with two clients. Fails if the accuracy is under 0.95 or any class is not Keras's.
    """
    output.mkdir(parents=True, exist_ok=True)
    say = _silent if as_json else click.echo
    try:
        outcome = asyncio.run(_run(output, say))
    except ServiceDiedError as error:
        raise click.ClickException(str(error)) from error
    except PenstockError as error:
        raise click.ClickException(explain(error)) from error
    except (KerasFailedError, subprocess.TimeoutExpired) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json(_figures(outcome, output))
    else:
        _report(outcome, output)
    if not outcome.passed:
        raise SystemExit(1)


async def _run(output: Path, say: Callable[[str], object]) -> Outcome:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as folder:
        home = Path(folder)
        say("Starting registry, training and inference, each a process of its own …")
        async with running_services(home, logs=home) as (_, addresses):
            say(f"… up after {time.monotonic() - started:.1f} s.")
            return await asyncio.to_thread(_story, addresses, home, output, say, started)


def _story(addresses: Addresses, folder: Path, output: Path, say: Callable[[str], object], started: float) -> Outcome:
    """From rows to answers. Everything but the drawing is a gRPC call."""
    with Client(addresses) as client:
        rows = output / "digits.csv"
        write_digits(rows)
        dataset = client.datasets.create(DATASET, rows)
        counts = dataset.split_counts
        say(f"Dataset {dataset.name}: {counts.train} rows train, {counts.validation} validate, {counts.test} test.")

        job = follow(client, client.jobs.create(JOB).job_id)
        if job.state != JobState.JOB_STATE_SUCCEEDED:
            raise click.ClickException(
                f"Job {job.job_id} has {enum_word(JobState.DESCRIPTOR, job.state)}: {job.error.message}"
            )
        version = job.result.version
        parity = job.result.parity
        difference = f"{parity.max_absolute_error:.1e}"
        say(f"Job {job.job_id} registered {MODEL} version {version} and made it {ALIAS}. Converted to ONNX and")
        say(f"compared with {parity.source} on {len(parity.cases)} batches: largest difference {difference}.")

        target = DeploymentTarget(alias=ALIAS, weight=100)
        wait_until_ready(client, client.deployments.set(Deployment(model=MODEL, targets=[target])), timeout_s=60)
        say(f"The inference service at {addresses.inference} serves {MODEL} version {version}.")

        images, digits = read_test_rows(client)
        np.savetxt(output / "three-images.csv", images[:3], fmt="%d", delimiter=",")
        with working("Asking Keras"):
            client.models.download(client.models.get_version(MODEL, version), folder)
            keras = ask_keras(folder / "model.keras", images, folder)
        with working("Asking the service"):
            served = (ask_with_penstock(client, images), ask_with_tritonclient(addresses.inference, images))

        events = client.jobs.watch(job.job_id)
        epochs = [event.epoch_metrics.values for event in events if event.HasField("epoch_metrics")]
        draw_curves(output / "learning-curves.png", epochs)
        draw_confusion(output / "confusion.png", digits, served[0].probabilities.argmax(axis=1), job.result.labels)
    return Outcome(job, digits, keras, served, time.monotonic() - started)


def _figures(outcome: Outcome, output: Path) -> dict[str, object]:
    return {
        "passed": outcome.passed,
        "accuracy_over_the_wire": outcome.accuracy,
        "accuracy_of_keras": outcome.keras_accuracy,
        "largest_difference_of_a_probability": outcome.largest_difference,
        "classes_that_differ": outcome.differing_classes,
        "test_rows": len(outcome.digits),
        "latency_ms": {
            found.client: {"p50": found.percentile(50), "p99": found.percentile(99)} for found in outcome.served
        },
        "seconds": outcome.seconds,
        "pictures": [str(output / "confusion.png"), str(output / "learning-curves.png")],
    }


def _report(outcome: Outcome, output: Path) -> None:
    click.echo(f"\n{len(outcome.digits)} test images, one a request, by each client:")
    click.echo(f"  accuracy over the wire      {outcome.accuracy:.4f}")
    click.echo(f"  accuracy of Keras itself    {outcome.keras_accuracy:.4f}")
    click.echo(f"  classes that differ         {outcome.differing_classes}")
    click.echo(f"  largest difference          {outcome.largest_difference:.1e} of a probability")
    for found in outcome.served:
        latency = f"p50 {found.percentile(50):.2f} ms, p99 {found.percentile(99):.2f} ms"
        click.echo(f"  {'latency, ' + found.client:<26}  {latency}")
    click.echo(f"\nPictures: {output / 'confusion.png'}, {output / 'learning-curves.png'}")
    verdict = "Passed" if outcome.passed else f"FAILED: accuracy under {LEAST_ACCURACY}, or a class is not Keras's"
    click.echo(f"{verdict}, in {outcome.seconds:.0f} s.\n\nThe same by hand, and to stay:")
    penstock = "penstock" if shutil.which("penstock") else os.path.relpath(sys.argv[0])
    for command in (
        "up                                   # in a shell of its own",
        f"datasets create digits {output / 'digits.csv'}",
        f"jobs create mlp digits --label {LABEL} --model digits --alias champion",
        "deploy set digits champion",
        f"infer digits @{output / 'three-images.csv'}",
    ):
        click.echo(f"  {penstock} {command}")


def _accuracy(probabilities: Floats, digits: Ints) -> float:
    return float((probabilities.argmax(axis=1) == digits).mean())


def _silent(_: str) -> None:
    """With --json, only the figures are printed."""
