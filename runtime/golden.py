"""Golden samples: whether this model, on this machine, still answers what it answered when it was packed.

A flatbuffer that loads may still be damaged, and a runtime or driver may compute something else than the release
team saw; only running known inputs tells. Inputs and expected outputs are stored as the tensors' own values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.manifest import Golden, TensorSpec
from runtime.arrays import BadArrays, read_arrays
from runtime.interpreter import DTYPES, LoadedModel

MAX_GOLDEN = 64 * 1024**2  # bytes of arrays: 32 images of 640x640x3 in int8 are 39 MB; a device holds them in memory

Tensors = Sequence[npt.NDArray[Any]]  # one array per tensor of the model; first axis: samples


class GoldenUnreadable(ValueError):
    """The golden samples are missing, damaged, or not made for this model."""


class GoldenMismatch(Exception):
    """The model does not answer a golden sample as it did when it was packed."""

    def __init__(self, *, sample: int, output: str, difference: float, tolerance: float) -> None:
        """Name the first sample that disagrees, the output tensor, and by how much."""
        super().__init__(f"golden sample {sample}: output {output!r} is off by {difference:g}, allowed {tolerance:g}")
        self.sample = sample
        self.output = output
        self.difference = difference
        self.tolerance = tolerance


@dataclass(frozen=True, kw_only=True)
class GoldenSamples:
    """Inputs and the outputs that are expected of them."""

    inputs: Tensors
    outputs: Tensors

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(self.inputs[0])


@dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """All samples agreed."""

    samples: int
    worst: float  # the largest difference seen, in the output's own units


def check_golden(model: LoadedModel, path: str | Path, golden: Golden) -> GoldenResult:
    """Run every golden sample; raise `GoldenMismatch` at the first that differs, or `GoldenUnreadable`."""
    samples = load_golden(path, model.inputs, model.outputs)
    if samples.count != golden.samples:
        raise GoldenUnreadable(f"{path}: {samples.count} samples, the manifest says {golden.samples}")
    worst = 0.0
    for number in range(samples.count):
        worst = max(worst, check_sample(model, samples, number, golden.tolerance))
    return GoldenResult(samples=samples.count, worst=worst)


def check_sample(model: LoadedModel, samples: GoldenSamples, number: int, tolerance: float) -> float:
    """Run one golden sample; return by how much it is off, or raise `GoldenMismatch`."""
    run_sample(model, samples.inputs, number)
    return _compare(model, samples, number, tolerance)


def load_golden(path: str | Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> GoldenSamples:
    """Read golden samples made for these tensors; raise `GoldenUnreadable`."""
    try:
        arrays = read_arrays(path, MAX_GOLDEN)
    except BadArrays as error:
        raise GoldenUnreadable(str(error)) from error
    samples = GoldenSamples(
        inputs=[_pick(path, arrays, f"in_{k}", spec) for k, spec in enumerate(inputs)],
        outputs=[_pick(path, arrays, f"out_{k}", spec) for k, spec in enumerate(outputs)],
    )
    counts = {len(array) for array in (*samples.inputs, *samples.outputs)}
    if len(counts) != 1 or 0 in counts:
        raise GoldenUnreadable(f"{path}: the arrays hold {sorted(counts)} samples; one number above 0 is expected")
    return samples


def save_golden(path: str | Path, samples: GoldenSamples) -> None:
    """Write golden samples; the same samples are always the same bytes."""
    arrays = {f"in_{k}": array for k, array in enumerate(samples.inputs)}
    arrays |= {f"out_{k}": array for k, array in enumerate(samples.outputs)}
    np.savez(path, **arrays)


def run_sample(model: LoadedModel, inputs: Tensors, number: int) -> None:
    """Fill one sample into the model and invoke it."""
    for index, array in enumerate(inputs):
        model.fill(index, array[number].tobytes())
    model.invoke()


def difference(answer: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest absolute difference of two outputs in their own units; NaN against a number is infinite."""
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, and counts as a difference
        gap = np.abs(answer.reshape(-1).astype(np.float64) - expected.reshape(-1).astype(np.float64))
    return float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0))


def _pick(path: str | Path, arrays: Mapping[str, npt.NDArray[Any]], name: str, spec: TensorSpec) -> npt.NDArray[Any]:
    if name not in arrays:
        raise GoldenUnreadable(f"{path}: array {name} (tensor {spec.name!r}) is missing")
    array = arrays[name]
    size = int(np.prod(spec.shape, dtype=np.int64))
    if array.dtype != DTYPES[spec.dtype] or array.ndim == 0 or array.size != len(array) * size:
        raise GoldenUnreadable(
            f"{path}: array {name} is {array.dtype} {array.shape}; tensor {spec.name!r} takes samples of "
            f"{DTYPES[spec.dtype]} {spec.shape}"
        )
    return array


def _compare(model: LoadedModel, samples: GoldenSamples, number: int, tolerance: float) -> float:
    worst = 0.0
    for index, spec in enumerate(model.outputs):
        off = difference(model.array(index), samples.outputs[index][number])
        if not off <= tolerance:
            raise GoldenMismatch(sample=number, output=spec.name, difference=off, tolerance=tolerance)
        worst = max(worst, off)
    return worst
