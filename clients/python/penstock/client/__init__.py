"""Penstock's client: `Client` for ordinary code, `AsyncClient` for asyncio."""

from penstock.client.aio import AsyncClient
from penstock.client.channel import Addresses
from penstock.client.errors import PenstockError, Violation
from penstock.client.inference import InferResult
from penstock.client.sync import Client

__all__ = ["Addresses", "AsyncClient", "Client", "InferResult", "PenstockError", "Violation"]
