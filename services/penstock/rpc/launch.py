"""Runs a service on the transport its settings ask for, in as many processes as they ask for."""

import asyncio
import importlib
import importlib.util
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import SecretStr

from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError

_SUPERVISOR = Path(__file__).with_name("supervise.py")


def run(settings: ServerSettings, application: str) -> None:
    """Serves the application, `module:attribute`, until it is told to stop: by SIGTERM, SIGINT or `stop_on_eof`.

    One grpcio server runs here. For anything else this process becomes a supervisor of a few megabytes, and never comes
    back: what is to happen after the end belongs into another process.

    Raises `StartupError` if the transport, the port, the home or the ready file cannot be had. A supervisor prints it
    on standard error, as `Error: …`, and exits with 1.
    """
    transport = chosen_transport(settings)
    if transport == "grpcio" and settings.workers == 1:
        from penstock.rpc.server import serve  # noqa: PLC0415  # only here, and it is heavy

        module, _, attribute = application.partition(":")
        asyncio.run(serve(settings, getattr(importlib.import_module(module), attribute)(settings)))
        return
    held, port = _reserved_port(settings)
    folder = tempfile.mkdtemp(prefix="penstock-")
    if transport == "envoy":
        from penstock.rpc.envoy import envoy_worker  # noqa: PLC0415  # only where pyvoy is

        workers = [envoy_worker(settings, port, folder, number) for number in range(settings.workers)]
    else:
        argv = [sys.executable, "-m", "penstock.rpc.grpcio_worker"]
        workers = [{"name": "A worker", "argv": argv, "env": dict(os.environ), "admin": None}] * settings.workers
    address = f"{settings.bracketed_host}:{port}"
    plan = {
        "workers": workers,
        "assignments": [_assignment(settings, application, port, folder, number) for number in range(settings.workers)],
        "address": address,
        "folder": folder,
        "drain_s": settings.drain_s,
        "ready_file": str(settings.ready_file) if settings.ready_file else None,
        "stop_on_eof": settings.stop_on_eof,
    }
    _become_supervisor(plan, held)


def chosen_transport(settings: ServerSettings) -> Literal["envoy", "grpcio"]:
    """The transport that serves. Raises `StartupError` if envoy is asked for and cannot run here."""
    if settings.transport == "grpcio":
        return "grpcio"
    missing = missing_for_envoy()
    if not missing:
        return "envoy"
    if settings.transport == "auto":
        return "grpcio"
    raise StartupError(f"The envoy transport cannot run here: {missing}. Or choose --transport grpcio.")


def missing_for_envoy() -> str:
    """What the envoy transport lacks here, and what to do about it; empty where it can run."""
    if importlib.util.find_spec("pyvoy") is None or importlib.util.find_spec("envoy") is None:
        return "the package pyvoy is missing; install it with 'pip install pyvoy' (there are wheels for Linux)"
    from penstock.rpc.envoy import has_python_library  # noqa: PLC0415  # only where pyvoy is

    if not has_python_library():
        return (
            "this Python has no shared library, which the Envoy process loads; install it (Debian: "
            f"libpython{sys.version_info[0]}.{sys.version_info[1]})"
        )
    return ""


def _reserved_port(settings: ServerSettings) -> tuple[socket.socket, int]:
    """A socket that holds the port without listening, so that the workers can listen there and no other user can."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # Whoever listens there already shows only to a socket that does not offer to share.
        with socket.socket(family, kind, protocol) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            port = alone.getsockname()[1]
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((address[0], port, *address[2:]))
    except OSError as error:
        raise settings.cannot_listen() from error
    return held, port


def _assignment(settings: ServerSettings, application: str, port: int, folder: str, number: int) -> dict[str, Any]:
    """What a worker is told: on its socket, as arguments and variables can be read by others."""
    kind = type(settings)
    values = {name: getattr(settings, name) for name in kind.model_fields}
    return {
        "settings": f"{kind.__module__}:{kind.__qualname__}",
        "values": {**values, "port": port},
        "application": application,
        "worker": number if settings.workers > 1 else None,
        "folder": folder,
    }


def _plain(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _become_supervisor(plan: dict[str, Any], held: socket.socket) -> NoReturn:
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the supervisor closes it
    file.write(json.dumps(plan, default=_plain).encode())
    file.seek(0)
    descriptors: Sequence[int] = (file.fileno(), held.fileno())
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    sys.stdout.flush()
    sys.stderr.flush()
    # No site-packages: this process only waits, and its memory counts beside the workers'.
    argv = [sys.executable, "-I", "-S", str(_SUPERVISOR), *map(str, descriptors)]
    os.execv(sys.executable, argv)  # noqa: S606  # our own interpreter and file
