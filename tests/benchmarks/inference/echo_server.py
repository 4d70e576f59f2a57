"""The bound for large tensors: grpc.aio that answers every call with the bytes it got. Argument: the ready file."""

import asyncio
import sys
from pathlib import Path

import grpc
from tests.benchmarks.inference.wire import METHOD, SERVICE


async def echo(request: bytes, _: grpc.aio.ServicerContext) -> bytes:
    return request


async def main() -> None:
    server = grpc.aio.server(
        options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )
    handlers = {METHOD: grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready = Path(sys.argv[1])
    partial = ready.with_suffix(".partial")
    partial.write_text(f"127.0.0.1:{port}", encoding="utf-8")
    partial.replace(ready)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
