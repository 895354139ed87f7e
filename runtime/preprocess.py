"""Real values to tensor values and back: the arithmetic of quantisation.

``real = (q - zero_point) * scale``, with the scale and zero point of the tensor. What the real values stand for
(a pixel, a sample of sound) is the model's own business and is written in its manifest.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.manifest import TensorSpec
from runtime.interpreter import DTYPES


def quantise(values: npt.ArrayLike, spec: TensorSpec) -> npt.NDArray[Any]:
    """Return real values as the tensor takes them, rounded to even and clipped to the type's range.

    Raises ValueError for NaN or infinity, which have no quantised value and poison a float model, and for what
    becomes infinity in the tensor's type.
    """
    real = np.asarray(values, np.float64)
    if not np.isfinite(real).all():
        raise ValueError(f"values for {spec.name!r} contain NaN or infinity")
    dtype = DTYPES[spec.dtype]
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            cast = np.asarray(real, dtype)
        if not np.isfinite(cast).all():
            raise ValueError(f"values for {spec.name!r} are outside of {spec.dtype}")
        return cast
    if dtype.kind == "b":
        return np.asarray(real != 0)
    with np.errstate(over="ignore"):  # infinitely many steps are clipped like too many
        steps = np.rint(real / (spec.scale or 1.0)) + (spec.zero_point or 0)
    return np.asarray(np.clip(steps, *_limits(dtype)), dtype)


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the smallest and the largest float that a type of whole numbers can take."""
    limits = np.iinfo(dtype)
    largest = float(limits.max)  # of 64 bits: rounded up, to one more than fits
    return float(limits.min), largest if int(largest) <= limits.max else float(np.nextafter(largest, 0.0))


def dequantise(tensor: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[np.float32]:
    """Return tensor values as real values."""
    real = tensor.astype(np.float32)
    if spec.scale is None:
        return real
    return (real - np.float32(spec.zero_point or 0)) * np.float32(spec.scale)
