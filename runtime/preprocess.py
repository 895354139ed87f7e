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

    Raises ValueError for NaN or infinity, which have no quantised value and poison a float model.
    """
    real = np.asarray(values, np.float64)
    if not np.isfinite(real).all():
        raise ValueError(f"values for {spec.name!r} contain NaN or infinity")
    dtype = DTYPES[spec.dtype]
    if dtype.kind == "f":
        return np.asarray(real, dtype)
    if dtype.kind == "b":
        return np.asarray(real != 0)
    steps = np.rint(real / (spec.scale or 1.0)) + (spec.zero_point or 0)
    limits = np.iinfo(dtype)
    return np.asarray(np.clip(steps, limits.min, limits.max), dtype)


def dequantise(tensor: npt.NDArray[Any], spec: TensorSpec) -> npt.NDArray[np.float32]:
    """Return tensor values as real values."""
    real = tensor.astype(np.float32)
    if spec.scale is None:
        return real
    return (real - np.float32(spec.zero_point or 0)) * np.float32(spec.scale)
