"""The answer to an inference request: output bytes to a body, or to the best classes (the classification extension).

`select` is what every transport shares. An answer with all outputs binary is put together from prepared parts.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.inference.tensors import (
    BINARY_SIZE,
    BYTES,
    LENGTH_BYTES,
    Call,
    InferResponse,
    OutputTensor,
    Selected,
    Signature,
    Wanted,
)
from protocol.manifest import TensorSpec
from runtime.interpreter import DTYPES


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
