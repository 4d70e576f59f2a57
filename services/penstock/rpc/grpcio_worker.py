"""One of several grpcio servers behind a port: `python -m penstock.rpc.grpcio_worker`, started by the supervisor."""

import asyncio
import shutil

import structlog

from penstock.rpc.server import listening
from penstock.rpc.worker import Control

_log = structlog.get_logger("penstock.server")


async def _main() -> None:
    control = await Control.opened()
    try:
        assignment = await control.assignment()
        settings = assignment.settings
        async with (
            assignment.application(settings) as running,
            listening(settings, running, share_port=True) as address,
        ):
            control.say("started")
            if await control.told() == "announce":
                _log.info("ready", address=address)
                control.say("serving")
                await control.told()
            _log.info("draining", limit_s=settings.drain_s)
        _log.info("stopped")
        control.say("stopped")
        if control.orphaned:
            shutil.rmtree(assignment.folder, ignore_errors=True)
    except Exception as error:
        control.say_failed(error)
    await control.closed()


if __name__ == "__main__":
    asyncio.run(_main())
