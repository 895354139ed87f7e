"""From a classifier's output bytes to the class and the confidence that are counted, on the hot path.

Computes what `runtime.calibrator` defines (the packer's reference statistics come from there). An 8-bit output has
only 256 values, so what each is worth is looked up, without numpy where there are few classes: making an array takes
longer than adding ten numbers. Everything else goes through the calibrator itself.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protocol.manifest import Calibrator, TensorSpec
from runtime.calibrator import probabilities, score_floor, top_class
from runtime.interpreter import DTYPES
from runtime.preprocess import dequantise

FEW_CLASSES = 64  # about where numpy becomes the faster one
MAX_SPREAD = 600.0  # between the logits of one table: beyond, the smallest weight is no longer a number above 0

Floats = npt.NDArray[np.float64]


class Prediction(NamedTuple):
    """What a classifier answered: the class and how sure it was, 0…1."""

    label: int  # index of the class
    confidence: float


class Predictor:
    """Reads one model's predictions. Safe to use from several threads."""

    def __init__(self, spec: TensorSpec, calibrator: Calibrator | None) -> None:
        """``spec``: the output with the scores."""
        self._spec = spec
        self._calibrator = calibrator
        self._dtype = DTYPES[spec.dtype]
        self._table = _table_of(spec, calibrator) if self._dtype.itemsize == 1 else None

    def predict(self, data: bytes) -> Prediction:
        """Return the prediction in an output's bytes."""
        if self._table is None:
            scores = probabilities(np.frombuffer(data, self._dtype), self._spec, self._calibrator)
            return Prediction(*top_class(scores))
        ranks = data.translate(self._table.ranks)
        best = ranks.index(max(ranks))
        weight = self._table.weights[data[best]]
        if self._calibrator is None:
            return Prediction(best, min(1.0, max(0.0, weight)))
        return Prediction(best, weight / self._table.sum(data))


class _Table:
    """What each byte of an output is worth: its place among all, and its score (softmax: its share of the sum)."""

    def __init__(self, worths: Floats, weights: Floats) -> None:
        """Both by byte; equal worths have equal ranks."""
        self.ranks = np.unique(worths, return_inverse=True)[1].astype(np.uint8).tobytes()
        self.weights: list[float] = weights.tolist()
        self._array = weights

    def sum(self, data: bytes) -> float:
        """Return the sum of the weights of these bytes."""
        if len(data) <= FEW_CLASSES:
            return sum(map(self.weights.__getitem__, data))
        return float(self._array[np.frombuffer(data, np.uint8)].sum())


def _table_of(spec: TensorSpec, calibrator: Calibrator | None) -> _Table | None:
    """Return the table of an 8-bit output, or None where its weights would be too far apart."""
    values = np.arange(256, dtype=np.uint8).view(DTYPES[spec.dtype])
    scores = dequantise(values, spec).astype(np.float64)
    if calibrator is None:
        return _Table(scores, scores)
    logits = np.log(np.maximum(scores, score_floor(spec))) / calibrator.temperature
    logits -= logits.max()
    return _Table(logits, np.exp(logits)) if logits.min() > -MAX_SPREAD else None
