"""The tensors of the Open Inference Protocol: what a request, an answer and a served model say about them.

Only shapes and errors live here. A request is read by `reading` (its JSON by `reading_json`, its binary tensors by
`reading_binary`), an answer is written by `answering`. `NotARequest` means the body is not an inference request at
all; `BadTensor` that it does not fit this model (which counts as an error of the model's service: a new version that
broke its clients must show).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from protocol.manifest import TensorSpec
from runtime.images import MAX_IMAGE, ImageReader
from runtime.interpreter import DTYPES

MAX_ID = 128  # characters of a request id; it is remembered until its truth comes
MAX_SHOWN = 80  # characters of a client's words in a message
LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian
JSON_BYTES_PER_ELEMENT = 32  # the longest number in JSON, with sign, exponent, brackets and separator
JSON_MARGIN = 64 * 1024
BINARY_SIZE = "binary_data_size"
BYTES = "BYTES"  # a datatype of the protocol that no tensor of a model has: images in, classes out
_ID = "\0"  # stands for the id in a prepared answer

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
    def layouts(self) -> "dict[bytes, Layout]":
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


class Layout(NamedTuple):
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
