"""Where the services are, and how a call to them is made."""

import json
import os
from dataclasses import dataclass, field

import grpc

from penstock.api.dataset.v1 import dataset_service_pb2
from penstock.api.inference.v1 import serving_service_pb2
from penstock.api.registry.v1 import artifact_service_pb2, deployment_service_pb2, registry_service_pb2
from penstock.api.training.v1 import training_service_pb2

_FILES = (
    artifact_service_pb2,
    dataset_service_pb2,
    deployment_service_pb2,
    registry_service_pb2,
    serving_service_pb2,
    training_service_pb2,
)
_READING = ("Get", "List", "Query")


def _address(service: str, port: int) -> str:
    return os.environ.get(f"PENSTOCK_{service}_ADDRESS") or f"127.0.0.1:{port}"


@dataclass(frozen=True)
class Addresses:
    """`host:port` of each service. The default is PENSTOCK_REGISTRY_ADDRESS and its like, or else this machine."""

    registry: str = field(default_factory=lambda: _address("REGISTRY", 8011))
    training: str = field(default_factory=lambda: _address("TRAINING", 8021))
    inference: str = field(default_factory=lambda: _address("INFERENCE", 8001))


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel without message limits of its own; it repeats calls that only read while the server is away."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.service_config", _service_config()),
        ],
    )


def _service_config() -> str:
    methods = [
        {"service": service.full_name, "method": method.name}
        for file in _FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.name.startswith(_READING)
    ]
    retry = {
        "maxAttempts": 5,
        "initialBackoff": "0.1s",
        "maxBackoff": "2s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": methods, "retryPolicy": retry}]})
