"""Open Inference Protocol tensors: a request's body to the bytes of each input, output bytes to a response's body.

Knows JSON tensors and the binary extension, and checks every input against the model's: name, type, shape, size.
It stops there: no HTTP, no model is run. `NotARequest` means the body is not an inference request at all;
`BadTensor` that it does not fit this model (which counts as an error of the model's service: a new version that broke
its clients must show).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.manifest import TensorSpec
from runtime.interpreter import DTYPES

MAX_ID = 128  # characters of a request id; it is remembered until its truth comes
JSON_BYTES_PER_ELEMENT = 32  # the longest number in JSON, with sign, exponent, brackets and separator
JSON_MARGIN = 64 * 1024
BINARY_SIZE = "binary_data_size"
NOT_OFFERED = ("shared_memory_region", "classification")

Buffer = bytes | memoryview


class NotARequest(ValueError):
    """The body is not an inference request."""


class BadTensor(ValueError):
    """A tensor does not fit the model; the message names what was expected and what came."""


Parameters = dict[str, bool | int | float | str | None]


class InputTensor(msgspec.Struct, frozen=True):
    """An input as it stands in the JSON."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: Parameters = {}
    data: list[Any] | None = None


class WantedOutput(msgspec.Struct, frozen=True):
    """An output that the client asks for."""

    name: str
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, frozen=True):
    """The JSON part of an inference request."""

    inputs: tuple[InputTensor, ...]
    id: str = ""
    parameters: Parameters = {}
    outputs: tuple[WantedOutput, ...] | None = None


class OutputTensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """An output as it stands in the JSON."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: Parameters = {}
    data: list[Any] | None = None


class InferResponse(msgspec.Struct, frozen=True):
    """The JSON part of an inference response."""

    model_name: str
    model_version: str
    id: str
    outputs: tuple[OutputTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The tensors of one served model version."""

    model: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def body_cap(self) -> int:
        """Return the size over which a request to this model cannot be right."""
        largest = sum(count(spec) * JSON_BYTES_PER_ELEMENT + size(spec) for spec in self.inputs)
        return largest + JSON_MARGIN


@dataclass(frozen=True, kw_only=True)
class Call:
    """A decoded request: a buffer per input in the model's order, and the wanted outputs as (index, binary)."""

    id: str
    inputs: tuple[Buffer, ...]
    wanted: tuple[tuple[int, bool], ...]


def count(spec: TensorSpec) -> int:
    """Return how many elements a tensor has."""
    return math.prod(spec.shape)


def size(spec: TensorSpec) -> int:
    """Return how many bytes a tensor has."""
    return count(spec) * DTYPES[spec.dtype].itemsize


# ---------------------------------------------------------------- request
def decode_call(body: memoryview, json_length: int | None, signature: Signature) -> Call:
    """Return the call in a body whose first ``json_length`` bytes are JSON; raise `NotARequest` or `BadTensor`.

    ``json_length`` 0 means that the whole body is the single input; None that there are no binary tensors.
    """
    if json_length == 0:
        return _raw_call(body, signature)
    split = len(body) if json_length is None else json_length
    if split > len(body):
        raise NotARequest(f"Inference-Header-Content-Length is {split}, but the body has {len(body)} bytes")
    request = _decode_json(body[:split])
    return Call(
        id=_checked_id(request.id),
        inputs=_inputs(request.inputs, body[split:], signature),
        wanted=_wanted(request, signature),
    )


def _raw_call(body: memoryview, signature: Signature) -> Call:
    if len(signature.inputs) != 1:
        raise NotARequest(f"a raw body needs a model with one input, {signature.model} has {len(signature.inputs)}")
    spec = signature.inputs[0]
    _check_size(spec, len(body))
    return Call(id="", inputs=(body,), wanted=tuple((k, True) for k in range(len(signature.outputs))))


def _decode_json(data: memoryview) -> InferRequest:
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotARequest(f"the JSON is not an inference request: {error}") from error


def _checked_id(request_id: str) -> str:
    if len(request_id) > MAX_ID:
        raise NotARequest(f"id has {len(request_id)} characters, at most {MAX_ID} are accepted")
    return request_id


def _inputs(given: Sequence[InputTensor], blobs: memoryview, signature: Signature) -> tuple[Buffer, ...]:
    names = [spec.name for spec in signature.inputs]
    found: dict[str, Buffer] = {}
    for tensor in given:
        if tensor.name not in names:
            raise BadTensor(f"unknown input {tensor.name[:80]!r}; {signature.model} takes {', '.join(names)}")
        if tensor.name in found:
            raise BadTensor(f"input {tensor.name!r} stands twice")
        spec = signature.inputs[names.index(tensor.name)]
        found[tensor.name], blobs = _input(tensor, spec, blobs)
    if len(blobs):
        raise BadTensor(f"{len(blobs)} bytes are left over after the last binary input")
    missing = [name for name in names if name not in found]
    if missing:
        raise BadTensor(f"input {', '.join(missing)} is missing; {signature.model} takes {', '.join(names)}")
    return tuple(found[name] for name in names)


def _input(tensor: InputTensor, spec: TensorSpec, blobs: memoryview) -> tuple[Buffer, memoryview]:
    """Return the bytes of one input, and the blobs that are left."""
    _refuse_unoffered(tensor.parameters)
    if tensor.datatype != spec.dtype:
        raise BadTensor(f"input {spec.name!r}: datatype {spec.dtype} is expected, got {tensor.datatype[:20]}")
    if tensor.shape != spec.shape:
        raise BadTensor(f"input {spec.name!r}: shape {list(spec.shape)} is expected, got {list(tensor.shape)[:16]}")
    if BINARY_SIZE in tensor.parameters:
        return _blob(tensor, spec, blobs)
    if tensor.data is None:
        raise BadTensor(f"input {spec.name!r} has neither data nor {BINARY_SIZE}")
    return _from_json(tensor.data, spec), blobs


def _blob(tensor: InputTensor, spec: TensorSpec, blobs: memoryview) -> tuple[Buffer, memoryview]:
    length = tensor.parameters[BINARY_SIZE]
    if isinstance(length, bool) or not isinstance(length, int) or tensor.data is not None:
        raise BadTensor(
            f"input {spec.name!r}: {BINARY_SIZE} must be a whole number, and data must not stand beside it"
        )
    _check_size(spec, length)
    if length > len(blobs):
        raise BadTensor(f"input {spec.name!r}: {length} binary bytes are announced, the body has {len(blobs)} left")
    return blobs[:length], blobs[length:]


def _check_size(spec: TensorSpec, given: int) -> None:
    if given != size(spec):
        raise BadTensor(
            f"input {spec.name!r}: {size(spec)} bytes are expected ({spec.dtype} {list(spec.shape)}), got {given}"
        )


def _from_json(data: list[Any], spec: TensorSpec) -> bytes:
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError) as error:
        raise BadTensor(f"input {spec.name!r}: data is not a regular array of numbers") from error
    if array.size != count(spec) or (array.ndim != 1 and array.shape != spec.shape):
        raise BadTensor(f"input {spec.name!r}: {count(spec)} elements are expected, got shape {list(array.shape)}")
    return _cast(array, spec).tobytes()


def _cast(array: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[Any]:
    dtype = DTYPES[spec.dtype]
    if array.dtype.kind not in _ACCEPTED_KINDS[dtype.kind]:
        raise BadTensor(f"input {spec.name!r}: the values are not of type {spec.dtype}")
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise BadTensor(f"input {spec.name!r}: values reach from {low} to {high}, outside of {spec.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(dtype)


# JSON has booleans, whole numbers and others; a whole number may stand for a float, not the other way round.
_ACCEPTED_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


def _wanted(request: InferRequest, signature: Signature) -> tuple[tuple[int, bool], ...]:
    default = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return tuple((k, default) for k in range(len(signature.outputs)))
    names = [spec.name for spec in signature.outputs]
    wanted = []
    for output in request.outputs:
        _refuse_unoffered(output.parameters)
        if output.name not in names:
            raise BadTensor(f"unknown output {output.name[:80]!r}; {signature.model} gives {', '.join(names)}")
        wanted.append((names.index(output.name), output.parameters.get("binary_data", default) is True))
    return tuple(wanted)


def _refuse_unoffered(parameters: Parameters) -> None:
    for name in NOT_OFFERED:
        if name in parameters:
            raise NotARequest(f"parameter {name} is not offered; see the extensions at GET /v2")


# ---------------------------------------------------------------- response
def encode_answer(call: Call, request_id: str, outputs: Sequence[bytes], signature: Signature) -> tuple[bytes, ...]:
    """Return the body's parts: the JSON, then a blob per binary output."""
    described, blobs = [], []
    for index, binary in call.wanted:
        spec, data = signature.outputs[index], outputs[index]
        described.append(_described(spec, data, binary=binary))
        if binary:
            blobs.append(data)
    answer = InferResponse(signature.model, str(signature.version), request_id, tuple(described))
    return msgspec.json.encode(answer), *blobs


def _described(spec: TensorSpec, data: bytes, *, binary: bool) -> OutputTensor:
    if binary:
        return OutputTensor(spec.name, spec.shape, spec.dtype, parameters={BINARY_SIZE: len(data)})
    values = np.frombuffer(data, DTYPES[spec.dtype]).tolist()
    return OutputTensor(spec.name, spec.shape, spec.dtype, data=values)


_requests = msgspec.json.Decoder(InferRequest)
