"""The Open Inference Protocol with Triton's extensions, over the repository and what is beside it."""

import asyncio
import importlib.metadata
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import structlog
from structlog.contextvars import get_contextvars

from penstock.inference.control import ModelControl
from penstock.inference.cuda_memory import CudaMemory
from penstock.inference.infer_stream import InferStream
from penstock.inference.inference import Inference, QueueFullError
from penstock.inference.log_settings import LogSettings
from penstock.inference.messages import model_metadata, model_statistics
from penstock.inference.model_config import PYTHON
from penstock.inference.parameters import EMPTY_FINAL_RESPONSE, TIMINGS, RequestParameters
from penstock.inference.plans import PlannedRequest, Plans
from penstock.inference.repository import Repository, UnknownModelError
from penstock.inference.request import RequestReader
from penstock.inference.response import Parts, ResponseWriter, final_only, stream_error
from penstock.inference.served_version import ServedVersion, State
from penstock.inference.shared_memory import SharedMemory
from penstock.inference.tensors import BYTES, Array, Buffer
from penstock.inference.tracing import Tracer, traceparent_of
from penstock.inference.wire import LARGE_BYTES, InferRequest, read_infer_request, stream_parts
from penstock.oip import inference_pb2 as pb
from penstock.oip import inference_pb2_grpc as rpc
from penstock.rpc.errors import LimitExceededError, NotFoundError, NotReadyError, PenstockError, UnimplementedError
from penstock.rpc.methods import Encoded, check_answer
from penstock.rpc.server import Service
from penstock.rpc.status import to_status

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)

# A line in the log for each of these would cost more than the call.
_QUIET = frozenset({"ModelInfer", "ModelStreamInfer"})

# One stream holds about as many bytes as this many of the largest messages.
_STREAMED_MESSAGES = 2

# Texts are made one by one: these many, or so many bytes that may be as many, take some milliseconds.
_TEXTS = 16 * 1024
_TEXT_BYTES = 64 * 1024

_log = structlog.get_logger("penstock.inference.servicer")


@dataclass(frozen=True)
class Memory:
    """The regions of memory that clients share with this server."""

    system: SharedMemory
    cuda: CudaMemory

    def read(self, region: str, offset: int, byte_size: int) -> Buffer:
        if self.cuda.has(region):
            return self.cuda.read(region, offset, byte_size)
        return self.system.read(region, offset, byte_size)

    def write(self, region: str, offset: int, byte_size: int, data: bytes | memoryview) -> None:
        if self.cuda.has(region):
            self.cuda.write(region, offset, byte_size, data)
        else:
            self.system.write(region, offset, byte_size, data)

    def close(self) -> None:
        self.system.close()
        self.cuda.close()


class InferenceServicer(rpc.GRPCInferenceServiceServicer):
    """Translates between the protocol and the parts of the server."""

    def __init__(
        self,
        repository: Repository,
        control: ModelControl,
        memory: Memory,
        logs: LogSettings,
        tracer: Tracer,
        server_name: str,
        max_message_bytes: int,
        *,
        refuses_with_exhausted: bool = False,
    ) -> None:
        """`refuses_with_exhausted`: a full queue is RESOURCE_EXHAUSTED, which clients do not retry, not UNAVAILABLE."""
        self._repository = repository
        self._control = control
        self._memory = memory
        self._logs = logs
        self._tracer = tracer
        self._server_name = server_name
        self._max_message_bytes = max_message_bytes
        self._writer = ResponseWriter(memory.write)
        self._plans = Plans()
        self._refuses_with_exhausted = refuses_with_exhausted

    def service(self) -> Service:
        return Service(
            pb.DESCRIPTOR,
            lambda server: rpc.add_GRPCInferenceServiceServicer_to_server(self, server),
            quiet=_QUIET,
            readers={"ModelInfer": self._read, "ModelStreamInfer": read_infer_request},
        )

    async def ServerLive(self, request: pb.ServerLiveRequest, context: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._repository.settled)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: object) -> pb.ModelReadyResponse:
        try:
            version = self._repository.describe(request.name, request.version)
        except (UnknownModelError, NotReadyError, UnimplementedError):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=version.state is State.READY)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: object) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name=self._server_name, version=self._version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: object) -> pb.ModelMetadataResponse:
        version = self._repository.describe(request.name, request.version)
        return model_metadata(request.name, version, self._ready(request.name))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: object) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=self._repository.describe(request.name, request.version).config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: object) -> pb.ModelStatisticsResponse:
        if request.name and request.version:
            versions = [self._repository.describe(request.name, request.version)]
        else:
            versions = self._ready(request.name)
            if request.name and not versions:
                self._repository.describe(request.name, "")
        return pb.ModelStatisticsResponse(model_stats=map(model_statistics, versions))

    async def ModelInfer(  # type: ignore[override]
        self, request: InferRequest | PlannedRequest, context: "Context"
    ) -> Encoded:
        try:
            if isinstance(request, PlannedRequest):
                plan = request.plan
                return Encoded(plan.write(await plan.version.infer(plan.read(request.data))))
            return await self._infer(request, context)
        except QueueFullError as error:
            if self._refuses_with_exhausted:
                raise LimitExceededError(error.message) from error
            raise

    async def _infer(self, request: InferRequest, context: "Context") -> Encoded:
        message = request.message
        version = self._repository.route(message.model_name, message.model_version)
        inference = await self._inference(version, request)
        if request.data is not None:
            self._plans.learn(request.data, request, version, inference)
        if self._tracer.settings.active:
            with self._traced(version, inference, message.id, context):
                arrays = await version.infer(inference)
        else:
            arrays = await version.infer(inference)
        timings = bool(message.parameters) and RequestParameters(message.parameters).flag(TIMINGS)
        write = partial(self._writer.write, message, version, inference, arrays, timings=timings)
        return Encoded(*(await _written(message, arrays, write)))

    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[InferRequest], context: "Context"
    ) -> AsyncIterator[Encoded]:
        answers = partial(self._stream_answers, context)
        stream = InferStream(answers, self._in_order, _STREAMED_MESSAGES * self._max_message_bytes)
        async with aclosing(stream.responses(request_iterator)) as responses:
            async for response in responses:
                yield response

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: object) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise NotFoundError("repository", request.repository_name[:80], "There is one; leave its name out.")
        entries = await self._control.index()
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.model, version=entry.version, state=entry.state, reason=entry.reason
                )
                for entry in entries
                if entry.state == "READY" or not request.ready
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: object
    ) -> pb.RepositoryModelLoadResponse:
        model, in_kserve = _named(request)
        config = request.parameters["config"].string_param if "config" in request.parameters else None
        files = {key: parameter.bytes_param for key, parameter in request.parameters.items() if key.startswith("file:")}
        await self._control.load(model, config, files)
        return pb.RepositoryModelLoadResponse.FromString(_kserve_answer(model, loaded=True) if in_kserve else b"")

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: object
    ) -> pb.RepositoryModelUnloadResponse:
        model, in_kserve = _named(request)
        dependents = "unload_dependents" in request.parameters and request.parameters["unload_dependents"].bool_param
        await self._control.unload(model, dependents)
        return pb.RepositoryModelUnloadResponse.FromString(_kserve_answer(model, loaded=True) if in_kserve else b"")

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: object
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._memory.system.status(request.name):
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.byte_size
        return response

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: object
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._memory.system.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: object
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._memory.system.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: object
    ) -> pb.CudaSharedMemoryStatusResponse:
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._memory.cuda.status(request.name):
            status = response.regions[region.name]
            status.name, status.device_id, status.byte_size = region.name, region.device_id, region.byte_size
        return response

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: object
    ) -> pb.CudaSharedMemoryRegisterResponse:
        self._memory.cuda.register(request.name, request.raw_handle, request.device_id, request.byte_size)
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: object
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        self._memory.cuda.unregister(request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: object) -> pb.TraceSettingResponse:
        return self._tracer.settings.update(request)

    async def LogSettings(self, request: pb.LogSettingsRequest, context: object) -> pb.LogSettingsResponse:
        return self._logs.update(request)

    async def _stream_answers(self, context: "Context", request: InferRequest) -> AsyncGenerator[Encoded]:
        """The answers to one request of a stream; a failure is an answer, too, whatever it is."""
        message = request.message
        try:
            version = self._repository.route(message.model_name, message.model_version)
            inference = await self._inference(version, request)
            parameters = RequestParameters(message.parameters)
            timings, empty_final = parameters.flag(TIMINGS), parameters.flag(EMPTY_FINAL_RESPONSE)
            decoupled = version.config.model_transaction_policy.decoupled
            traced = self._traced(version, inference, message.id, context)
            async with aclosing(version.stream(inference)) as answers:
                with traced:
                    async for arrays in answers:
                        write = partial(
                            self._writer.write,
                            message,
                            version,
                            inference,
                            arrays,
                            timings=timings,
                            final=not decoupled,
                        )
                        answer = Encoded(*stream_parts(await _written(message, arrays, write)))
                        check_answer(answer.size, self._max_message_bytes)
                        yield answer
            if decoupled and empty_final:
                yield Encoded(*stream_parts(final_only(message, version)))
        except Exception as error:  # the other requests of the stream have nothing to do with it
            if not isinstance(error, PenstockError):
                _log.exception("unexpected error", method="ModelStreamInfer", model=message.model_name[:80])
            call_id = get_contextvars().get("request_id", "")
            yield Encoded(stream_error(message, to_status(error, call_id)[1].message))

    async def _inference(self, version: ServedVersion, request: InferRequest) -> Inference:
        """Reads a request; one with many texts on a thread, since the loop has others to see to."""
        reader = self._reader(version)
        return await asyncio.to_thread(reader.read, request) if _is_long_text(request) else reader.read(request)

    def _read(self, data: bytes | memoryview) -> InferRequest | PlannedRequest:
        """A request; by the plan for requests like it, if there is one for the version that answers this one."""
        if len(data) >= LARGE_BYTES or self._tracer.settings.active:
            return read_infer_request(data)
        small = bytes(data)
        plan = self._plans.find(small)
        if plan is not None and self._repository.only(plan.model, plan.number) is plan.version:
            return PlannedRequest(plan, small)
        return read_infer_request(small)

    @contextmanager
    def _traced(
        self, version: ServedVersion, inference: Inference, request_id: str, context: "Context"
    ) -> Iterator[None]:
        """Tells the tracer of the request that the block answers, if it wants to know of this one."""
        active = self._tracer.settings.active
        traceparent = traceparent_of(dict(context.invocation_metadata() or ())) if active else ""
        if not self._tracer.sampled(version.model, traceparent):
            yield
            return
        error = ""
        try:
            yield
        except Exception as failure:
            error = str(failure)
            raise
        finally:
            where = version.model, str(version.number), request_id
            self._tracer.record(*where, inference.arrival_ns, inference.run, traceparent, error)

    def _in_order(self, request: InferRequest) -> bool:
        try:
            config = self._repository.describe(request.message.model_name, request.message.model_version).config
        except PenstockError:
            return True
        return not config.model_transaction_policy.decoupled

    def _reader(self, version: ServedVersion) -> RequestReader:
        config = version.config
        return RequestReader(
            version.title,
            version.signature,
            config.max_batch_size,
            self._memory.read,
            any_bytes=config.backend == PYTHON,
        )

    def _ready(self, model: str) -> list[ServedVersion]:
        return [held for held in self._repository.versions(model) if held.state is State.READY]

    @cached_property
    def _version(self) -> str:
        return importlib.metadata.version("penstock")


def _is_long_text(request: InferRequest) -> bool:
    """Shared memory is the loop's, and the steps of a sequence come in the order of their requests."""
    message = request.message
    return (
        request.size > _TEXT_BYTES
        and any(tensor.datatype == BYTES.name for tensor in message.inputs)
        and not any(tensor.parameters for tensor in message.inputs)
        and "sequence_id" not in message.parameters
    )


async def _written(message: pb.ModelInferRequest, arrays: Sequence[Array], write: Callable[[], Parts]) -> Parts:
    """The parts of an answer; one with many texts is written on a thread, unless into shared memory."""
    long = any(array.dtype == BYTES.dtype and array.size > _TEXTS for array in arrays)
    if long and not any(output.parameters for output in message.outputs):
        return await asyncio.to_thread(write)
    return write()


def _named(request: "pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest") -> tuple[str, bool]:
    """The model's name, and whether it came as KServe's client sends it, in the field of the repository's name."""
    if request.model_name:
        return request.model_name, False
    return request.repository_name, True


def _kserve_answer(model: str, *, loaded: bool) -> bytes:
    """The fields 1, the model's name, and 2, whether it worked, which Triton's clients pass over as unknown."""
    return pb.ModelReadyRequest(name=model).SerializeToString() + bytes([2 << 3, loaded])
