"""How gRPC writes messages, metadata, statuses and deadlines into HTTP/2.

After the protocol's own description, github.com/grpc/grpc doc/PROTOCOL-HTTP2.md, and doc/compression.md beside it.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from penstock.rpc.errors import InvalidFieldError, LimitExceededError, UnimplementedError
from penstock.rpc.methods import Buffer

PREFIX_BYTES = 5
ACCEPTED = b"identity,gzip,deflate"

# zlib's window bits say which header surrounds the stream.
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_VALUE = re.compile(r"[\x20-\x7e]*")
_KEY = re.compile(r"[a-z0-9_.-]+")
# What the transport says to itself, which no handler asks for.
_NOT_METADATA = frozenset((b"host", b"te", b"content-type", b"content-length", b"x-forwarded-proto"))

Header = tuple[bytes, bytes]


def prefix(size: int, compressed: bool = False) -> bytes:  # the protocol's own first byte
    return (b"\1" if compressed else b"\0") + size.to_bytes(4, "big")


def message_size(head: Buffer, max_bytes: int) -> int:
    """The size that a message's five-byte prefix announces. Raises before a byte of too large a one is kept."""
    size = int.from_bytes(head[1:PREFIX_BYTES], "big")
    if size > max_bytes:
        raise LimitExceededError(
            f"The message has {size:,} bytes; this server takes at most {max_bytes:,} in one. Send less at once, or "
            f"raise max_message_mib."
        )
    if head[0] > 1:
        raise InvalidFieldError.of("request", f"its frame begins with {head[0]}; expected 0 or 1")
    return size


def inflated(data: Buffer, encoding: bytes, max_bytes: int) -> bytes:
    """A compressed message's bytes. The bound holds while it grows: a small bomb never becomes large."""
    window_bits = _WINDOW_BITS.get(encoding)
    if window_bits is None:
        raise InvalidFieldError.of("request", "a frame says it is compressed; grpc-encoding does not say how")
    inflater = zlib.decompressobj(window_bits)
    try:
        plain = inflater.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise InvalidFieldError.of("request", f"its bytes are not {encoding.decode()}") from error
    if len(plain) > max_bytes:
        raise LimitExceededError(f"The message has more than {max_bytes:,} bytes once it is decompressed.")
    if not inflater.eof:
        raise InvalidFieldError.of("request", f"its {encoding.decode()} ends too early")
    return plain


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(level=6, wbits=31)
    return compressor.compress(data) + compressor.flush()


def check_encoding(encoding: bytes) -> None:
    if encoding != b"identity" and encoding not in _WINDOW_BITS:
        name = encoding[:40].decode(errors="replace")
        raise UnimplementedError(f"Messages compressed with {name!r} are not taken; send {ACCEPTED.decode()}.")


def timeout_s(value: bytes) -> float:
    """The seconds of a `grpc-timeout` header."""
    found = _TIMEOUT.fullmatch(value)
    if found is None:
        shown = value[:40].decode(errors="replace")
        raise InvalidFieldError.of("grpc-timeout", f"expected up to eight digits and one of HMSmun; got {shown!r}")
    return int(found[1]) * _UNIT_S[found[2]]


def percent_encoded(text: str) -> bytes:
    """Text as `grpc-message` carries it: printable ASCII stays, all else becomes %XX of its UTF-8."""
    return quote(text, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}", errors="replace").encode()


def metadata(headers: Iterable[Header]) -> tuple[tuple[str, str | bytes], ...]:
    """The caller's metadata. A binary value that is no base64 is left out, as grpc does."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name in _NOT_METADATA or name.startswith((b"grpc-", b":")):
            continue
        key = name.decode("latin-1")
        if not key.endswith("-bin"):
            found.append((key, value.decode("latin-1")))
            continue
        for part in value.split(b","):
            padded = part.strip() + b"=" * (-len(part.strip()) % 4)
            try:
                found.append((key, base64.b64decode(padded, validate=True)))
            except binascii.Error:
                continue
    return tuple(found)


def metadata_headers(pairs: Iterable[tuple[str, str | bytes]] | Mapping[str, str | bytes]) -> list[Header]:
    """Metadata of ours as headers. Raises `ValueError` for a key or value that gRPC cannot carry."""
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    headers = []
    for key, value in items:
        if not _KEY.fullmatch(key):
            raise ValueError(f"expected a metadata key of a-z, 0-9, '_', '-' and '.'; got {key!r}")
        if key.endswith("-bin"):
            data = value.encode() if isinstance(value, str) else value
            headers.append((key.encode(), base64.b64encode(data).rstrip(b"=")))
        else:
            text = value if isinstance(value, str) else value.decode("latin-1")
            if not _VALUE.fullmatch(text):
                raise ValueError(f"expected printable ASCII for the metadata {key!r}; use a key that ends with '-bin'")
            headers.append((key.encode(), text.encode()))
    return headers
