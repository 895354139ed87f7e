"""From a frame to the model's input tensors: bytes as they are, JSON numbers, or a picture scaled to the input.

`BadFrame` means that the frame is not what the pipeline expects at all (no picture, no JSON); `BadTensor` that it
does not fit this model, which counts as an error of the model's service as a client's would.
"""

import io
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.core.pipelines import ImagePreprocess, JsonPreprocess, Preprocess, RawPreprocess
from agent.inference.pipelines.flow import BadFrame, Data
from agent.inference.tensors import BadTensor, Buffer, Signature, count, size
from protocol.manifest import TensorSpec
from runtime.interpreter import DTYPES
from runtime.preprocess import quantise

MAX_PIXELS = 64 * 1024 * 1024  # of a picture, before it is decoded
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
_DIMENSIONS = 4  # batch, height, width, channels


def prepare(data: Data, how: Preprocess, signature: Signature) -> tuple[Buffer, ...]:
    """Return the bytes of each input; raise `BadFrame` or `BadTensor`."""
    match how:
        case ImagePreprocess():
            return (_image(data, how, _only(signature)),)
        case JsonPreprocess():
            return _json(_bytes(data), how, signature)
        case RawPreprocess():
            return (_raw(_bytes(data), _only(signature)),)


def _only(signature: Signature) -> TensorSpec:
    if len(signature.inputs) != 1:
        raise BadTensor(f"{signature.model} takes {len(signature.inputs)} inputs, this pipeline gives one")
    return signature.inputs[0]


def _bytes(data: Data) -> bytes:
    return data if isinstance(data, bytes) else data.tobytes()


def _raw(data: bytes, spec: TensorSpec) -> bytes:
    if len(data) != size(spec):
        raise BadTensor(f"{spec.dtype} {list(spec.shape)} takes {size(spec)} bytes, the frame has {len(data)}")
    return data


# ---------------------------------------------------------------- JSON
def _json(data: bytes, how: JsonPreprocess, signature: Signature) -> tuple[Buffer, ...]:
    try:
        decoded = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFrame(f"not JSON: {error}") from error
    if not isinstance(decoded, dict):
        return (_numbers(decoded, how, _only(signature)),)
    names = [spec.name for spec in signature.inputs]
    if sorted(decoded) != sorted(names):
        raise BadTensor(f"{signature.model} takes {', '.join(names)}; the frame has {', '.join(decoded)[:200]}")
    return tuple(_numbers(decoded[spec.name], how, spec) for spec in signature.inputs)


def _numbers(values: object, how: JsonPreprocess, spec: TensorSpec) -> bytes:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise BadFrame("the JSON is not a regular array of numbers") from error
    if array.dtype.kind not in "biuf":
        raise BadFrame("the JSON is not a regular array of numbers")
    if array.size != count(spec):
        raise BadTensor(f"{count(spec)} numbers are expected for {spec.name}, the frame has {array.size}")
    return _in_units(array, spec) if how.values == "tensor" else _quantised(array, spec)


def _in_units(array: npt.NDArray[Any], spec: TensorSpec) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found just below
        cast = array.astype(DTYPES[spec.dtype], casting="unsafe")
    fits = np.isfinite(cast).all() if cast.dtype.kind == "f" else np.array_equal(cast, array)
    if not fits:
        raise BadTensor(f"the numbers for {spec.name} are outside of {spec.dtype}")
    return cast.tobytes()


def _quantised(array: npt.NDArray[Any], spec: TensorSpec) -> bytes:
    try:
        return quantise(array, spec).tobytes()
    except ValueError as error:
        raise BadFrame(str(error)) from error


# ---------------------------------------------------------------- pictures
def _image(data: Data, how: ImagePreprocess, spec: TensorSpec) -> bytes:
    if len(spec.shape) != _DIMENSIONS or spec.shape[3] not in MODES:
        raise BadTensor(f"{spec.name} {list(spec.shape)} is no picture of 1 or 3 channels")
    _, height, width, channels = spec.shape
    pixels = _pixels(data, width, height, MODES[channels])
    if spec.dtype == "UINT8" and spec.scale is None:
        return pixels.tobytes()
    return _quantised((pixels - how.mean) / how.std, spec)


def _pixels(data: Data, width: int, height: int, mode: str) -> npt.NDArray[np.uint8]:
    """Return the picture in the input's size; bilinear, the whole picture, its sides stretched if need be."""
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(data, bytes):
            picture: Any = Image.open(io.BytesIO(data))
            _check_pixels(*picture.size)
            picture.draft(mode, (width, height))  # JPEG: decoded at a fraction of its size, much cheaper
        else:
            picture = Image.fromarray(data)
        resized = picture.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized, np.uint8)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadFrame(f"not a picture that can be read: {error}") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadFrame(f"a picture of {width} x {height} pixels is over the cap of {MAX_PIXELS}")
