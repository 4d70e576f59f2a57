"""Checks of request fields at the edge. Every violation is collected, so a caller hears of all of them at once."""

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.rpc.errors import InvalidFieldError, Violation

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
MAX_TEXT = 1000
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100


class Violations:
    """What is wrong with one request."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(Violation(field, description))

    def require(self, holds: bool, field: str, description: str) -> None:
        if not holds:
            self.add(field, description)

    def name(self, field: str, value: str) -> None:
        """A resource name: 1 to 63 of a–z, 0–9, `-`, `_`, `.`, the first a letter or digit."""
        expected = "expected 1 to 63 of a-z, 0-9, '-', '_', '.', the first a letter or digit"
        self.require(NAME.fullmatch(value) is not None, field, f"{expected}; got {value[:80]!r}")

    def request_id(self, field: str, value: str) -> None:
        """An id chosen by the client to make a call repeatable. Empty is allowed."""
        fits = not value or REQUEST_ID.fullmatch(value) is not None
        self.require(fits, field, f"expected at most 64 letters, digits, '-' and '_'; got {value[:80]!r}")

    def digest(self, field: str, value: str) -> None:
        fits = DIGEST.fullmatch(value) is not None
        self.require(fits, field, f"expected 'sha256:' and 64 lower-case hexadecimal digits; got {value[:80]!r}")

    def file_name(self, field: str, value: str) -> None:
        """The name of a bundle's file: one that is no path and hides nothing."""
        expected = "expected a name of 1 to 200 letters, digits, '-', '_' and '.' that does not begin with '.'"
        self.require(FILE_NAME.fullmatch(value) is not None, field, f"{expected}; got {value[:80]!r}")

    def text(self, field: str, value: str) -> None:
        self.require(len(value) <= MAX_TEXT, field, f"expected at most {MAX_TEXT} characters; got {len(value)}")

    def within(self, field: str, value: float, low: float, high: float) -> None:
        self.require(low <= value <= high, field, f"expected {low:,} to {high:,}; got {value:,}")

    def raise_if_any(self) -> None:
        if self._found:
            raise InvalidFieldError(self._found)


@contextmanager
def validating() -> Iterator[Violations]:
    """Collects the violations of a block and raises `InvalidFieldError` at its end if there are any."""
    violations = Violations()
    yield violations
    violations.raise_if_any()


def page_size(violations: Violations, value: int) -> int:
    """The number of resources to return for a request's `page_size`."""
    violations.within("page_size", value, 0, MAX_PAGE_SIZE)
    return value or DEFAULT_PAGE_SIZE


def encode_page_token(last_key: str) -> str:
    """The token of the page that begins after a key. Opaque to clients."""
    return base64.urlsafe_b64encode(last_key.encode()).decode()


def decode_page_token(violations: Violations, token: str) -> str:
    """The key a token was made from; empty for the first page."""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except ValueError:
        violations.add("page_token", "expected the next_page_token of an earlier answer")
        return ""
