"""`penstock up`."""

import asyncio
import signal
from pathlib import Path

import click

from penstock.cli.supervisor import ServiceDiedError, running_services
from penstock.client import Addresses


@click.command
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps everything.  [default: PENSTOCK_HOME, or penstock in the user's data folder]",
)
@click.option("--registry-port", type=int, default=8011, show_default=True)
@click.option("--training-port", type=int, default=8021, show_default=True)
@click.option("--inference-port", type=int, default=8001, show_default=True)
@click.option(
    "--metrics-port",
    type=int,
    default=8002,
    show_default=True,
    help="Port of the inference service's Prometheus metrics; 0 takes a free one, -1 serves none.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="'info' logs every call.",
)
def up(
    home: Path | None, registry_port: int, training_port: int, inference_port: int, metrics_port: int, log_level: str
) -> None:
    """Run registry, training and inference together, on this machine alone, until Ctrl-C.

    Everything is kept in the home: models, datasets and deployments are there again after the next `penstock up`.
    Ctrl-C lets calls in progress finish, then stops all three; an interrupted training job goes on next time.
    """
    ports = Addresses(*(f"127.0.0.1:{port}" for port in (registry_port, training_port, inference_port)))
    try:
        asyncio.run(_run(home, ports, metrics_port, log_level))
    except ServiceDiedError as error:
        raise click.ClickException(str(error)) from error


async def _run(home: Path | None, ports: Addresses, metrics_port: int, log_level: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    click.echo("Starting registry, training and inference …", err=True)
    async with running_services(home, None, ports, log_level, metrics_port) as (supervisor, addresses):
        click.echo(_welcome(addresses), err=True)
        stopping = asyncio.create_task(stop.wait())
        died = asyncio.create_task(supervisor.wait())
        done, pending = await asyncio.wait({stopping, died}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if died in done and not stop.is_set():
            died.result()
        click.echo("Stopping: calls in progress may finish.", err=True)


def _welcome(addresses: Addresses) -> str:
    return (
        f"\nPenstock is up.\n"
        f"  registry   {addresses.registry}\n"
        f"  training   {addresses.training}\n"
        f"  inference  {addresses.inference}   Open Inference Protocol v2\n"
        f"Ctrl-C stops it. In another shell: penstock datasets --help\n"
    )
