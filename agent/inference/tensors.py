"""Open Inference Protocol tensors: a request's body to the bytes of each input, output bytes to a response's body.

Knows JSON tensors, the binary extension and the classification extension, and checks every input against the model's:
name, type, shape, size. `collect` and `select` are what every transport shares. It stops there: no HTTP, no model is
run. `NotARequest` means the body is not an inference request at all;
`BadTensor` that it does not fit this model (which counts as an error of the model's service: a new version that broke
its clients must show).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.manifest import TensorSpec
from runtime.images import MAX_IMAGE, BadImage, ImageReader, is_image
from runtime.interpreter import DTYPES

MAX_ID = 128  # characters of a request id; it is remembered until its truth comes
MAX_SHOWN = 80  # characters of a client's words in a message
LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian
JSON_BYTES_PER_ELEMENT = 32  # the longest number in JSON, with sign, exponent, brackets and separator
JSON_MARGIN = 64 * 1024
BINARY_SIZE = "binary_data_size"
REMEMBERED = 64  # requests that were understood, per model
MAX_REMEMBERED = 1024  # bytes of the JSON of one
_ID = "\0"  # stands for the id in a prepared answer
CLASSIFICATION = "classification"
BYTES = "BYTES"  # a datatype of the protocol that no tensor of a model has: images in, classes out
NOT_OFFERED = ("shared_memory_region",)

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
    classes: tuple[str, ...] = ()  # names for the values of the first output
    image: ImageReader | None = None  # the first input is taken as an image too

    @cached_property
    def body_cap(self) -> int:
        """Return the size over which a request to this model cannot be right."""
        largest = sum(count(spec) * JSON_BYTES_PER_ELEMENT + size(spec) for spec in self.inputs)
        images = self.inputs[0].shape[0] * MAX_IMAGE if self.image else 0
        return largest + images + JSON_MARGIN

    @cached_property
    def layouts(self) -> "dict[bytes, _Layout]":
        """Return the requests that are known, by their JSON: a client that asks alike says it alike."""
        return {}

    @cached_property
    def input_sizes(self) -> tuple[int, ...]:
        """Return the bytes of every input."""
        return tuple(size(spec) for spec in self.inputs)

    @cached_property
    def all_binary(self) -> "tuple[Wanted, ...]":
        """Return all outputs, as a client wants them that speaks binary."""
        return tuple(Wanted(index=k, binary=True) for k in range(len(self.outputs)))

    @cached_property
    def around_the_id(self) -> tuple[bytes, bytes]:
        """Return what stands before and after the id in the JSON of an answer with all outputs binary."""
        outputs = tuple(
            OutputTensor(spec.name, spec.shape, spec.dtype, parameters={BINARY_SIZE: size(spec)})
            for spec in self.outputs
        )
        whole = msgspec.json.encode(InferResponse(self.model, str(self.version), _ID, outputs))
        before, _, after = whole.partition(msgspec.json.encode(_ID))
        return before, after


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An output that goes into the answer."""

    index: int  # among the model's outputs
    binary: bool
    top: int = 0  # so many best classes instead of the values; 0: the values


class Call(NamedTuple):
    """A decoded request: a buffer per input in the model's order, and the wanted outputs."""

    id: str
    inputs: tuple[Buffer, ...]
    wanted: tuple[Wanted, ...]
    priority: int = 0  # 1 is the highest; 0: as usual
    timeout_us: int = 0  # 0: none


class _Layout(NamedTuple):
    """A request that has been understood once: all but its inputs, and where they stand in the body."""

    call: Call
    places: tuple[tuple[int, int], ...]
    size: int  # of all inputs


@dataclass(frozen=True, kw_only=True)
class Given:
    """An input as it came: described, and with its bytes unless they stand as values in ``tensor.data``."""

    tensor: InputTensor
    blob: Buffer | None = None


@dataclass(frozen=True, kw_only=True)
class Selected:
    """An output as it leaves: ``blob`` is its binary form, ``values`` what JSON shows."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    blob: bytes
    values: Callable[[], list[Any]]
    binary: bool


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
    said = bytes(body[:split]) if split <= MAX_REMEMBERED else b""
    layout = signature.layouts.get(said)
    if layout is not None and len(body) == split + layout.size:
        return layout.call._replace(inputs=tuple(body[start:end] for start, end in layout.places))
    request = _decode_json(body[:split])
    call = Call(
        id=checked_id(request.id),
        inputs=collect(_split(request.inputs, body[split:]), signature),
        wanted=_wanted(request, signature),
        priority=whole(request.parameters, "priority"),
        timeout_us=whole(request.parameters, "timeout"),
    )
    if said and not call.id:
        _remember(said, request, call, signature)
    return call


def _remember(said: bytes, request: InferRequest, call: Call, signature: Signature) -> None:
    """Keep where the inputs lie, if they do so as they are: images and values in the JSON are worked on first."""
    if not all(isinstance(one, memoryview) for one in call.inputs):
        return
    sizes = {spec.name: size(spec) for spec in signature.inputs}
    places, end = {}, len(said)
    for tensor in request.inputs:
        places[tensor.name] = (end, end + sizes[tensor.name])
        end += sizes[tensor.name]
    if len(signature.layouts) >= REMEMBERED:
        signature.layouts.clear()
    in_order = tuple(places[spec.name] for spec in signature.inputs)
    signature.layouts[said] = _Layout(call._replace(inputs=()), in_order, end - len(said))


def _raw_call(body: memoryview, signature: Signature) -> Call:
    if len(signature.inputs) != 1:
        raise NotARequest(f"a raw body needs a model with one input, {signature.model} has {len(signature.inputs)}")
    spec = signature.inputs[0]
    if len(body) == signature.input_sizes[0]:
        data: Buffer = body
    elif signature.image and is_image(body):
        data = _read_images(signature.image, spec, [body])
    else:
        _check_size(spec, len(body))
        data = body
    return Call(id="", inputs=(data,), wanted=signature.all_binary)


def _decode_json(data: memoryview) -> InferRequest:
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotARequest(f"the JSON is not an inference request: {error}") from error


def checked_id(request_id: str) -> str:
    """Return a request's id; raise `NotARequest` when it is too long to be remembered."""
    if len(request_id) > MAX_ID:
        raise NotARequest(f"id has {len(request_id)} characters, at most {MAX_ID} are accepted")
    return request_id


def whole(parameters: Parameters, name: str) -> int:
    """Return a parameter that is a whole number not below 0; 0 stands for its absence."""
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NotARequest(f"parameter {name} is a whole number from 0")
    return value


def _split(tensors: Sequence[InputTensor], blobs: memoryview) -> list[Given]:
    """Give each binary input its share of the blobs; one that is alone may leave the size out."""
    given = []
    for tensor in tensors:
        if BINARY_SIZE in tensor.parameters:
            length = _announced(tensor, len(blobs))
            given.append(Given(tensor=tensor, blob=blobs[:length]))
            blobs = blobs[length:]
        elif tensor.data is None and len(tensors) == 1 and len(blobs):
            return [Given(tensor=tensor, blob=blobs)]
        else:
            given.append(Given(tensor=tensor))
    if len(blobs):
        raise BadTensor(f"{len(blobs)} bytes are left over after the last binary input")
    return given


def _announced(tensor: InputTensor, left: int) -> int:
    length, name = tensor.parameters[BINARY_SIZE], tensor.name[:MAX_SHOWN]
    if isinstance(length, bool) or not isinstance(length, int) or length < 0 or tensor.data is not None:
        raise BadTensor(f"input {name!r}: {BINARY_SIZE} must be a whole number, and data must not stand beside it")
    if length > left:
        raise BadTensor(f"input {name!r}: {length} binary bytes are announced, the body has {left} left")
    return length


def collect(given: Sequence[Given], signature: Signature) -> tuple[Buffer, ...]:
    """Return the bytes of every input in the model's order; raise `BadTensor` or `NotARequest`."""
    names = [spec.name for spec in signature.inputs]
    found: dict[str, Buffer] = {}
    for one in given:
        name = one.tensor.name
        if name not in names:
            raise BadTensor(f"unknown input {name[:MAX_SHOWN]!r}; {signature.model} takes {', '.join(names)}")
        if name in found:
            raise BadTensor(f"input {name!r} stands twice")
        found[name] = _input(one, names.index(name), signature)
    missing = [name for name in names if name not in found]
    if missing:
        raise BadTensor(f"input {', '.join(missing)} is missing; {signature.model} takes {', '.join(names)}")
    return tuple(found[name] for name in names)


def _input(given: Given, index: int, signature: Signature) -> Buffer:
    """Return the bytes of one input as its tensor takes them."""
    tensor, spec = given.tensor, signature.inputs[index]
    _refuse_unoffered(tensor.parameters)
    if tensor.datatype == BYTES and index == 0 and signature.image:
        return _images(given, spec, signature.image)
    if tensor.datatype != spec.dtype:
        raise BadTensor(f"input {spec.name!r}: datatype {spec.dtype} is expected, got {tensor.datatype[:20]}")
    if tensor.shape != spec.shape:
        raise BadTensor(f"input {spec.name!r}: shape {list(spec.shape)} is expected, got {list(tensor.shape)[:16]}")
    if given.blob is not None:
        _check_size(spec, len(given.blob))
        return given.blob
    if tensor.data is None:
        raise BadTensor(f"input {spec.name!r} has neither data nor {BINARY_SIZE}")
    return _from_json(tensor.data, spec)


# ---------------------------------------------------------------- images
def _images(given: Given, spec: TensorSpec, reader: ImageReader) -> bytes:
    """Return the tensor that images make: one JPEG or PNG for each place of the batch."""
    if given.tensor.shape not in {(spec.shape[0],), (spec.shape[0], 1)}:
        raise BadTensor(
            f"input {spec.name!r}: images have shape [{spec.shape[0]}], got {list(given.tensor.shape)[:16]}"
        )
    if given.blob is None:
        raise BadTensor(f"input {spec.name!r}: images come as binary data, not within JSON")
    return _read_images(reader, spec, elements(given.blob, spec.shape[0]))


def _read_images(reader: ImageReader, spec: TensorSpec, images: Sequence[Buffer]) -> bytes:
    if len(images) != spec.shape[0]:
        raise BadTensor(f"input {spec.name!r}: {spec.shape[0]} images are expected, got {len(images)}")
    try:
        return b"".join(reader.read(image) for image in images)
    except BadImage as error:
        raise BadTensor(f"input {spec.name!r}: {error}") from error


def elements(blob: Buffer, expected: int) -> list[Buffer]:
    """Return the elements of a BYTES tensor: each is preceded by its length, but a lone image may do without."""
    if expected == 1 and is_image(blob):
        return [blob]
    found: list[Buffer] = []
    rest = memoryview(blob)
    while rest and len(found) <= expected:
        length = int.from_bytes(rest[:LENGTH_BYTES], "little")
        if len(rest) < LENGTH_BYTES or length > len(rest) - LENGTH_BYTES:
            raise BadTensor("a BYTES element is longer than what is left of the data; is its 4-byte length right?")
        found.append(rest[LENGTH_BYTES : LENGTH_BYTES + length])
        rest = rest[LENGTH_BYTES + length :]
    return found


# ---------------------------------------------------------------- numbers
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
    return _cast(array, data, spec).tobytes()


def _cast(array: npt.NDArray[Any], data: list[Any], spec: TensorSpec) -> npt.NDArray[Any]:
    dtype = DTYPES[spec.dtype]
    if dtype == np.uint64:
        array = _whole_again(array, data)
    if array.dtype.kind not in _ACCEPTED_KINDS[dtype.kind]:
        raise BadTensor(f"input {spec.name!r}: the values are not of type {spec.dtype}")
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise BadTensor(f"input {spec.name!r}: values reach from {low} to {high}, outside of {spec.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def _whole_again(array: npt.NDArray[Any], data: list[Any]) -> npt.NDArray[Any]:
    """Return whole numbers as UINT64 where numpy made floats of them, for some are over the range of INT64."""
    if array.dtype.kind != "f":
        return array
    exact = np.asarray(data, object).ravel()
    if any(type(value) is not int or not 0 <= value < 2**64 for value in exact):
        return array
    return exact.astype(np.uint64)


# JSON has booleans, whole numbers and others; a whole number may stand for a float, not the other way round.
_ACCEPTED_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


def _wanted(request: InferRequest, signature: Signature) -> tuple[Wanted, ...]:
    return wanted(request.outputs or (), signature, binary=request.parameters.get("binary_data_output") is True)


def wanted(outputs: Sequence[WantedOutput], signature: Signature, *, binary: bool) -> tuple[Wanted, ...]:
    """Return what is asked for: every output when none is named; ``binary`` where an output does not say it."""
    if not outputs and binary:
        return signature.all_binary
    if not outputs:
        return tuple(Wanted(index=k, binary=False) for k in range(len(signature.outputs)))
    names = [spec.name for spec in signature.outputs]
    found: dict[str, Wanted] = {}
    for output in outputs:
        _refuse_unoffered(output.parameters)
        if output.name not in names:
            raise BadTensor(f"unknown output {output.name[:MAX_SHOWN]!r}; {signature.model} gives {', '.join(names)}")
        if output.name in found:
            raise BadTensor(f"output {output.name!r} stands twice")
        found[output.name] = Wanted(
            index=names.index(output.name),
            binary=output.parameters.get("binary_data", binary) is True,
            top=_top(output),
        )
    return tuple(found.values())


def _top(output: WantedOutput) -> int:
    top = output.parameters.get(CLASSIFICATION, 0)
    if CLASSIFICATION in output.parameters and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise BadTensor(f"output {output.name!r}: {CLASSIFICATION} must be a whole number above 0")
    return int(top or 0)


def _refuse_unoffered(parameters: Parameters) -> None:
    for name in NOT_OFFERED:
        if name in parameters:
            raise NotARequest(f"parameter {name} is not offered; see the extensions at GET /v2")


# ---------------------------------------------------------------- response
def encode_answer(call: Call, request_id: str, outputs: Sequence[bytes], signature: Signature) -> tuple[bytes, ...]:
    """Return the body's parts: the JSON, then a blob per binary output."""
    if call.wanted is signature.all_binary:
        before, after = signature.around_the_id
        return before + msgspec.json.encode(request_id) + after, *outputs
    selected = select(call, outputs, signature)
    answer = InferResponse(
        signature.model, str(signature.version), request_id, tuple(_described(one) for one in selected)
    )
    return msgspec.json.encode(answer), *(one.blob for one in selected if one.binary)


def _described(one: Selected) -> OutputTensor:
    if one.binary:
        return OutputTensor(one.name, one.shape, one.datatype, parameters={BINARY_SIZE: len(one.blob)})
    return OutputTensor(one.name, one.shape, one.datatype, data=one.values())


def select(call: Call, outputs: Sequence[bytes], signature: Signature) -> tuple[Selected, ...]:
    """Return what a call asked for of a model's outputs."""
    return tuple(_select(one, outputs[one.index], signature) for one in call.wanted)


def _select(one: Wanted, data: bytes, signature: Signature) -> Selected:
    spec = signature.outputs[one.index]
    if one.top:
        return _classified(one, data, spec, signature.classes if one.index == 0 else ())
    return Selected(
        name=spec.name,
        datatype=spec.dtype,
        shape=spec.shape,
        blob=data,
        values=lambda: np.frombuffer(data, DTYPES[spec.dtype]).tolist(),
        binary=one.binary,
    )


# ---------------------------------------------------------------- classification extension
def _classified(one: Wanted, data: bytes, spec: TensorSpec, classes: Sequence[str]) -> Selected:
    """Return the best classes as "value:index:label". The last axis holds the classes; a single row has no batch."""
    rows = np.frombuffer(data, DTYPES[spec.dtype]).reshape(-1, spec.shape[-1] if spec.shape else 1)
    found = [text for row in rows for text in _best(row, one.top, classes)]
    shape = (len(found),) if len(rows) == 1 else (len(rows), len(found) // max(1, len(rows)))
    return Selected(
        name=spec.name,
        datatype=BYTES,
        shape=shape,
        blob=b"".join(_element(text.encode()) for text in found),
        values=lambda: list(found),
        binary=one.binary,
    )


def _best(row: npt.NDArray[Any], top: int, classes: Sequence[str]) -> list[str]:
    order = np.argsort(-row.astype(np.float64), kind="stable")[:top]  # of equals, the lower index comes first
    return [_class_text(row[index], int(index), classes) for index in order]


def _class_text(value: Any, index: int, classes: Sequence[str]) -> str:
    number = f"{value:f}" if np.issubdtype(type(value), np.floating) else str(int(value))
    return f"{number}:{index}:{classes[index]}" if index < len(classes) else f"{number}:{index}"


def _element(data: bytes) -> bytes:
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


_requests = msgspec.json.Decoder(InferRequest)
