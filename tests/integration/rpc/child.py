"""A server in a process of its own. Its settings are the first argument, as JSON; exits with 1 if it cannot start."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.integration.rpc.probe import Probe, ProbeSettings, nothing

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.rpc.errors import StartupError
from penstock.rpc.server import Application, serve
from penstock.storage.home import locked_home


async def query(request: pb.QueryWriteStatusRequest) -> pb.QueryWriteStatusResponse:
    if request.digest == "fail":
        raise RuntimeError("a secret of the server")
    return pb.QueryWriteStatusResponse(complete=True)


@asynccontextmanager
async def application(settings: ProbeSettings) -> AsyncIterator[Application]:
    with locked_home(settings.service_home):
        yield Application([Probe(query=query).service()], nothing)


if __name__ == "__main__":
    try:
        given = ProbeSettings.load(json.loads(sys.argv[1]))
        asyncio.run(serve(given, application(given)))
    except StartupError as error:
        sys.exit(f"StartupError: {error}")
