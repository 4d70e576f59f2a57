"""`penstock jobs`."""

import click

from penstock.api.training.v1.job_pb2 import Activation, Job, JobSpec, JobState, MlpSpec, MlpTask, Registration
from penstock.cli.output import (
    connected,
    enum_word,
    json_option,
    print_fields,
    print_message,
    print_messages,
    print_table,
    when,
)
from penstock.cli.progress import JobProgress
from penstock.client import Client

TASKS = {"classification": MlpTask.MLP_TASK_CLASSIFICATION, "regression": MlpTask.MLP_TASK_REGRESSION}
ACTIVATIONS = {
    "relu": Activation.ACTIVATION_RELU,
    "tanh": Activation.ACTIVATION_TANH,
    "sigmoid": Activation.ACTIVATION_SIGMOID,
}


@click.group
def jobs() -> None:
    """Train models; watch and cancel training jobs."""


@jobs.group
def create() -> None:
    """Queue a training job; one command for each model family."""


@create.command
@click.argument("dataset")
@click.option("--label", required=True, help="The column to predict.")
@click.option("--model", required=True, help="The name under which the result is registered.")
@click.option("--alias", default="", help="An alias to set to the new version, 'champion' for example.")
@click.option("--task", type=click.Choice(list(TASKS)), default="classification", show_default=True)
@click.option(
    "--feature", "features", multiple=True, help="A column to predict from; repeat it.  [default: every other one]"
)
@click.option(
    "--hidden",
    type=int,
    multiple=True,
    default=(128, 128),
    show_default=True,
    help="Units of a hidden layer; repeat it.",
)
@click.option("--activation", type=click.Choice(list(ACTIVATIONS)), default="relu", show_default=True)
@click.option("--dropout", type=float, default=0.0, show_default=True, help="Share of units dropped while training.")
@click.option("--learning-rate", type=float, default=0.001, show_default=True, help="Adam's step size.")
@click.option("--batch-size", type=int, default=32, show_default=True)
@click.option("--epochs", type=int, default=20, show_default=True)
@click.option(
    "--patience",
    type=int,
    default=0,
    show_default=True,
    help="Stop after so many epochs without improvement; 0: never.",
)
@click.option(
    "--standardize", is_flag=True, help="Learn on features of mean 0 and variance 1. Do so when their scales differ."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--max-attempts",
    type=int,
    default=3,
    show_default=True,
    help="How many attempts may lose their worker before the job fails.",
)
@click.option("--request-id", default="", help="Makes the command safe to repeat: the same id gives the same job.")
@click.option("--watch/--no-watch", default=True, show_default=True, help="Show the progress until the job has ended.")
@json_option
@connected
def mlp(
    client: Client,
    dataset: str,
    label: str,
    model: str,
    alias: str,
    task: str,
    features: tuple[str, ...],
    hidden: tuple[int, ...],
    activation: str,
    dropout: float,
    learning_rate: float,
    batch_size: int,
    epochs: int,
    patience: int,
    standardize: bool,
    seed: int,
    max_attempts: int,
    request_id: str,
    watch: bool,
    as_json: bool,
) -> None:
    """Train a multilayer perceptron on the numeric columns of DATASET, convert it to ONNX and register it."""
    family = MlpSpec(
        task=TASKS[task],
        label_column=label,
        feature_columns=features,
        hidden_units=hidden,
        activation=ACTIVATIONS[activation],
        dropout=dropout,
        learning_rate=learning_rate,
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        standardize=standardize,
    )
    registration = Registration(model=model, alias=alias)
    spec = JobSpec(dataset=dataset, mlp=family, registration=registration, seed=seed, max_attempts=max_attempts)
    job = client.jobs.create(spec, request_id)
    if watch:
        job = follow(client, job.job_id, quiet=as_json)
    _show(job, as_json)
    _fail_unless_succeeded(job, watch)


@jobs.command("list")
@click.option("--state", "states", multiple=True, help="Only jobs in this state: 'running', for example; repeat it.")
@click.option("--dataset", default="", help="Only jobs on this dataset.")
@click.option("--model", default="", help="Only jobs for this model.")
@json_option
@connected
def list_jobs(client: Client, states: tuple[str, ...], dataset: str, model: str, as_json: bool) -> None:
    """List training jobs, newest first."""
    from penstock.api.training.v1.training_service_pb2 import JobFilter

    known = {enum_word(JobState.DESCRIPTOR, value): value for value in JobState.values()}
    unknown = [state for state in states if state not in known]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}: expected one of {', '.join(known)}", param_hint="--state")
    found = client.jobs.list(JobFilter(states=[known[state] for state in states], dataset=dataset, model=model))
    if as_json:
        print_messages(found)
        return
    rows = [
        (job.job_id, _state(job), job.spec.dataset, job.spec.registration.model, _version(job), when(job.create_time))
        for job in found
    ]
    print_table(
        ("JOB", "STATE", "DATASET", "MODEL", "VERSION", "CREATED (UTC)"),
        rows,
        "There are no such jobs. Train a model with `penstock jobs create mlp`.",
    )


@jobs.command
@click.argument("job_id", metavar="JOB")
@json_option
@connected
def get(client: Client, job_id: str, as_json: bool) -> None:
    """Show JOB."""
    _show(client.jobs.get(job_id), as_json)


@jobs.command
@click.argument("job_id", metavar="JOB")
@json_option
@connected
def cancel(client: Client, job_id: str, as_json: bool) -> None:
    """Stop JOB. What it has learned so far is discarded."""
    _show(client.jobs.cancel(job_id), as_json)


@jobs.command
@click.argument("job_id", metavar="JOB")
@click.option("--after-cursor", type=int, default=0, show_default=True, help="Leave out events up to this one.")
@json_option
@connected
def watch(client: Client, job_id: str, after_cursor: int, as_json: bool) -> None:
    """Show the history of JOB and what happens until it has ended. With --json, one event a line."""
    import json

    from penstock.cli.output import as_dict

    if as_json:
        for event in client.jobs.watch(job_id, after_cursor):
            click.echo(json.dumps(as_dict(event)))
        return
    job = follow(client, job_id, after_cursor)
    _show(job, as_json)
    _fail_unless_succeeded(job, ended=True)


def follow(client: Client, job_id: str, after_cursor: int = 0, quiet: bool = False) -> Job:
    """Shows a job's progress until it has ended, and returns it. A Ctrl-C leaves the job running."""
    try:
        if quiet:
            for _ in client.jobs.watch(job_id, after_cursor):
                pass
        else:
            with JobProgress() as progress:
                for event in client.jobs.watch(job_id, after_cursor):
                    progress.show(event)
    except KeyboardInterrupt:
        goes_on = f"The job goes on: see `penstock jobs watch {job_id}` and `penstock jobs cancel {job_id}`."
        raise click.ClickException(goes_on) from None
    return client.jobs.get(job_id)


def _fail_unless_succeeded(job: Job, ended: bool) -> None:
    if ended and job.state != JobState.JOB_STATE_SUCCEEDED:
        raise SystemExit(1)


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        print_message(job)
        return
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in sorted(job.result.test_metrics.items()))
    print_fields(
        [
            ("job", job.job_id),
            ("state", _state(job)),
            ("error", job.error.message),
            ("dataset", job.spec.dataset),
            ("model", job.spec.registration.model),
            ("version", _version(job)),
            ("alias", job.spec.registration.alias),
            ("test split", metrics),
            (
                "parity",
                f"largest difference {job.result.parity.max_absolute_error:.2g}" if job.HasField("result") else "",
            ),
            ("attempts", len(job.attempts) or ""),
            ("created", when(job.create_time)),
            ("ended", when(job.end_time)),
        ]
    )


def _state(job: Job) -> str:
    return enum_word(JobState.DESCRIPTOR, job.state)


def _version(job: Job) -> str:
    return str(job.result.version) if job.HasField("result") else ""
