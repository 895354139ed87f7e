"""Reads what people hand to the packer: labelled samples and class names. Everything is capped and checked here.

Samples are an ``.npz`` with ``x`` (the model's real-valued inputs, first axis: samples) and ``y`` (the true class of
each, counted from 0). Class names are a text file, one a line.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.refusal import Refused
from protocol.names import MAX_CLASSES
from runtime.arrays import BadArrays, read_arrays

MAX_SAMPLES = 1024**3  # bytes of arrays
MAX_CLASSES_FILE = 1024**2  # bytes
MIN_SAMPLES = 8  # the fewest golden samples a bundle may carry


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Checked samples."""

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64]
    sha256: str  # of the file


def read_samples(path: Path, classes: int) -> Samples:
    """Return the samples of a file; raise `Refused` for anything that could spoil what is measured with them."""
    try:
        arrays = read_arrays(path, MAX_SAMPLES)
    except BadArrays as error:
        raise Refused(str(error)) from error
    for name in ("x", "y"):
        if name not in arrays:
            raise Refused(f"{path}: array {name} is missing; there are {sorted(arrays)}")
    _check_inputs(path, arrays["x"])
    _check_truth(path, arrays["x"], arrays["y"], classes)
    with path.open("rb") as file:
        return Samples(x=arrays["x"], y=arrays["y"].astype(np.int64), sha256=hashlib.sha256(file.read()).hexdigest())


def read_classes(path: Path) -> tuple[str, ...]:
    """Return the class names of a file; raise `Refused`."""
    if not path.is_file():
        raise Refused(f"{path}: there is no such file")
    with path.open("rb") as file:
        content = file.read(MAX_CLASSES_FILE + 1)
    if len(content) > MAX_CLASSES_FILE:
        raise Refused(f"{path}: class names are over the cap of {MAX_CLASSES_FILE} bytes")
    try:
        names = tuple(line.strip() for line in content.decode("utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: not UTF-8 text: {error}") from error
    if not names or not all(names):
        raise Refused(f"{path}: one class name a line is expected, none empty")
    if len(set(names)) != len(names) or len(names) > MAX_CLASSES:
        raise Refused(f"{path}: {len(names)} class names; they must be different and at most {MAX_CLASSES}")
    return names


def _check_inputs(path: Path, x: npt.NDArray[Any]) -> None:
    if x.dtype.kind not in "fiu" or x.ndim == 0:
        raise Refused(f"{path}: x: numbers with the samples along the first axis are expected, not {x.dtype}")
    if len(x) < MIN_SAMPLES:
        raise Refused(f"{path}: x: {len(x)} samples are too few; at least {MIN_SAMPLES} are needed")
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        raise Refused(f"{path}: x: {len(bad)} samples contain NaN or infinity, the first is number {bad[0]}")


def _check_truth(path: Path, x: npt.NDArray[Any], y: npt.NDArray[Any], classes: int) -> None:
    if y.dtype.kind not in "iu" or y.shape != (len(x),):
        raise Refused(f"{path}: y: {len(x)} whole numbers are expected, not {y.dtype} {y.shape}")
    if y.min() < 0 or y.max() >= classes:
        raise Refused(f"{path}: y: classes {y.min()}…{y.max()} occur, but there are names for 0…{classes - 1}")
