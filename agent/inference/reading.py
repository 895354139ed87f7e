"""An inference request: a body to the bytes of each input, checked against the model's name, type, shape and size.

Puts together what `reading_json` and `reading_binary` find; `collect` is what every transport shares. A client that
asks alike says it alike: a JSON that was understood once is looked up from then on.
"""

from collections.abc import Sequence

from agent.inference.reading_binary import check_size, read_images, split_blobs, tensor_of_images
from agent.inference.reading_json import bytes_of_values, checked_id, decode_json, refuse_unoffered, wanted, whole
from agent.inference.tensors import (
    BINARY_SIZE,
    BYTES,
    MAX_SHOWN,
    BadTensor,
    Buffer,
    Call,
    Given,
    InferRequest,
    Layout,
    NotARequest,
    Signature,
    Wanted,
    size,
)
from runtime.images import is_image

REMEMBERED = 64  # requests that were understood, per model
MAX_REMEMBERED = 1024  # bytes of the JSON of one


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
    request = decode_json(body[:split])
    call = Call(
        id=checked_id(request.id),
        inputs=collect(split_blobs(request.inputs, body[split:]), signature),
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
    signature.layouts[said] = Layout(call._replace(inputs=()), in_order, end - len(said))


def _raw_call(body: memoryview, signature: Signature) -> Call:
    if len(signature.inputs) != 1:
        raise NotARequest(f"a raw body needs a model with one input, {signature.model} has {len(signature.inputs)}")
    spec = signature.inputs[0]
    if len(body) == signature.input_sizes[0]:
        data: Buffer = body
    elif signature.image and is_image(body):
        data = read_images(signature.image, spec, [body])
    else:
        check_size(spec, len(body))
        data = body
    return Call(id="", inputs=(data,), wanted=signature.all_binary)


def _wanted(request: InferRequest, signature: Signature) -> tuple[Wanted, ...]:
    return wanted(request.outputs or (), signature, binary=request.parameters.get("binary_data_output") is True)


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
    refuse_unoffered(tensor.parameters)
    if tensor.datatype == BYTES and index == 0 and signature.image:
        return tensor_of_images(given, spec, signature.image)
    if tensor.datatype != spec.dtype:
        raise BadTensor(f"input {spec.name!r}: datatype {spec.dtype} is expected, got {tensor.datatype[:20]}")
    if tensor.shape != spec.shape:
        raise BadTensor(f"input {spec.name!r}: shape {list(spec.shape)} is expected, got {list(tensor.shape)[:16]}")
    if given.blob is not None:
        check_size(spec, len(given.blob))
        return given.blob
    if tensor.data is None:
        raise BadTensor(f"input {spec.name!r} has neither data nor {BINARY_SIZE}")
    return bytes_of_values(tensor.data, spec)
