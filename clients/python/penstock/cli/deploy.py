"""`penstock deploy`."""

import time

import click

from penstock.api.inference.v1.serving_service_pb2 import ServingState
from penstock.api.registry.v1.deployment_service_pb2 import Deployment, DeploymentTarget
from penstock.cli.output import (
    connected,
    enum_word,
    json_option,
    print_json,
    print_message,
    print_messages,
    print_table,
    when,
)
from penstock.cli.progress import working
from penstock.client import Client

POLL_S = 0.05


@click.group
def deploy() -> None:
    """Say which versions are served, and see whether they are."""


@deploy.command("set")
@click.argument("model")
@click.argument("targets", nargs=-1, metavar="[TARGET[=PERCENT]]...")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until the inference server answers.")
@click.option("--timeout", "timeout_s", type=float, default=60.0, show_default=True, help="Seconds to wait.")
@json_option
@connected
def set_deployment(
    client: Client, model: str, targets: tuple[str, ...], wait: bool, timeout_s: float, as_json: bool
) -> None:
    """Serve MODEL, replacing what was served under its name.

    A TARGET is a version's number or an alias, with its percentage of the requests where there are several: `penstock
    deploy set digits champion=90 7=10`. Without any, the alias champion gets all of them. A version that was served
    goes on answering until its successor is ready.
    """
    wanted = Deployment(model=model, targets=[_target(text) for text in targets or ("champion",)])
    made = client.deployments.set(wanted)
    if wait:
        with working(f"Waiting for {model} to be ready"):
            wait_until_ready(client, made, timeout_s)
    if as_json:
        print_message(made)
    else:
        click.echo(f"{model}: {_targets(made)}{' is ready' if wait else ''}.")


@deploy.command("list")
@json_option
@connected
def list_deployments(client: Client, as_json: bool) -> None:
    """List what is to be served."""
    found = client.deployments.list()
    if as_json:
        print_messages(found)
        return
    rows = [(item.model, _targets(item), when(item.update_time)) for item in found]
    print_table(("MODEL", "TARGETS", "UPDATED (UTC)"), rows, "Nothing is deployed. Use `penstock deploy set MODEL`.")


@deploy.command
@click.argument("model", default="")
@json_option
@connected
def status(client: Client, model: str, as_json: bool) -> None:
    """Show what the inference server has made of the deployments, of MODEL or of all."""
    found = client.deployments.serving(model)
    if as_json:
        print_messages(found)
        return
    rows = [
        (
            item.model,
            item.version,
            enum_word(ServingState.DESCRIPTOR, item.state),
            f"{item.weight} %",
            when(item.update_time),
            item.message,
        )
        for item in found
    ]
    print_table(("MODEL", "VERSION", "STATE", "SHARE", "SINCE (UTC)", "MESSAGE"), rows, "Nothing is served.")


@deploy.command
@click.argument("model")
@json_option
@connected
def delete(client: Client, model: str, as_json: bool) -> None:
    """Stop serving MODEL. Its versions stay in the registry."""
    client.deployments.delete(model)
    if as_json:
        print_json({})
    else:
        click.echo(f"{model} is no longer served.")


def _target(text: str) -> DeploymentTarget:
    name, _, percent = text.partition("=")
    if percent and not percent.isdecimal():
        raise click.BadParameter(f"{text!r}: expected a whole percentage after '='", param_hint="TARGET")
    weight = int(percent) if percent else 100
    return (
        DeploymentTarget(version=int(name), weight=weight)
        if name.isdecimal()
        else DeploymentTarget(alias=name, weight=weight)
    )


def _targets(deployment: Deployment) -> str:
    parts = [f"{target.alias or f'version {target.version}'} {target.weight} %" for target in deployment.targets]
    return ", ".join(parts)


def wait_until_ready(client: Client, deployment: Deployment, timeout_s: float) -> None:
    """Returns once the server answers with every version that the deployment names now."""
    wanted = {
        target.version or client.models.get_version(deployment.model, alias=target.alias).number
        for target in deployment.targets
    }
    deadline = time.monotonic() + timeout_s
    while True:
        served = {item.version: item for item in client.deployments.serving(deployment.model) if item.weight}
        for item in served.values():
            if item.version in wanted and item.state == ServingState.SERVING_STATE_FAILED:
                raise click.ClickException(f"{item.model} version {item.version} cannot be served: {item.message}")
        ready = {number for number, item in served.items() if item.state == ServingState.SERVING_STATE_READY}
        if wanted <= ready:
            return
        if time.monotonic() > deadline:
            raise click.ClickException(
                f"{deployment.model} is not ready after {timeout_s:.0f} s. It is recorded all the same: "
                f"look again with `penstock deploy status {deployment.model}`."
            )
        time.sleep(POLL_S)
