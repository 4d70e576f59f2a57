"""Lists that come in pages."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

from penstock.client.errors import answer


class Page(Protocol):
    """An answer that may have a next page."""

    @property
    def next_page_token(self) -> str: ...


P = TypeVar("P", bound=Page)
Item = TypeVar("Item")


async def all_pages(fetch: Callable[[str], Awaitable[P]], items: Callable[[P], Iterable[Item]]) -> list[Item]:
    """Every item of every page. `fetch` gets a page by its token, `items` takes what it lists."""
    found: list[Item] = []
    token = ""
    while True:
        page = await answer(fetch(token))
        found.extend(items(page))
        token = page.next_page_token
        if not token:
            return found
