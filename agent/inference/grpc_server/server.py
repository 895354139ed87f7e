"""The Open Inference Protocol over gRPC: the same service that HTTP stands before.

Alone here is grpc imported. A request that protobuf cannot read, and whatever the service refuses, ends in a status
with a sentence; calls are bounded in size and number. The address is this process's own: while an old and a new data
plane serve side by side, the kernel gives each its share of new connections.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import msgspec

from agent.inference.describe import model_config
from agent.inference.grpc_server.calls import decoder, encode
from agent.inference.grpc_server.messages import SERVICE, DecodeError, Message, from_json, message
from agent.inference.service import Failure, Kind, Service
from agent.listening import CannotListen

log = logging.getLogger(__name__)

MAX_CALLS = 64  # at once; more are refused
MAX_STREAMS = 16  # of these; each keeps its thread for as long as the client likes
MESSAGE_MARGIN = 64 * 1024  # bytes around the tensors
STOP_SECONDS = 10.0
_CODES = {
    Kind.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Kind.WRONG: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.FORBIDDEN: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.BUSY: grpc.StatusCode.UNAVAILABLE,
    Kind.FAILED: grpc.StatusCode.INTERNAL,
}
FAULT = "a fault of this server; its log says more"
_STREAM_RESPONSE = message("ModelStreamInferResponse")
Answer = Callable[[Any], Message]


class GrpcServer:
    """The gRPC side of this process."""

    def __init__(self, service: Service, host: str, port: int, *, max_body: int, shared: bool) -> None:
        """Take the address; raise `CannotListen`.

        ``shared``: processes hand the address over to each other, so it is taken only at the start, and doing
        without it is better than not serving at all.
        """
        self._service = service
        self._streams = threading.BoundedSemaphore(MAX_STREAMS)
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="grpc"),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, self._handlers())],
            options=[
                ("grpc.max_receive_message_length", max_body + MESSAGE_MARGIN),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(shared)),
            ],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        self._stopped: threading.Event | None = None
        self._host, self._port = f"[{host}]" if ":" in host else host, port
        self._shared = shared
        if not shared:
            self._bind()

    @property
    def address(self) -> str:
        """Return where clients connect to, for people."""
        return f"grpc://{self._host}:{self._port}"

    def start(self) -> None:
        """Begin to answer."""
        if self._shared:
            try:
                self._bind()
            except CannotListen as error:
                log.error("%s; gRPC is not served", error)
                return
        self._server.start()

    def _bind(self) -> None:
        address = f"{self._host}:{self._port}"
        try:
            self._port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise CannotListen(f"cannot listen on {address} for gRPC; choose another port") from error

    def begin_stop(self) -> None:
        """Take no more calls; those that run have `STOP_SECONDS`. Returns at once."""
        self._stopped = self._server.stop(STOP_SECONDS)

    def finish(self) -> None:
        """Wait until every call has ended."""
        if self._stopped is None:
            self.begin_stop()
        if self._stopped is not None:
            self._stopped.wait()

    # ------------------------------------------------------------ calls
    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        service = self._service
        unary: dict[str, tuple[str, Answer]] = {
            "ServerLive": ("ServerLiveRequest", lambda _: _made("ServerLiveResponse", live=True)),
            "ServerReady": (
                "ServerReadyRequest",
                lambda _: _made("ServerReadyResponse", ready=service.is_ready),
            ),
            "ModelReady": (
                "ModelReadyRequest",
                lambda asked: _made("ModelReadyResponse", ready=service.is_model_ready(asked.name, asked.version)),
            ),
            "ServerMetadata": (
                "ServerMetadataRequest",
                lambda _: _described("ServerMetadataResponse", service.describe()),
            ),
            "ModelMetadata": (
                "ModelMetadataRequest",
                lambda asked: _described("ModelMetadataResponse", service.metadata(asked.name, asked.version)),
            ),
            "ModelConfig": (
                "ModelConfigRequest",
                lambda asked: _described(
                    "ModelConfigResponse", {"config": model_config(service.find(asked.name, asked.version))}
                ),
            ),
            "ModelStatistics": (
                "ModelStatisticsRequest",
                lambda asked: _described(
                    "ModelStatisticsResponse", service.statistics(asked.name or None, asked.version or None)
                ),
            ),
            "ModelInfer": ("ModelInferRequest", self._infer),
            "RepositoryIndex": ("RepositoryIndexRequest", self._index),
            "RepositoryModelLoad": ("RepositoryModelLoadRequest", self._load),
            "RepositoryModelUnload": ("RepositoryModelUnloadRequest", self._unload),
        }
        handlers = {name: grpc.unary_unary_rpc_method_handler(_unary(*call)) for name, call in unary.items()}
        return {**handlers, "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream)}

    def _infer(self, request: Any, *, in_stream: bool = False) -> Message:
        done = self._service.infer(request.model_name, request.model_version, decoder(request))
        response: Message = encode(done, in_stream=in_stream)
        return response

    def _index(self, asked: Any) -> Message:
        listed = self._service.index(ready_only=asked.ready)
        models = [
            {"name": one.name, "version": str(one.version), "state": one.state.value, "reason": one.reason}
            for one in listed
        ]
        return _described("RepositoryIndexResponse", {"models": models})

    def _load(self, asked: Any) -> Message:
        self._service.load(asked.model_name, asked.parameters)
        return _made("RepositoryModelLoadResponse")

    def _unload(self, asked: Any) -> Message:
        self._service.unload(asked.model_name, asked.parameters)
        return _made("RepositoryModelUnloadResponse")

    # ------------------------------------------------------------ streams
    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if not self._streams.acquire(blocking=False):
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_STREAMS} streams are open already")
        try:
            for data in requests:
                yield self._stream_answer(data).SerializeToString()
        finally:
            self._streams.release()

    def _stream_answer(self, data: bytes) -> Message:
        """Answer one request of a stream; its failure does not end the others'."""
        request_id = ""
        try:
            request = _parsed("ModelInferRequest", data)
            request_id = request.id
            answer: Message = _STREAM_RESPONSE(infer_response=self._infer(request, in_stream=True))
        except Failure as failure:
            answer = _STREAM_RESPONSE(error_message=failure.message, infer_response={"id": request_id})
        except Exception:
            log.exception("a request of a stream met a fault of this server")
            answer = _STREAM_RESPONSE(error_message=FAULT, infer_response={"id": request_id})
        return answer


def _unary(request_name: str, answer: Answer) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """Return what answers the bytes of one call."""

    def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            response: bytes = answer(_parsed(request_name, data)).SerializeToString()
        except Failure as failure:
            _abort(context, _CODES[failure.kind], failure.message)
        except Exception:
            log.exception("%s met a fault of this server", request_name)
            _abort(context, grpc.StatusCode.INTERNAL, FAULT)
        return response

    return handle


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, text: str) -> NoReturn:
    context.abort(code, text)
    raise AssertionError("abort() raises")


def _parsed(name: str, data: bytes) -> Any:
    try:
        return message(name).FromString(data)
    except DecodeError as error:
        raise Failure(Kind.WRONG, f"this is no {name}: {error}") from error


def _described(name: str, value: object) -> Message:
    return from_json(name, msgspec.to_builtins(value))


def _made(name: str, **fields: bool) -> Message:
    made: Message = message(name)(**fields)
    return made
