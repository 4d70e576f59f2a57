"""Pages of lists: bounded in number and in bytes."""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message
from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.rpc.validation import NAME, Violations, decode_page_token, encode_page_token

# Half of what a gRPC client takes unless told otherwise.
PAGE_BYTES = 2 * 1024 * 1024

_MAX_INT64 = 2**63 - 1

M = TypeVar("M", bound=Message)
R = TypeVar("R")


async def read_page(
    session: AsyncSession,
    query: Select[R],
    size: int,
    message_of: Callable[[R], M],
    key: Callable[[R], object],
) -> tuple[list[M], str]:
    """The messages of the query's first `size` rows, fewer if they would pass `PAGE_BYTES`, and the next page's token.

    The token is made from the last row's key.
    """
    messages: list[M] = []
    total_bytes = 0
    last_key = ""
    rows = await session.stream_scalars(query.limit(size + 1).execution_options(yield_per=20))
    try:
        async for row in rows:
            message = message_of(row)
            total_bytes += message.ByteSize()
            if len(messages) == size or (messages and total_bytes > PAGE_BYTES):
                return messages, encode_page_token(last_key)
            messages.append(message)
            last_key = str(key(row))
    finally:
        await rows.close()
    return messages, ""


def name_token(violations: Violations, token: str) -> str:
    """The name after which a page begins; empty for the first page."""
    name = decode_page_token(violations, token)
    if name and not NAME.fullmatch(name):
        violations.add("page_token", "expected the next_page_token of an earlier answer")
    return name


def number_token(violations: Violations, token: str) -> int:
    """The number below which a page begins; above all numbers for the first page."""
    text = decode_page_token(violations, token)
    if not text:
        return _MAX_INT64
    if len(text) > 19 or not (text.isascii() and text.isdigit()):
        violations.add("page_token", "expected the next_page_token of an earlier answer")
        return _MAX_INT64
    return min(int(text), _MAX_INT64)
