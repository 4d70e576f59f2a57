"""Pauses between tries."""

import random
from collections.abc import Iterator

FIRST_S = 0.5
LONGEST_S = 30.0


def delays_s() -> Iterator[float]:
    """Seconds before each next try, doubling up to `LONGEST_S`; cut by up to half, so a fleet does not try at once."""
    delay_s = FIRST_S
    while True:
        yield delay_s * random.uniform(0.5, 1)  # noqa: S311  # spreads load, guards nothing
        delay_s = min(2 * delay_s, LONGEST_S)
