"""The JSON of an inference request: what it asks for, and the numbers that stand in it.

Gives the bytes of a tensor whose values are written out, checked against the model's. What lies behind the JSON is
read by `reading_binary`.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.inference.tensors import (
    MAX_ID,
    MAX_SHOWN,
    BadTensor,
    InferRequest,
    NotARequest,
    Parameters,
    Signature,
    Wanted,
    WantedOutput,
    count,
)
from protocol.manifest import TensorSpec
from runtime.interpreter import DTYPES

CLASSIFICATION = "classification"
NOT_OFFERED = ("shared_memory_region",)


def decode_json(data: memoryview) -> InferRequest:
    """Return what the JSON says; raise `NotARequest`."""
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


def refuse_unoffered(parameters: Parameters) -> None:
    """Raise `NotARequest` for what other servers can do and this one cannot."""
    for name in NOT_OFFERED:
        if name in parameters:
            raise NotARequest(f"parameter {name} is not offered; see the extensions at GET /v2")


# ---------------------------------------------------------------- wanted outputs
def wanted(outputs: Sequence[WantedOutput], signature: Signature, *, binary: bool) -> tuple[Wanted, ...]:
    """Return what is asked for: every output when none is named; ``binary`` where an output does not say it."""
    if not outputs and binary:
        return signature.all_binary
    if not outputs:
        return tuple(Wanted(index=k, binary=False) for k in range(len(signature.outputs)))
    names = [spec.name for spec in signature.outputs]
    found: dict[str, Wanted] = {}
    for output in outputs:
        refuse_unoffered(output.parameters)
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


# ---------------------------------------------------------------- numbers
def bytes_of_values(data: list[Any], spec: TensorSpec) -> bytes:
    """Return the tensor that a list of numbers makes, nested or flat; raise `BadTensor`."""
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

_requests = msgspec.json.Decoder(InferRequest)
