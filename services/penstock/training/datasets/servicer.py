"""The DatasetService over a dataset store."""

from collections.abc import AsyncIterator, Sequence

from penstock.api.dataset.v1 import dataset_service_pb2 as pb
from penstock.api.dataset.v1 import dataset_service_pb2_grpc as rpc
from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, Dataset, DatasetFormat, Split, SplitRecipe
from penstock.rpc.errors import InvalidFieldError
from penstock.rpc.server import Service
from penstock.rpc.validation import Violations, page_size, validating
from penstock.storage.artifacts import checked_blob
from penstock.storage.paging import name_token
from penstock.training.datasets.parse import MAX_COLUMNS, name_problem
from penstock.training.datasets.store import DatasetStore

MAX_DATASET_BYTES = 2 * 1024**3
# Shares are written as decimals, which binary numbers miss by a little.
_SHARE_TOLERANCE = 1e-9


class DatasetServicer(rpc.DatasetServiceServicer):
    """Translates between the wire and the datasets."""

    def __init__(self, datasets: DatasetStore) -> None:
        self._datasets = datasets

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_DatasetServiceServicer_to_server(self, server))

    async def CreateDataset(
        self, request_iterator: AsyncIterator[pb.CreateDatasetRequest], context: object
    ) -> pb.CreateDatasetResponse:
        header = await _header(request_iterator)
        dataset = Dataset()
        with validating() as violations:
            ref = checked_blob(violations, "header.content", header.content, MAX_DATASET_BYTES)
            violations.require(header.offset >= 0, "header.offset", f"expected 0 or more; got {header.offset}")
            _check_dataset(violations, header.dataset)
        for field in ("name", "description", "format"):
            setattr(dataset, field, getattr(header.dataset, field))
        dataset.columns.extend(header.dataset.columns)
        if header.dataset.HasField("split"):
            dataset.split.CopyFrom(header.dataset.split)
        dataset.content.digest, dataset.content.size_bytes = ref.digest, ref.size_bytes
        chunks = (request.chunk async for request in request_iterator)
        return pb.CreateDatasetResponse(dataset=await self._datasets.create(dataset, header.offset, chunks))

    async def QueryDatasetUpload(
        self, request: pb.QueryDatasetUploadRequest, context: object
    ) -> pb.QueryDatasetUploadResponse:
        with validating() as violations:
            violations.digest("digest", request.digest)
        return pb.QueryDatasetUploadResponse(committed_size_bytes=await self._datasets.committed(request.digest))

    async def GetDataset(self, request: pb.GetDatasetRequest, context: object) -> pb.GetDatasetResponse:
        _require_name(request.name)
        return pb.GetDatasetResponse(dataset=await self._datasets.get(request.name))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: object) -> pb.ListDatasetsResponse:
        with validating() as violations:
            size = page_size(violations, request.page_size)
            after = name_token(violations, request.page_token)
        datasets, token = await self._datasets.page(after, size)
        return pb.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: object) -> pb.DeleteDatasetResponse:
        _require_name(request.name)
        await self._datasets.delete(request.name)
        return pb.DeleteDatasetResponse()

    async def ReadDataset(
        self, request: pb.ReadDatasetRequest, context: object
    ) -> AsyncIterator[pb.ReadDatasetResponse]:
        with validating() as violations:
            violations.name("name", request.name)
            violations.require(request.first_row >= 0, "first_row", f"expected 0 or more; got {request.first_row}")
            violations.require(
                request.split != Split.SPLIT_UNSPECIFIED and request.split in Split.values(),
                "split",
                f"expected SPLIT_TRAIN, SPLIT_VALIDATION or SPLIT_TEST; got {request.split}",
            )
            count = len(request.columns)
            violations.require(count <= MAX_COLUMNS, "columns", f"expected at most {MAX_COLUMNS:,}; got {count:,}")
        async for message in self._datasets.read(request.name, request.split, request.columns, request.first_row):
            yield message


async def _header(requests: AsyncIterator[pb.CreateDatasetRequest]) -> pb.CreateDatasetHeader:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise InvalidFieldError.of("header", "the first message must be a header")


def _require_name(name: str) -> None:
    with validating() as violations:
        violations.name("name", name)


def _check_dataset(violations: Violations, dataset: Dataset) -> None:
    violations.name("header.dataset.name", dataset.name)
    violations.text("header.dataset.description", dataset.description)
    violations.require(
        dataset.format != DatasetFormat.DATASET_FORMAT_UNSPECIFIED and dataset.format in DatasetFormat.values(),
        "header.dataset.format",
        f"expected DATASET_FORMAT_CSV or DATASET_FORMAT_JSON_LINES; got {dataset.format}",
    )
    _check_columns(violations, dataset.columns)
    if dataset.HasField("split"):
        _check_split(violations, dataset.split)


def _check_columns(violations: Violations, columns: Sequence[Column]) -> None:
    field = "header.dataset.columns"
    if len(columns) > MAX_COLUMNS:
        violations.add(field, f"expected at most {MAX_COLUMNS:,}; got {len(columns):,}")
        return
    seen: set[str] = set()
    for index, column in enumerate(columns):
        if problem := name_problem(column.name):
            violations.add(f"{field}[{index}].name", problem)
        violations.require(column.name not in seen, f"{field}[{index}].name", f"{column.name!r} is there already")
        seen.add(column.name)
        violations.require(
            column.type != ColumnType.COLUMN_TYPE_UNSPECIFIED and column.type in ColumnType.values(),
            f"{field}[{index}].type",
            f"expected a column type; got {column.type}",
        )


def _check_split(violations: Violations, split: SplitRecipe) -> None:
    shares = {"train": split.train, "validation": split.validation, "test": split.test}
    for name, share in shares.items():
        violations.require(0 <= share <= 1, f"header.dataset.split.{name}", f"expected 0 to 1; got {share}")
    violations.require(split.train > 0, "header.dataset.split.train", "expected more than 0")
    # A plain sum: math.fsum has no answer for infinite shares.
    total = sum(shares.values())
    violations.require(
        abs(total - 1) <= _SHARE_TOLERANCE, "header.dataset.split", f"expected shares that add up to 1; got {total:g}"
    )
