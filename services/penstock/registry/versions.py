"""Versions, and the blobs they refer to."""

import asyncio

import structlog
from sqlalchemy import Select, delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.api.registry.v1 import model_pb2
from penstock.registry import tables
from penstock.registry.lookups import aliases_of, deployed_targets, find_model, find_version
from penstock.registry.manifest import MANIFEST, manifest_of
from penstock.registry.store import Change, Store
from penstock.rpc.errors import ExistsError, InUseError, InvalidFieldError, NotFoundError, Violation
from penstock.storage.blobs import BlobStore

# Others wait while blobs are deleted: not for long.
_DISCARDED_A_TURN = 100

_log = structlog.get_logger("penstock.registry")


async def newest(session: AsyncSession, model: str) -> tables.Version:
    """The version with the highest number. Raises `NotFoundError` if there is no such model or it has no versions."""
    query = select(tables.Version).where(tables.Version.model == model).order_by(tables.Version.number.desc())
    row = await session.scalar(query.limit(1))
    if row is None:
        await find_model(session, model)
        raise NotFoundError("version", f"{model}/newest", "The model has no versions; make one with CreateVersion.")
    return row


def below(model: str, number: int) -> Select[tables.Version]:
    """A model's versions below a number, newest first."""
    query = select(tables.Version).where(tables.Version.model == model, tables.Version.number < number)
    return query.order_by(tables.Version.number.desc())


async def create(change: Change, blobs: BlobStore, wanted: model_pb2.Version, request_id: str) -> model_pb2.Version:
    """Registers a version under its model's next number.

    The blobs are looked up, and the manifest is written, inside the transaction: `discard_unused` cannot come between.

    Raises:
        NotFoundError: there is no such model, or a blob is missing.
        InvalidFieldError: a blob has another size than the version says.
        ExistsError: `request_id` made another version.
    """
    if request_id and (made := await _made_by(change.session, request_id)) is not None:
        if _input_of(made) != _input_of(wanted):
            raise ExistsError(
                f"The request id {request_id!r} made version {made.model}/{made.number}, which differs from this one. "
                f"Choose a fresh request id for each version.",
                resource_type="version",
                resource_name=f"{made.model}/{made.number}",
            )
        return made
    model = await find_model(change.session, wanted.model)
    await _check_blobs(blobs, wanted)
    model.latest_version += 1
    version = await _completed(blobs, wanted, model.latest_version)
    change.session.add(
        tables.Version(
            model=version.model,
            number=version.number,
            request_id=request_id or None,
            content=version.SerializeToString(),
        )
    )
    await change.session.flush()
    change.session.add_all(
        tables.VersionBlob(digest=digest, model=version.model, number=version.number) for digest in _digests(version)
    )
    change.record("CreateVersion", f"{version.model}/{version.number}", None, version)
    return version


async def remove(change: Change, model: str, number: int) -> set[str]:
    """Removes a version and returns the digests it referred to.

    Raises:
        NotFoundError: there is no such model or version.
        InUseError: an alias or a deployment refers to it.
    """
    row = await find_version(change.session, model, number)
    if pointing := await aliases_of(change.session, model, number):
        raise InUseError(
            f"The version {model}/{number} has the aliases {', '.join(pointing)}. Move or delete them first."
        )
    if number in await deployed_targets(change.session, model):
        raise InUseError(f"The deployment of {model!r} serves version {number}. Change the deployment first.")
    version = row.message()
    change.record("DeleteVersion", f"{model}/{number}", version, None)
    await change.session.execute(
        delete(tables.VersionBlob).where(tables.VersionBlob.model == model, tables.VersionBlob.number == number)
    )
    await change.session.delete(row)
    return _digests(version)


async def discard_unused(store: Store, blobs: BlobStore, digests: set[str]) -> None:
    """Deletes those of the blobs that no version refers to; called after the change that gave the references up.

    A crash before or within leaves garbage, never a reference to nothing. Each step is a change of its own, which
    keeps `create` from taking up a blob that is just being deleted. A blob that cannot be deleted is garbage too:
    the versions are gone, so the caller's work is done.
    """
    waiting = sorted(digests)
    for start in range(0, len(waiting), _DISCARDED_A_TURN):
        async with store.change() as change:
            await _discard(change.session, blobs, waiting[start : start + _DISCARDED_A_TURN])


async def _discard(session: AsyncSession, blobs: BlobStore, digests: list[str]) -> None:
    query = select(tables.VersionBlob.digest).where(tables.VersionBlob.digest.in_(digests))
    used = set(await session.scalars(query))
    unused = [digest for digest in digests if digest not in used]
    results = await asyncio.gather(*(blobs.delete(digest) for digest in unused), return_exceptions=True)
    for digest, result in zip(unused, results, strict=True):
        if isinstance(result, Exception):
            _log.warning("unused blob cannot be deleted", digest=digest, error=str(result))


async def _made_by(session: AsyncSession, request_id: str) -> model_pb2.Version | None:
    row = await session.scalar(select(tables.Version).where(tables.Version.request_id == request_id))
    return None if row is None else row.message()


def _input_of(version: model_pb2.Version) -> bytes:
    """What the client gave, as bytes: unlike messages they compare equal where a metric is NaN."""
    given = model_pb2.Version()
    given.CopyFrom(version)
    for output_only in ("number", "bundle_digest", "create_time"):
        given.ClearField(output_only)
    given.files.pop(MANIFEST, None)
    return given.SerializeToString(deterministic=True)


async def _check_blobs(blobs: BlobStore, version: model_pb2.Version) -> None:
    names = sorted(version.files)
    sizes = await asyncio.gather(*(blobs.size(version.files[name].digest) for name in names))
    wrong: list[Violation] = []
    for name, size in zip(names, sizes, strict=True):
        blob = version.files[name]
        if size is None:
            remedy = f"The file {name!r} needs it: write it with ArtifactService, then repeat the call."
            raise NotFoundError("blob", blob.digest, remedy)
        if size != blob.size_bytes:
            field = f'version.files["{name}"].size_bytes'
            wrong.append(Violation(field, f"the blob has {size:,} bytes; got {blob.size_bytes:,}"))
    if wrong:
        raise InvalidFieldError(wrong)


async def _completed(blobs: BlobStore, wanted: model_pb2.Version, number: int) -> model_pb2.Version:
    """The version with its output-only fields, its manifest stored."""
    version = model_pb2.Version()
    version.CopyFrom(wanted)
    manifest = await blobs.write(manifest_of(wanted))
    version.files[MANIFEST].digest = manifest.digest
    version.files[MANIFEST].size_bytes = manifest.size_bytes
    version.number = number
    version.bundle_digest = manifest.digest
    version.create_time.FromMicroseconds(tables.now_us())
    return version


def _digests(version: model_pb2.Version) -> set[str]:
    return {blob.digest for blob in version.files.values()}
