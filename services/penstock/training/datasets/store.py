"""The datasets of this service: their rows in the database, their bytes in a blob store."""

import asyncio
import errno
import hashlib
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

import structlog
from sqlalchemy import delete, or_, select

from penstock.api.dataset.v1.dataset_pb2 import Dataset, Split
from penstock.api.dataset.v1.dataset_service_pb2 import ReadDatasetResponse
from penstock.rpc.errors import (
    ConflictError,
    ExistsError,
    InUseError,
    InvalidFieldError,
    NotFoundError,
    NotReadyError,
    StorageFullError,
)
from penstock.rpc.validation import validating
from penstock.storage.artifacts import receive
from penstock.storage.blobs import CHUNK_BYTES, BlobRef, BlobStore
from penstock.storage.database import Database
from penstock.storage.paging import read_page
from penstock.training.datasets.columns import ColumnFile, write_columns
from penstock.training.datasets.parse import MAX_LINE_BYTES, read_batches, read_schema
from penstock.training.datasets.split import DEFAULT_RECIPE, row_order, split_counts, split_range
from penstock.training.tables import FINAL_STATES, DatasetRow, JobRow, audit

_log = structlog.get_logger("penstock.datasets")


class DatasetStore:
    """Creates, finds, reads and deletes datasets. `folder` is for files that do not outlive a call."""

    def __init__(self, database: Database, blobs: BlobStore, folder: Path) -> None:
        self._database = database
        self._blobs = blobs
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One dataset at a time is parsed or deleted: it bounds memory, and no two decide about one blob.
        self._turn = asyncio.Lock()
        self._settling: set[asyncio.Task[Dataset]] = set()
        self._stopping = threading.Event()

    async def close(self) -> None:
        """Gives up what is being parsed; the uploads are kept."""
        self._stopping.set()
        await asyncio.gather(*self._settling, return_exceptions=True)

    async def create(self, dataset: Dataset, offset: int, chunks: AsyncIterator[bytes]) -> Dataset:
        """Takes the rest of an upload, parses it and creates the dataset.

        Raises:
            InvalidFieldError: a row does not parse, there are too many, or the digest differs; the upload is discarded.
            ExistsError: the name stands for another dataset.
            WrongOffsetError, ConflictError, StorageFullError: as `BlobStore.upload`.
            ConflictError: the bytes were discarded with those of another dataset.
        """
        if existing := await self._same(dataset):
            return existing
        ref = BlobRef(dataset.content.digest, dataset.content.size_bytes)
        if await self._blobs.size(ref.digest) != ref.size_bytes:
            async with self._blobs.upload(ref, offset) as upload:
                await receive(upload, chunks, ref)
        # Every byte has come, so the rest needs no client who waits for it: one who asks again finds it done.
        task = asyncio.create_task(self._settle(dataset))
        self._settling.add(task)
        task.add_done_callback(self._settled)
        return await asyncio.shield(task)

    async def committed(self, digest: str) -> int:
        return await self._blobs.committed(digest)

    async def get(self, name: str) -> Dataset:
        """Raises `NotFoundError`."""
        return Dataset.FromString((await self._row(name)).message)

    async def page(self, after: str, size: int) -> tuple[list[Dataset], str]:
        """A page of datasets by name, those after the name `after`, and the token of the next one."""
        query = select(DatasetRow).where(DatasetRow.name > after).order_by(DatasetRow.name)
        async with self._database.snapshot() as session:
            return await read_page(
                session, query, size, lambda row: Dataset.FromString(row.message), lambda row: row.name
            )

    async def delete(self, name: str) -> None:
        """Raises `NotFoundError`, or `InUseError` while a job that has not ended uses the dataset."""
        async with self._turn:
            async with self._database.transaction() as session:
                row = await session.get(DatasetRow, name, with_for_update=True)
                if row is None:
                    raise NotFoundError("dataset", name)
                used = select(JobRow.job_id).where(JobRow.dataset == name, JobRow.state.not_in(FINAL_STATES)).limit(1)
                if job_id := await session.scalar(used):
                    raise InUseError(f"Job {job_id} uses dataset {name!r}. Wait until it has ended, or cancel it.")
                await session.execute(delete(DatasetRow).where(DatasetRow.name == name))
                audit(session, "dataset.delete", name, digest=row.content_digest)
            await self._discard_unused(row.content_digest, row.columns_digest)

    async def read(
        self, name: str, split: "Split.ValueType", columns: Sequence[str], first_row: int
    ) -> AsyncIterator[ReadDatasetResponse]:
        """The rows of a split from its row `first_row` on.

        Raises `NotFoundError`, `CorruptedError`, or `InvalidFieldError` for an unknown column.
        """
        row = await self._row(name)
        dataset = Dataset.FromString(row.message)
        known = {column.name for column in dataset.columns}
        with validating() as violations:
            for index, column in enumerate(columns):
                violations.require(
                    column in known, f"columns[{index}]", f"expected a column of the dataset; got {column[:80]!r}"
                )
            # A column many times over would make a message of any size out of one row.
            violations.require(len(set(columns)) == len(columns), "columns", "expected each column once")
        names = columns or [column.name for column in dataset.columns]
        rows = split_range(split, dataset.split_counts)[first_row:]
        async with self._columns(row, dataset) as file:
            position = rows.start
            while position < rows.stop:
                message = await asyncio.to_thread(file.message, names, position, rows.stop)
                position += _row_count(message)
                yield message

    async def count_classes(self, name: str, column: str, limit: int) -> int:
        """How many distinct values a column has in the training split; counting ends above `limit`."""
        row = await self._row(name)
        dataset = Dataset.FromString(row.message)
        rows = split_range(Split.SPLIT_TRAIN, dataset.split_counts)
        async with self._columns(row, dataset) as file:
            return await asyncio.to_thread(file.distinct, column, rows, limit)

    async def _row(self, name: str) -> DatasetRow:
        async with self._database.snapshot() as session:
            row = await session.get(DatasetRow, name)
        if row is None:
            raise NotFoundError("dataset", name)
        return row

    async def _same(self, dataset: Dataset) -> Dataset | None:
        """The dataset itself, if it exists already. Raises `ExistsError` if the name stands for another one."""
        async with self._database.snapshot() as session:
            row = await session.get(DatasetRow, dataset.name)
        if row is None:
            return None
        existing = Dataset.FromString(row.message)
        wanted = _inputs(dataset)
        if not wanted.columns:
            wanted.columns.extend(existing.columns)
        if wanted != _inputs(existing):
            raise ExistsError(
                f"Dataset {dataset.name!r} exists with other content or another schema. Choose another name."
            )
        return existing

    async def _settle(self, dataset: Dataset) -> Dataset:
        """Parses an upload that is complete, and makes the dataset visible."""
        async with self._turn:
            try:
                if existing := await self._same(dataset):
                    return existing
                created, columns = await self._parsed(dataset)
            except (InvalidFieldError, ExistsError):
                await self._discard_unused(dataset.content.digest)
                raise
            except NotFoundError as error:
                raise ConflictError(
                    f"The bytes of dataset {dataset.name!r} were another one's too, and were discarded with it. "
                    f"Send them again."
                ) from error
            async with self._database.transaction() as session:
                created.create_time.GetCurrentTime()
                session.add(
                    DatasetRow(
                        name=created.name,
                        message=created.SerializeToString(),
                        content_digest=created.content.digest,
                        columns_digest=columns.digest,
                    )
                )
                audit(session, "dataset.create", created.name, digest=created.content.digest, rows=created.row_count)
            return created

    async def _parsed(self, dataset: Dataset) -> tuple[Dataset, BlobRef]:
        """The dataset with its output fields, and the blob of its columns."""
        with (
            _full_disk_told(dataset.name),
            tempfile.TemporaryFile(dir=self._folder) as content,
            tempfile.TemporaryFile(dir=self._folder) as columns,
        ):
            await self._fetch(dataset.content.digest, content)
            created = await asyncio.to_thread(self._parse, dataset, content, columns)
            return created, await self._keep(columns)

    def _parse(self, dataset: Dataset, content: IO[bytes], target: IO[bytes]) -> Dataset:
        created = _inputs(dataset)
        if not created.columns:
            created.columns.extend(read_schema(self._until_stopped(content), created.format))
        columns = list(created.columns)
        batches = read_batches(self._until_stopped(content), created.format, columns)
        created.row_count = write_columns(
            target, batches, columns, lambda count: row_order(count, created.split.seed), self._folder
        )
        if created.row_count == 0:
            raise InvalidFieldError.of("content", "expected at least one row; got none")
        created.split_counts.CopyFrom(split_counts(created.row_count, created.split))
        return created

    def _until_stopped(self, content: IO[bytes]) -> Iterator[bytes]:
        """The lines of the upload, for as long as the server runs."""
        content.seek(0)
        while line := content.readline(MAX_LINE_BYTES + 1):
            if self._stopping.is_set():
                raise NotReadyError("The training service is shutting down. Create the dataset again later.")
            yield line

    async def _fetch(self, digest: str, target: IO[bytes]) -> None:
        """A blob's bytes, their digest checked."""
        async for chunk in self._blobs.read(digest):
            await asyncio.to_thread(target.write, chunk)
        target.flush()

    async def _keep(self, file: IO[bytes]) -> BlobRef:
        """Makes a file a blob."""
        ref = await asyncio.to_thread(_ref_of, file)
        committed = await self._blobs.committed(ref.digest)
        file.seek(committed)
        async with self._blobs.upload(ref, committed) as upload:
            while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                await upload.append(chunk)
            await upload.finish()
        return ref

    @asynccontextmanager
    async def _columns(self, row: DatasetRow, dataset: Dataset) -> AsyncIterator[ColumnFile]:
        """The parsed rows, copied beside the store: their digest is checked before any of them is used."""
        with _full_disk_told(row.name), tempfile.TemporaryFile(dir=self._folder) as file:
            await self._fetch(row.columns_digest, file)
            yield ColumnFile(file, dataset.columns)

    async def _discard_unused(self, *digests: str) -> None:
        """Deletes blobs that no dataset has."""
        for digest in digests:
            async with self._database.snapshot() as session:
                users = select(DatasetRow.name).where(
                    or_(DatasetRow.content_digest == digest, DatasetRow.columns_digest == digest)
                )
                used = await session.scalar(users.limit(1))
            if used is None:
                await self._blobs.delete(digest)

    def _settled(self, task: asyncio.Task[Dataset]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()):
            # Whoever waits has it too; this is for an upload whose client has left.
            _log.info("dataset not created", error=str(error))


def _inputs(dataset: Dataset) -> Dataset:
    """What a client chose of a dataset, with the defaults."""
    inputs = Dataset()
    inputs.CopyFrom(dataset)
    for field in ("row_count", "split_counts", "create_time"):
        inputs.ClearField(field)
    if not inputs.HasField("split"):
        inputs.split.CopyFrom(DEFAULT_RECIPE)
    return inputs


@contextmanager
def _full_disk_told(dataset: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFullError(
                f"The disk is full ({error.strerror}) while the rows of dataset {dataset!r} are prepared. "
                f"The upload is kept: free space, then resume."
            ) from error
        raise


def _ref_of(file: IO[bytes]) -> BlobRef:
    file.seek(0)
    sha256 = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        sha256.update(chunk)
    return BlobRef(f"sha256:{sha256.hexdigest()}", file.tell())


def _row_count(message: ReadDatasetResponse) -> int:
    values = message.columns[0]
    return len(getattr(values, str(values.WhichOneof("values"))).values)
