"""Models, through the wire."""

from pathlib import Path

import grpc
import pytest
from tests.integration.registry.registries import Registry, insert_rows, refusal, served

from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.registry import tables


async def create(registry: Registry, name: str, description: str = "") -> pb.CreateModelResponse:
    return await registry.models.CreateModel(
        pb.CreateModelRequest(model={"name": name, "description": description, "latest_version": 7})
    )


async def test_creates_and_gets(registry: Registry) -> None:
    created = (await create(registry, "digits", "handwritten")).model

    assert (created.name, created.description, created.latest_version) == ("digits", "handwritten", 0)
    assert created.create_time.seconds > 0
    assert (await registry.models.GetModel(pb.GetModelRequest(name="digits"))).model == created


async def test_creating_again_returns_the_first(registry: Registry) -> None:
    first = await create(registry, "digits", "handwritten")

    assert await create(registry, "digits", "handwritten") == first
    code, text, _ = await refusal(create(registry, "digits", "printed"))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert "'digits' exists with the description 'handwritten'" in text


async def test_unknown_model(registry: Registry) -> None:
    for call in (
        registry.models.GetModel(pb.GetModelRequest(name="absent")),
        registry.models.DeleteModel(pb.DeleteModelRequest(name="absent")),
        registry.models.GetVersion(pb.GetVersionRequest(model="absent")),
        registry.models.GetVersion(pb.GetVersionRequest(model="absent", number=1)),
        registry.models.GetVersion(pb.GetVersionRequest(model="absent", alias="champion")),
        registry.models.ListVersions(pb.ListVersionsRequest(model="absent")),
        registry.models.DeleteVersion(pb.DeleteVersionRequest(model="absent", number=1)),
        registry.models.SetAlias(pb.SetAliasRequest(model="absent", alias="champion", version=1)),
        registry.models.ListAliases(pb.ListAliasesRequest(model="absent")),
        registry.models.ListAliasMoves(pb.ListAliasMovesRequest(model="absent", alias="champion")),
        registry.models.DeleteAlias(pb.DeleteAliasRequest(model="absent", alias="champion")),
        registry.version("absent"),
    ):
        code, text, _ = await refusal(call)
        assert code == grpc.StatusCode.NOT_FOUND
        assert "There is no model 'absent'" in text


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 1000])
async def test_lists_by_name_in_pages(registry: Registry, page_size: int) -> None:
    names = ["a", "b-2", "b.1", "c_3", "d"]
    for name in reversed(names):
        await create(registry, name)

    listed: list[str] = []
    sizes: list[int] = []
    token = ""
    while True:
        page = await registry.models.ListModels(pb.ListModelsRequest(page_size=page_size, page_token=token))
        listed += [model.name for model in page.models]
        sizes.append(len(page.models))
        token = page.next_page_token
        if not token:
            break

    assert listed == names
    assert all(size == page_size for size in sizes[:-1])
    assert sizes[-1] > 0


async def test_a_page_is_what_a_client_can_receive(tmp_path: Path) -> None:
    """A client takes 4 MiB unless told otherwise; 1,000 models with long descriptions have more."""
    count = 750
    rows = [
        {"name": f"m{number:04}", "description": "\N{SNOWMAN}" * 1000, "latest_version": 0, "create_time_us": 1}
        for number in range(count)
    ]
    async with served(tmp_path) as registry:
        insert_rows(tmp_path, tables.Model, rows)

        first = await registry.models.ListModels(pb.ListModelsRequest(page_size=1000))
        rest = await registry.models.ListModels(pb.ListModelsRequest(page_size=1000, page_token=first.next_page_token))

    assert len(first.models) < count
    assert first.ByteSize() < 2.1 * 1024 * 1024
    assert len(first.models) + len(rest.models) == count


async def test_deletes_with_all_that_is_under_it(registry: Registry) -> None:
    await registry.model(versions=2)
    await registry.alias("champion", 2)

    await registry.models.DeleteModel(pb.DeleteModelRequest(name="digits"))

    code, _, _ = await refusal(registry.models.GetModel(pb.GetModelRequest(name="digits")))
    assert code == grpc.StatusCode.NOT_FOUND
    await registry.model()
    assert (await registry.models.ListVersions(pb.ListVersionsRequest(model="digits"))).versions == []
    assert (await registry.models.ListAliases(pb.ListAliasesRequest(model="digits"))).aliases == []
    code, _, _ = await refusal(
        registry.models.ListAliasMoves(pb.ListAliasMovesRequest(model="digits", alias="champion"))
    )
    assert code == grpc.StatusCode.NOT_FOUND
    assert (await registry.version()).number == 1
