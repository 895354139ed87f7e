"""Inference requests and answers: gRPC messages to the shapes of `tensors`, and back.

Inputs come raw, or as typed values; answers are always raw, for that is what clients read.
"""

from collections.abc import Callable, Mapping
from typing import Any

from agent.inference.answering import select
from agent.inference.grpc_server.messages import message
from agent.inference.reading import collect
from agent.inference.reading_json import checked_id, wanted, whole
from agent.inference.service import Answered
from agent.inference.tensors import (
    BYTES,
    LENGTH_BYTES,
    Call,
    Given,
    InputTensor,
    NotARequest,
    Parameters,
    Signature,
    WantedOutput,
)

_RESPONSE = message("ModelInferResponse")
_OUTPUT = _RESPONSE.InferOutputTensor
FINAL = "triton_final_response"  # on each answer of a stream: none of ours has several parts
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


def decoder(request: Any) -> Callable[[Signature], Call]:
    """Return what decodes a request against a model's tensors, as `Service.infer` wants it."""
    return lambda signature: _decode(request, signature)


def _decode(request: Any, signature: Signature) -> Call:
    parameters = _parameters(request.parameters)
    outputs = [WantedOutput(one.name, _parameters(one.parameters)) for one in request.outputs]
    return Call(
        id=checked_id(request.id),
        inputs=collect(_given(request), signature),
        wanted=wanted(outputs, signature, binary=True),
        priority=whole(parameters, "priority"),
        timeout_us=whole(parameters, "timeout"),
    )


def _given(request: Any) -> list[Given]:
    raw = request.raw_input_contents
    if not raw:
        return [_typed(one) for one in request.inputs]
    if len(raw) != len(request.inputs):
        raise NotARequest(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs")
    if any(one.HasField("contents") for one in request.inputs):
        raise NotARequest("contents must not stand beside raw_input_contents")
    return [Given(tensor=_tensor(one), blob=blob) for one, blob in zip(request.inputs, raw, strict=True)]


def _typed(tensor: Any) -> Given:
    field = _CONTENTS.get(tensor.datatype)
    if field is None or not tensor.HasField("contents"):
        return Given(tensor=_tensor(tensor))
    values = list(getattr(tensor.contents, field))
    if tensor.datatype == BYTES:
        return Given(tensor=_tensor(tensor), blob=b"".join(map(_element, values)))
    return Given(tensor=_tensor(tensor, values))


def _element(data: bytes) -> bytes:
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def _tensor(tensor: Any, data: list[Any] | None = None) -> InputTensor:
    return InputTensor(tensor.name, tuple(tensor.shape), tensor.datatype, _parameters(tensor.parameters), data)


def _parameters(given: Mapping[str, Any]) -> Parameters:
    return {name: _value(value) for name, value in given.items()}


def _value(parameter: Any) -> bool | int | float | str | None:
    choice = parameter.WhichOneof("parameter_choice")
    value: bool | int | float | str | None = getattr(parameter, choice) if choice else None
    return value


def encode(done: Answered, *, in_stream: bool = False) -> Any:
    """Return the response to an inference."""
    selected = select(done.call, done.outputs, done.signature)
    response = _RESPONSE(
        model_name=done.signature.model,
        model_version=str(done.signature.version),
        id=done.id,
        outputs=[_OUTPUT(name=one.name, datatype=one.datatype, shape=one.shape) for one in selected],
        raw_output_contents=[one.blob for one in selected],
    )
    if in_stream:
        response.parameters[FINAL].bool_param = True
    return response
