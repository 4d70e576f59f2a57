"""Penstock's client: `Client` for ordinary code, `AsyncClient` for asyncio."""
