"""Aliases and their history, through the wire."""

from pathlib import Path

import grpc
from tests.integration.registry.registries import Registry, insert_rows, refusal, served

from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.registry import tables


async def moves(registry: Registry, alias: str, **fields: object) -> pb.ListAliasMovesResponse:
    return await registry.models.ListAliasMoves(pb.ListAliasMovesRequest(model="digits", alias=alias, **fields))


async def test_moves_and_remembers(registry: Registry) -> None:
    await registry.model(versions=3)
    await registry.alias("champion", 1, reason="the first")
    await registry.alias("champion", 3, reason="better")
    await registry.alias("champion", 2, reason="3 was slow")
    await registry.models.DeleteAlias(pb.DeleteAliasRequest(model="digits", alias="champion", reason="no more"))
    await registry.alias("champion", 1)

    first = await moves(registry, "champion", page_size=3)
    rest = await moves(registry, "champion", page_size=3, page_token=first.next_page_token)

    history = [(move.from_version, move.to_version, move.reason) for move in (*first.moves, *rest.moves)]
    assert history == [(0, 1, ""), (2, 0, "no more"), (3, 2, "3 was slow"), (1, 3, "better"), (0, 1, "the first")]
    assert rest.next_page_token == ""
    assert all(move.time.seconds > 0 for move in first.moves)


async def test_history_outlives_the_alias(registry: Registry) -> None:
    await registry.model(versions=1)
    await registry.alias("champion", 1)
    await registry.models.DeleteAlias(pb.DeleteAliasRequest(model="digits", alias="champion"))

    assert [move.to_version for move in (await moves(registry, "champion")).moves] == [0, 1]
    code, _, _ = await refusal(moves(registry, "never"))
    assert code == grpc.StatusCode.NOT_FOUND
    code, text, _ = await refusal(registry.models.DeleteAlias(pb.DeleteAliasRequest(model="digits", alias="champion")))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "alias 'digits/champion'" in text


async def test_setting_it_where_it_is_does_nothing(registry: Registry) -> None:
    await registry.model(versions=1)
    request = pb.SetAliasRequest(model="digits", alias="champion", version=1)
    first = await registry.models.SetAlias(request)

    assert await registry.models.SetAlias(request) == first
    assert len((await moves(registry, "champion")).moves) == 1


async def test_expected_version(registry: Registry) -> None:
    await registry.model(versions=2)
    await registry.alias("champion", 1, expected_version=0)

    for expected in (0, 2):
        code, text, _ = await refusal(registry.alias("champion", 2, expected_version=expected))
        assert code == grpc.StatusCode.ABORTED
        assert f"points at version 1, not {expected}" in text
    code, _, _ = await refusal(registry.alias("challenger", 2, expected_version=1))
    assert code == grpc.StatusCode.ABORTED

    await registry.alias("champion", 2, expected_version=1)
    listed = (await registry.models.ListAliases(pb.ListAliasesRequest(model="digits"))).aliases
    assert [(alias.name, alias.version) for alias in listed] == [("champion", 2)]


async def test_an_alias_stands_for_a_version_that_is_there(registry: Registry) -> None:
    await registry.model(versions=1)

    code, text, _ = await refusal(registry.alias("champion", 2))

    assert code == grpc.StatusCode.NOT_FOUND
    assert "version 'digits/2'" in text


async def test_lists_by_name(registry: Registry) -> None:
    await registry.model(versions=2)
    await registry.model("others", versions=1)
    await registry.alias("stable", 1)
    await registry.alias("canary", 2)
    await registry.alias("champion", 1, model="others")

    listed = (await registry.models.ListAliases(pb.ListAliasesRequest(model="digits"))).aliases

    assert [(alias.model, alias.name, alias.version) for alias in listed] == [
        ("digits", "canary", 2),
        ("digits", "stable", 1),
    ]


async def test_a_model_has_at_most_a_thousand(tmp_path: Path) -> None:
    async with served(tmp_path) as registry:
        await registry.model(versions=1)
        rows = [{"model": "digits", "name": f"a{number}", "version": 1, "update_time_us": 1} for number in range(1000)]
        insert_rows(tmp_path, tables.Alias, rows)

        code, text, _ = await refusal(registry.alias("one-more", 1))

        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1,000 aliases" in text
        await registry.version()
        await registry.alias("a0", 2)
        assert len((await registry.models.ListAliases(pb.ListAliasesRequest(model="digits"))).aliases) == 1000
