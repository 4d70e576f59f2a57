"""`python -m penstock.training.worker`: started by the training service, told what to do on standard input.

One line of JSON holds the orders; the pipe then stays open. Its end means that the service is gone, and with it the
lease.
"""

import asyncio
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import grpc

from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
from penstock.api.training.v1 import worker_service_pb2 as pb
from penstock.training.worker.link import LeaseLostError, Link
from penstock.training.worker.reporter import Reporter
from penstock.training.worker.session import Session

_LEASE_LOST = 3


@dataclass(frozen=True)
class Orders:
    """What the service wrote on standard input."""

    address: str
    job_id: str
    fencing_token: int
    secret: str
    checkpoint_interval_s: float


async def run() -> int:
    """Runs the attempt and tells the exit code. Nothing waits for a thread that still trains."""
    service = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(service), sys.stdin)
    orders = Orders(**json.loads(await service.readline()))
    folder = Path.cwd()
    async with grpc.aio.insecure_channel(orders.address) as channel:
        lease = pb.Lease(job_id=orders.job_id, fencing_token=orders.fencing_token, secret=orders.secret)
        link = Link(channel, lease)
        reporter = Reporter(link, ArtifactServiceStub(channel), orders.checkpoint_interval_s, folder)
        try:
            start = await link.call(link.stub.StartAttempt, pb.StartAttemptRequest(lease=lease))
            session = asyncio.create_task(Session(channel, link, reporter, folder).run(start))
            lease_s = start.lease_duration.ToMicroseconds() / 1e6
            guards = (link.keep_lease(lease_s), reporter.send_for_ever(), _end_of(service))
            tasks = [session, *map(asyncio.create_task, guards)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            (session if session in done else done.pop()).result()
        except LeaseLostError as error:
            sys.stderr.write(f"The worker ends: {error}\n")
            return _LEASE_LOST
    return 0


async def _end_of(service: asyncio.StreamReader) -> None:
    """Raises `LeaseLostError` when the service has closed the pipe."""
    await service.read()
    raise LeaseLostError("the training service is gone")


def main() -> None:
    """Runs the worker and ends the process, with the training thread and without TensorFlow's slow farewell."""
    code = 1
    try:
        code = asyncio.run(run())
    except BaseException:  # the traceback goes to the job's log, and nothing may keep the process
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
