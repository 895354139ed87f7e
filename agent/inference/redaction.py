"""Takes out of a sample what must not be kept, by a function or a program that the device's owner chose.

A sample without its redaction is not kept: a hook that cannot be found stops capture at start, one that fails loses
that sample only.
"""

import base64
import importlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.core.capturing import CapturePolicy
from agent.inference.pipelines.children import run_once
from agent.inference.samples import Sample, Tensor
from runtime.interpreter import DTYPES

PROGRAM_SECONDS = 10.0
MARGIN = 64 * 1024  # bytes that a program may print beyond what it was given

Arrays = dict[str, npt.NDArray[Any]]
Redact = Callable[[Sample], Sample]


class Refused(Exception):
    """The hook wants this sample not to be kept."""


class NoRedaction(Exception):
    """The hook cannot be used; nothing is kept without it."""


class RedactionFailed(Exception):
    """The hook gave something else than the sample's inputs."""


class _Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """An input as a program reads and prints it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: str  # base64


class _Exchange(msgspec.Struct, frozen=True, kw_only=True):
    inputs: tuple[_Encoded, ...] | None  # None: keep nothing


def redactor(policy: CapturePolicy) -> Redact | None:
    """Return the hook that the policy names, or None when it names none; raise `NoRedaction`."""
    if policy.redact and policy.redact_command:
        raise NoRedaction("capture.redact and capture.redact_command are both set; one of them does it")
    if policy.redact:
        hook = _imported(policy.redact)
        return lambda sample: _by_function(hook, sample)
    if policy.redact_command:
        return lambda sample: _by_program(policy.redact_command, sample)
    return None


# ---------------------------------------------------------------- a function
def _imported(name: str) -> Callable[[Arrays], Arrays | None]:
    module, _, attribute = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise NoRedaction(f"capture.redact {name!r} cannot be imported: {error}") from error
    if not callable(hook):
        raise NoRedaction(f"capture.redact {name!r} is not a function")
    found: Callable[[Arrays], Arrays | None] = hook
    return found


def _by_function(hook: Callable[[Arrays], Arrays | None], sample: Sample) -> Sample:
    redacted = hook({tensor.name: _array(tensor) for tensor in sample.inputs})
    if redacted is None:
        raise Refused
    if set(redacted) != {tensor.name for tensor in sample.inputs}:
        raise RedactionFailed(f"the function returned {sorted(redacted)[:8]} instead of the inputs")
    inputs = tuple(_with_array(tensor, redacted[tensor.name]) for tensor in sample.inputs)
    return msgspec.structs.replace(sample, inputs=inputs)


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the values as an array that may be changed in place."""
    return np.frombuffer(tensor.data, DTYPES[tensor.datatype]).reshape(tensor.shape).copy()


def _with_array(tensor: Tensor, array: npt.NDArray[Any]) -> Tensor:
    data = np.asarray(array, DTYPES[tensor.datatype])
    if data.shape != tensor.shape:
        raise RedactionFailed(f"the function returned {list(data.shape)} for {tensor.name} {list(tensor.shape)}")
    return msgspec.structs.replace(tensor, data=data.tobytes())


# ---------------------------------------------------------------- a program
def _by_program(command: tuple[str, ...], sample: Sample) -> Sample:
    encoded = tuple(
        _Encoded(name=one.name, datatype=one.datatype, shape=one.shape, data=base64.b64encode(one.data).decode())
        for one in sample.inputs
    )
    given = msgspec.json.encode(_Exchange(inputs=encoded)) + b"\n"
    printed = run_once(command, given=given, cap=len(given) + MARGIN, seconds=PROGRAM_SECONDS)
    try:
        answer = msgspec.json.decode(printed, type=_Exchange)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RedactionFailed(f"the program printed something else than inputs: {error}") from error
    if answer.inputs is None:
        raise Refused
    if len(answer.inputs) != len(sample.inputs):
        raise RedactionFailed(f"the program printed {len(answer.inputs)} inputs instead of {len(sample.inputs)}")
    inputs = tuple(map(_with_encoded, sample.inputs, answer.inputs))
    return msgspec.structs.replace(sample, inputs=inputs)


def _with_encoded(tensor: Tensor, encoded: _Encoded) -> Tensor:
    if (encoded.name, encoded.datatype, encoded.shape) != (tensor.name, tensor.datatype, tensor.shape):
        raise RedactionFailed(f"the program printed {encoded.name[:40]!r} instead of {tensor.name!r} as it was")
    try:
        data = base64.b64decode(encoded.data, validate=True)
    except ValueError as error:
        raise RedactionFailed(f"the program's {tensor.name!r} is not base64") from error
    if len(data) != len(tensor.data):
        raise RedactionFailed(f"the program printed {len(data)} bytes for {tensor.name!r} of {len(tensor.data)}")
    return msgspec.structs.replace(tensor, data=data)
