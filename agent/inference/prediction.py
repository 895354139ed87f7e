"""From a classifier's output bytes to the class and the confidence that are counted, on the hot path.

Computes what `runtime.calibrator` defines (the packer's reference statistics come from there). An 8-bit output has
only 256 values, so the logarithm of each is looked up; everything else goes through the calibrator itself.
"""

from typing import NamedTuple

import numpy as np

from protocol.manifest import Calibrator, TensorSpec
from runtime.calibrator import probabilities, score_floor, top_class
from runtime.interpreter import DTYPES
from runtime.preprocess import dequantise


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
        self._logits = _table(spec, calibrator) if self._dtype.itemsize == 1 and calibrator else None

    def predict(self, data: bytes) -> Prediction:
        """Return the prediction in an output's bytes."""
        if self._logits is None:
            scores = probabilities(np.frombuffer(data, self._dtype), self._spec, self._calibrator)
            return Prediction(*top_class(scores))
        logits = self._logits[np.frombuffer(data, np.uint8)]
        best = int(logits.argmax())
        return Prediction(best, 1.0 / float(np.exp(logits - logits[best]).sum()))


def _table(spec: TensorSpec, calibrator: Calibrator) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return the logit of each byte an output may hold."""
    values = np.arange(256, dtype=np.uint8).view(DTYPES[spec.dtype])
    scores = np.maximum(dequantise(values, spec).astype(np.float64), score_floor(spec))
    return np.asarray(np.log(scores) / calibrator.temperature)
