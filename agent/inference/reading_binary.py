"""The binary tensors of an inference request: bytes that lie behind its JSON, images among them.

Gives each input its share of the body, and makes a tensor of JPEGs and PNGs. Nothing is copied but images.
"""

from collections.abc import Sequence

from agent.inference.tensors import (
    BINARY_SIZE,
    LENGTH_BYTES,
    MAX_SHOWN,
    BadTensor,
    Buffer,
    Given,
    InputTensor,
    size,
)
from protocol.manifest import TensorSpec
from runtime.images import BadImage, ImageReader, is_image


def split_blobs(tensors: Sequence[InputTensor], blobs: memoryview) -> list[Given]:
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


def check_size(spec: TensorSpec, given: int) -> None:
    """Raise `BadTensor` unless so many bytes fill the tensor."""
    if given != size(spec):
        raise BadTensor(
            f"input {spec.name!r}: {size(spec)} bytes are expected ({spec.dtype} {list(spec.shape)}), got {given}"
        )


# ---------------------------------------------------------------- images
def tensor_of_images(given: Given, spec: TensorSpec, reader: ImageReader) -> bytes:
    """Return the tensor that images make: one JPEG or PNG for each place of the batch."""
    if given.tensor.shape not in {(spec.shape[0],), (spec.shape[0], 1)}:
        raise BadTensor(
            f"input {spec.name!r}: images have shape [{spec.shape[0]}], got {list(given.tensor.shape)[:16]}"
        )
    if given.blob is None:
        raise BadTensor(f"input {spec.name!r}: images come as binary data, not within JSON")
    return read_images(reader, spec, elements(given.blob, spec.shape[0]))


def read_images(reader: ImageReader, spec: TensorSpec, images: Sequence[Buffer]) -> bytes:
    """Return the tensor that these images make; raise `BadTensor`."""
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
