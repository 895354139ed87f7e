"""Asks a model from Python: ``with Client(address) as client: client.infer("digits", image).classes()``.

Speaks the Open Inference Protocol with binary tensors over one kept-alive connection, to a Unix socket's path or to
``127.0.0.1:8500``. Arrays go as they are: quantising is the caller's business, and the server holds name, type and
shape of every tensor against its model. One client is for one thread; give each thread its own.

Errors, all `InferenceError`, by who must act:

- `Unreachable`: nobody answers there, or no longer. The request may have run; try again later.
- `InferenceRefused`: the server says no. Its message says what to change, ``retry_after`` when to come again.
- `NotAnAnswer`: what came back cannot be read; something else than an inference server listens there.
"""

import functools
import json
import math
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, final
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt

TIMEOUT_SECONDS = 30.0
MAX_HEAD = 16 * 1024  # bytes of a response before its body
MAX_BODY = 256 * 1024 * 1024
MAX_PREPARED = 64  # requests that are kept prepared; a program asks with a few shapes, over and over
END_OF_HEAD = b"\r\n\r\n"
OK = 200

Array = npt.NDArray[Any]

_NAMES: Mapping[np.dtype[Any], str] = MappingProxyType(
    {
        np.dtype(np.bool_): "BOOL",
        **{
            np.dtype(f"<{kind}{size}"): f"{name}{size * 8}"
            for kind, name in (("u", "UINT"), ("i", "INT"))
            for size in (1, 2, 4, 8)
        },
        **{np.dtype(f"<f{size}"): f"FP{size * 8}" for size in (2, 4, 8)},
    }
)
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_NEW_TIMES = 66  # SO_RCVTIMEO_NEW of asm-generic/socket.h: 64-bit times on a 32-bit machine
_TIMEVAL = struct.Struct("@qq" if socket.SO_RCVTIMEO == _NEW_TIMES else "@ll")


class InferenceError(Exception):
    """There is no answer to this request."""


class Unreachable(InferenceError, ConnectionError):
    """Nobody answers at this address, or the connection ended before the answer was whole."""


class InferenceRefused(InferenceError):
    """The server refuses. ``retry_after``: in how many seconds to come again, if it said so."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        """Carry what the server said."""
        super().__init__(f"{message} (HTTP {status})")
        self.status = status
        self.message = message
        self.retry_after = retry_after


class NotAnAnswer(InferenceError):
    """What came back cannot be read."""


class _Stale(Unreachable):
    """The connection ended before the first byte of an answer."""


class Tensor(msgspec.Struct, frozen=True):
    """A tensor that a model takes or gives."""

    name: str
    datatype: str  # INT8, FP32, …
    shape: tuple[int, ...]
    scale: float | None = None  # real = (q - zero_point) * scale; None: the numbers are what they are
    zero_point: int | None = None


class _Parameter(msgspec.Struct, frozen=True):
    string_value: str = ""


class _Config(msgspec.Struct, frozen=True):
    """What is used of a model's configuration."""

    parameters: dict[str, _Parameter] = {}


class Metadata(msgspec.Struct, frozen=True):
    """What serves under a model's name."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """An answer; its arrays are the caller's own."""

    model: str
    model_version: str
    id: str  # for `Client.feedback`
    outputs: Mapping[str, Array]  # in the model's order

    def classes(self, top: int = 1) -> tuple[tuple[int, float], ...]:
        """Return the best classes of a classifier's first output, best first: (index, score in the output's unit)."""
        scores = next(iter(self.outputs.values())).reshape(-1)
        best = np.argsort(-scores.astype(np.float64), kind="stable")[
            :top
        ]  # of equals the first, as the server counts
        return tuple((int(index), scores[index].item()) for index in best)


@final
class Client:
    """One connection to an inference server. It is made by the first request, and anew when it broke meanwhile."""

    def __init__(self, address: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """``address``: the path of a Unix socket, or ``HOST:PORT``. ``timeout``: seconds without any progress."""
        self._address = address
        self._host = b"localhost" if _is_path(address) else address.encode("ascii")
        self._timeout = timeout
        self._sock: socket.socket | None = None
        self._buffer = bytearray(MAX_HEAD)
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._only_inputs: dict[str, str] = {}  # by model

    def infer(
        self,
        model: str,
        inputs: Array | Mapping[str, Array],
        *,
        request_id: str = "",
        version: int | None = None,
        priority: int = 0,
        timeout_us: int = 0,
    ) -> Result:
        """Ask a model. ``inputs``: one array, or arrays by input name; without an id the server makes one up.

        With ``version`` the answer comes from that version or not at all. ``priority``: 1 (first) to 10; 0 is the
        usual one. With ``timeout_us`` it comes within so many µs, or `InferenceRefused` with status 503.
        """
        arrays = {self._only_input(model): inputs} if isinstance(inputs, np.ndarray) else inputs
        blobs = [np.ascontiguousarray(array).data for array in arrays.values()]
        tensors = [(array.dtype, array.shape) for array in arrays.values()]
        key = (model, version, priority, timeout_us, *arrays, *tensors)
        prepared = self._prepared.get(key)
        if prepared is None:
            path = f"{_path(model, version)}/infer"
            prepared = self._prepare(key, path, arrays, {"priority": priority, "timeout": timeout_us})
        try:
            response = self._ask(prepared.up_to_blobs(request_id), blobs, prepared.blobs_size)
        except InferenceRefused:
            self._forget()  # another version may serve, with other inputs
            raise
        return _result(response)

    def feedback(self, model: str, request_id: str, truth: int | str) -> None:
        """Tell the true class, by index or name, of the answer with this id."""
        body = json.dumps({"id": request_id, "truth": truth}).encode()
        self._ask(_head(b"POST", f"{_path(model)}/feedback", self._host, len(body)) + body)

    def metadata(self, model: str, version: int | None = None) -> Metadata:
        """Return which tensors a model takes and gives, and how they are quantised."""
        found = self._metadata(model, version)
        path = f"{_path(model, int(found.versions[0]))}/config"
        config: _Config = _decode(self._ask(_head(b"GET", path, self._host)).body, _config)
        return msgspec.structs.replace(
            found,
            inputs=tuple(_quantised(tensor, "input", config) for tensor in found.inputs),
            outputs=tuple(_quantised(tensor, "output", config) for tensor in found.outputs),
        )

    def ready(self, model: str = "") -> bool:
        """Say whether the server, or one of its models, takes requests now. Nobody there is a no."""
        path = f"{_path(model)}/ready" if model else "/v2/health/ready"
        try:
            self._ask(_head(b"GET", path, self._host))
        except (InferenceRefused, Unreachable):
            return False
        return True

    def close(self) -> None:
        """End the connection; the next request makes a new one."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ preparing
    def _metadata(self, model: str, version: int | None = None) -> Metadata:
        found: Metadata = _decode(self._ask(_head(b"GET", _path(model, version), self._host)).body, _metadata)
        return found

    def _only_input(self, model: str) -> str:
        name = self._only_inputs.get(model)
        if name is None:
            inputs = self._metadata(model).inputs
            if len(inputs) != 1:
                names = ", ".join(tensor.name for tensor in inputs)
                raise ValueError(f"{model} takes {names}: give a mapping of arrays by these names")
            name = self._only_inputs[model] = inputs[0].name
        return name

    def _prepare(
        self, key: tuple[Any, ...], path: str, arrays: Mapping[str, Array], parameters: Mapping[str, int]
    ) -> "_Prepared":
        if len(self._prepared) >= MAX_PREPARED:
            self._prepared.clear()
        prepared = self._prepared[key] = _Prepared(path, self._host, arrays, parameters)
        return prepared

    def _forget(self) -> None:
        self._prepared.clear()
        self._only_inputs.clear()

    # ------------------------------------------------------------ talking
    def _ask(self, head: bytes, blobs: Sequence[memoryview] = (), blobs_size: int = 0) -> "_Response":
        """Return the response to a request; raise `InferenceError`.

        A kept-alive connection may have been ended by the other side, in peace or by its death: then the request goes
        once more, on a new connection. Asking twice does no harm, and truth counts once.
        """
        is_new = self._sock is None
        try:
            response = self._exchange(head, blobs, blobs_size)
        except _Stale:
            if is_new:
                raise
            response = self._exchange(head, blobs, blobs_size)
        if response.facts.status != OK:
            raise InferenceRefused(response.facts.status, _error(response.body), response.facts.retry_after)
        return response

    def _exchange(self, head: bytes, blobs: Sequence[memoryview], blobs_size: int) -> "_Response":
        sock = self._sock or self._connect()
        try:
            _send(sock, head, blobs, len(head) + blobs_size)
            response = self._receive(sock)
        except BaseException:  # whatever happened, an answer that still comes must not be taken for the next one's
            self.close()
            raise
        if response.facts.close:
            self.close()
        return response

    def _connect(self) -> socket.socket:
        sock = None
        try:
            sock = _open(self._address, self._timeout)
        except OSError as error:
            raise Unreachable(f"{self._address}: {error.strerror or error}") from error
        self._sock = sock
        return sock

    def _receive(self, sock: socket.socket) -> "_Response":
        buffer, got = self._buffer, 0
        while (end := buffer.find(END_OF_HEAD, 0, got)) < 0:
            if got == len(buffer):
                raise NotAnAnswer(f"a response's head is over the cap of {len(buffer)} bytes")
            got += self._receive_into(sock, memoryview(buffer)[got:], is_first=got == 0)
        start = end + len(END_OF_HEAD)
        facts = _read_head(bytes(buffer[:start]))
        body = buffer[start : min(got, start + facts.length)]
        if len(body) < facts.length:
            body = self._rest(sock, body, facts.length)
        return _Response(facts, body)

    def _rest(self, sock: socket.socket, begun: bytearray, length: int) -> bytearray:
        body = bytearray(length)
        got = len(begun)
        body[:got] = begun
        with memoryview(body) as view:
            while got < length:
                got += self._receive_into(sock, view[got:], is_first=False)
        return body

    def _receive_into(self, sock: socket.socket, view: memoryview, *, is_first: bool) -> int:
        try:
            got = sock.recv_into(view)
        except BlockingIOError:
            raise Unreachable(f"{self._address}: no answer within {self._timeout:g} s") from None
        except OSError as error:
            raise (_Stale if is_first else Unreachable)(f"{self._address}: {error.strerror or error}") from error
        if not got:
            raise (_Stale if is_first else Unreachable)(f"{self._address}: the connection ended before the answer")
        return got


# ---------------------------------------------------------------- requests
class _Prepared:
    """A request with tensors of one kind, ready but for its id and its blobs."""

    def __init__(self, path: str, host: bytes, arrays: Mapping[str, Array], parameters: Mapping[str, int]) -> None:
        self.blobs_size = sum(array.nbytes for array in arrays.values())
        self._path, self._host = path, host
        inputs = [_described(name, array) for name, array in arrays.items()]
        wanted = {name: value for name, value in parameters.items() if value}  # 0: what is usual
        asked = {"parameters": {"binary_data_output": True, **wanted}, "inputs": inputs}
        self._json = json.dumps(asked, separators=(",", ":"))
        self._without_id = self._request(self._json.encode())

    def up_to_blobs(self, request_id: str) -> bytes:
        """Return the request but for its blobs."""
        if not request_id:
            return self._without_id
        return self._request(f'{{"id":{json.dumps(request_id)},{self._json[1:]}'.encode())

    def _request(self, body: bytes) -> bytes:
        more = b"Inference-Header-Content-Length: %d\r\n" % len(body)
        return _head(b"POST", self._path, self._host, len(body) + self.blobs_size, more) + body


def _described(name: str, array: Array) -> dict[str, Any]:
    datatype = _NAMES.get(array.dtype)
    if datatype is None:
        raise ValueError(f"input {name!r}: arrays of type {array.dtype} cannot be sent")
    parameters = {"binary_data_size": array.nbytes}
    return {"name": name, "shape": array.shape, "datatype": datatype, "parameters": parameters}


def _path(model: str, version: int | None = None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{version}"


def _head(method: bytes, path: str, host: bytes, length: int = 0, more: bytes = b"") -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: %s\r\n%sContent-Length: %d\r\n\r\n" % (method, path.encode(), host, more, length)


# ---------------------------------------------------------------- the connection
def _is_path(address: str) -> bool:
    return "/" in address or ":" not in address


def _open(address: str, timeout: float) -> socket.socket:
    """Connect. The kernel keeps the deadlines: Python's own would cost a system call at every step."""
    family = socket.AF_UNIX if _is_path(address) else socket.AF_INET6 if "[" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        patience = _TIMEVAL.pack(int(timeout), int(timeout % 1 * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        if family == socket.AF_UNIX:
            sock.connect(address)
        else:
            host, _, port = address.rpartition(":")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect((host.strip("[]"), int(port)))
    except BaseException:
        sock.close()
        raise
    return sock


def _send(sock: socket.socket, head: bytes, blobs: Sequence[memoryview], size: int) -> None:
    """Send everything; what breaks here may be an end that the other side made long ago."""
    try:
        sent = sock.sendmsg([head, *blobs])  # one call, nothing joined
        if sent < size:
            sock.sendall(b"".join([head, *(blob.tobytes() for blob in blobs)])[sent:])
    except BlockingIOError:
        raise Unreachable("the request was not taken in time") from None
    except OSError as error:
        raise _Stale(str(error.strerror or error)) from error


# ---------------------------------------------------------------- responses
class _Facts(NamedTuple):
    status: int
    length: int
    json_length: int | None
    close: bool
    retry_after: int | None


class _Response(NamedTuple):
    facts: _Facts
    body: bytearray


class _Output(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: dict[str, int] = {}


class _Answer(msgspec.Struct, frozen=True):
    model_name: str
    model_version: str
    outputs: tuple[_Output, ...]
    id: str = ""


class _Error(msgspec.Struct, frozen=True):
    error: str


_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r]")
_FIELD = re.compile(rb"\r\n([!-9;-~]+):[ \t]*([^\r\n]*)")
_metadata = msgspec.json.Decoder(Metadata)
_config = msgspec.json.Decoder(_Config)
_answer = msgspec.json.Decoder(_Answer)
_errors = msgspec.json.Decoder(_Error)


@functools.lru_cache(maxsize=64)  # a server says the same of like answers
def _read_head(head: bytes) -> _Facts:
    status = _STATUS.match(head)
    if status is None:
        raise NotAnAnswer(f"not an HTTP response: {head[:40]!r}")
    fields = {name.lower(): value for name, value in _FIELD.findall(head)}
    length = _number(fields.get(b"content-length"))
    if length is None or length > MAX_BODY:
        raise NotAnAnswer(f"a response of unknown length, or over the cap of {MAX_BODY} bytes")
    return _Facts(
        status=int(status[1]),
        length=length,
        json_length=_number(fields.get(b"inference-header-content-length")),
        close=fields.get(b"connection", b"").strip().lower() == b"close",
        retry_after=_number(fields.get(b"retry-after")),
    )


def _number(text: bytes | None) -> int | None:
    return int(text) if text and text.strip().isdigit() else None


def _result(response: _Response) -> Result:
    body, length = response.body, response.facts.json_length
    position = len(body) if length is None else min(length, len(body))
    with memoryview(body) as view:
        answer = _decode(view[:position], _answer)
    outputs = {}
    try:
        for output in answer.outputs:
            size, dtype = output.parameters["binary_data_size"], _DTYPES[output.datatype]
            count = math.prod(output.shape)
            if size < 0 or size != count * dtype.itemsize:
                raise ValueError(f"{size} bytes for {output.datatype} {list(output.shape)}")
            outputs[output.name] = np.frombuffer(body, dtype, count, position).reshape(output.shape)
            position += size
    except (KeyError, ValueError, TypeError) as error:
        raise NotAnAnswer(f"an output cannot be read: {error!r}") from error
    return Result(model=answer.model_name, model_version=answer.model_version, id=answer.id, outputs=outputs)


def _quantised(tensor: Tensor, kind: str, config: _Config) -> Tensor:
    """Return a tensor with what the configuration says of its numbers."""
    prefix = f"quantization.{kind}.{tensor.name}"
    scale, zero_point = config.parameters.get(f"{prefix}.scale"), config.parameters.get(f"{prefix}.zero_point")
    if scale is None:
        return tensor
    try:
        at = int(zero_point.string_value) if zero_point else 0
        return msgspec.structs.replace(tensor, scale=float(scale.string_value), zero_point=at)
    except ValueError as error:
        raise NotAnAnswer(f"the quantisation of {tensor.name!r} is not in numbers: {error}") from error


def _decode(data: "bytearray | memoryview", decoder: "msgspec.json.Decoder[Any]") -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotAnAnswer(f"the JSON is not what is expected: {error}") from error


def _error(body: bytearray) -> str:
    try:
        return _errors.decode(body).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body[:200].decode(errors="replace")
