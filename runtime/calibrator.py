"""From a classifier's output tensor to probabilities, a class and a confidence.

The packer and the data plane both compute them here, so that the reference statistics in a bundle and what a
device reports are the same quantity. Calibration is temperature scaling: softmax(log(p) / T) with one T, fitted by
the negative log-likelihood on held-out samples (Guo et al. 2017, arXiv 1706.04599). It never changes the class.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.manifest import Calibrator, TensorSpec
from protocol.statistics import CONFIDENCE_BINS
from runtime.preprocess import dequantise

Floats = npt.NDArray[np.float64]

FLOAT_FLOOR = 1e-7  # below the resolution of a float32 softmax
TEMPERATURES = (0.05, 20.0)  # where a temperature is looked for; published ones lie between 0.5 and 5
SEARCH_STEPS = 60  # golden section: the bracket shrinks by 0.618 a step, far below what n samples can tell
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def probabilities(tensor: npt.NDArray[Any], spec: TensorSpec, calibrator: Calibrator | None = None) -> Floats:
    """Return the scores in the last axis of an output tensor as probabilities, calibrated if that is possible.

    The model's output must be probabilities already (a softmax at its end); the packer checks that.
    """
    scores = dequantise(tensor, spec).astype(np.float64)
    if calibrator is None:
        return scores
    return at_temperature(scores, calibrator.temperature, score_floor(spec))


def score_floor(spec: TensorSpec) -> float:
    """Return the score to take for 0: half a step of the tensor, for that is all that a quantised 0 says."""
    return spec.scale / 2 if spec.scale else FLOAT_FLOOR


def at_temperature(scores: Floats, temperature: float, floor: float) -> Floats:
    """Return softmax(log(scores) / temperature) over the last axis; scores are raised to ``floor`` first."""
    logits = np.log(np.maximum(scores, floor)) / temperature
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Floats = odds / odds.sum(axis=-1, keepdims=True)
    return result


def top_class(scores: Floats) -> tuple[int, float]:
    """Return the class with the highest score of one sample, and that score kept inside 0…1."""
    best = int(scores.argmax())
    return best, min(1.0, max(0.0, float(scores.flat[best])))


def confidence_bin(confidence: float) -> int:
    """Return the wire's bin of a confidence in 0…1; 1 itself belongs to the last bin."""
    return min(CONFIDENCE_BINS - 1, int(confidence * CONFIDENCE_BINS))


def fit_calibrator(tensor: npt.NDArray[Any], truth: npt.NDArray[Any], spec: TensorSpec) -> Calibrator:
    """Return the calibrator for output tensors of samples (first axis) whose true classes are known."""
    scores = dequantise(tensor, spec).astype(np.float64).reshape(len(truth), -1)
    return Calibrator(temperature=fit_temperature(scores, truth, score_floor(spec)), samples=len(truth))


def fit_temperature(scores: Floats, truth: npt.NDArray[Any], floor: float) -> float:
    """Return the temperature of the smallest negative log-likelihood, by golden-section search on its logarithm.

    The likelihood is convex in 1/T, so it has one minimum.
    """
    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    found = _minimise(lambda t: _negative_log_likelihood(scores, truth, math.exp(t), floor), low, high)
    return round(math.exp(found), 4)


def _negative_log_likelihood(scores: Floats, truth: npt.NDArray[Any], temperature: float, floor: float) -> float:
    of_truth = at_temperature(scores, temperature, floor)[np.arange(len(truth)), truth]
    return float(-np.log(np.maximum(of_truth, np.finfo(np.float64).tiny)).mean())


def _minimise(cost: Callable[[float], float], low: float, high: float) -> float:
    left, right = high - _GOLDEN_RATIO * (high - low), low + _GOLDEN_RATIO * (high - low)
    at_left, at_right = cost(left), cost(right)
    for _ in range(SEARCH_STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN_RATIO * (high - low)
            at_left = cost(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN_RATIO * (high - low)
            at_right = cost(right)
    return (low + high) / 2
