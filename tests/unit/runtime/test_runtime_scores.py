"""Quantisation, calibration and what is reported of an answer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.manifest import Calibrator, TensorSpec
from runtime.calibrator import (
    at_temperature,
    confidence_bin,
    fit_calibrator,
    fit_temperature,
    probabilities,
    score_floor,
    top_class,
)
from runtime.preprocess import dequantise, quantise

IMAGE = TensorSpec(name="image", dtype="INT8", shape=(1, 4), scale=1 / 255, zero_point=-128)
SCORES = TensorSpec(name="scores", dtype="INT8", shape=(1, 4), scale=1 / 256, zero_point=-128)
FLOATS = TensorSpec(name="scores", dtype="FP32", shape=(1, 4))
scores_of_four = st.lists(st.floats(0.001, 1.0), min_size=4, max_size=4).map(lambda v: np.array(v) / sum(v))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_quantising_and_back_is_off_by_half_a_step_at_most(values: list[float]) -> None:
    back = dequantise(quantise(values, IMAGE), IMAGE)
    assert np.abs(back - np.array(values)).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("spec", "values", "expected"),
    [
        (IMAGE, [0.0, 1.0, 0.5], np.array([-128, 127, 0], np.int8)),
        (IMAGE, [-9.0, 9.0], np.array([-128, 127], np.int8)),
        (TensorSpec(name="x", dtype="UINT8", shape=(2,)), [3.0, 300.0], np.array([3, 255], np.uint8)),
        (TensorSpec(name="x", dtype="BOOL", shape=(2,)), [0, 2], np.array([False, True])),
        (TensorSpec(name="x", dtype="FP32", shape=(2,)), [0.1, -5], np.array([0.1, -5], np.float32)),
        (TensorSpec(name="x", dtype="INT32", shape=(1,)), [7], np.array([7], np.int32)),
    ],
)
def test_quantise_rounds_clips_and_takes_the_tensors_type(
    spec: TensorSpec, values: list[float], expected: np.ndarray
) -> None:
    found = quantise(values, spec)
    assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_quantised(bad: float) -> None:
    with pytest.raises(ValueError, match="'image' contain NaN or infinity"):
        quantise([0.5, bad], IMAGE)


@pytest.mark.parametrize("dtype", ["INT32", "UINT32", "INT64", "UINT64"])
def test_what_is_too_large_becomes_the_largest_that_fits_and_never_wraps_around(dtype: str) -> None:
    low, high = quantise([-1e300, 1e300], TensorSpec(name="x", dtype=dtype, shape=(2,)))
    limits = np.iinfo(low.dtype)
    assert limits.min == low
    assert 0 <= int(limits.max) - int(high) < 2**12  # the last float below it


def test_what_a_float_tensor_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="outside of FP32"):
        quantise([1e300], TensorSpec(name="x", dtype="FP32", shape=(1,)))


def test_scores_are_dequantised_probabilities() -> None:
    tensor = np.array([[-128, -64, 0, -64]], np.int8)
    assert probabilities(tensor, SCORES).tolist() == [[0.0, 0.25, 0.5, 0.25]]


@given(scores_of_four)
def test_temperature_one_changes_nothing(scores: np.ndarray) -> None:
    assert at_temperature(scores, 1.0, 1e-9) == pytest.approx(scores)


@given(scores_of_four, st.floats(0.1, 10))
def test_no_temperature_changes_the_class_and_the_scores_stay_probabilities(
    scores: np.ndarray, temperature: float
) -> None:
    calibrated = at_temperature(scores, temperature, 1e-9)
    assert calibrated[scores.argmax()] == calibrated.max()
    assert calibrated.sum() == pytest.approx(1)


def test_a_quantised_zero_stands_for_half_a_step() -> None:
    calibrated = probabilities(np.array([-128, 127], np.int8), SCORES, Calibrator(temperature=1.0, samples=9))
    assert score_floor(SCORES) == 1 / 512
    assert calibrated == pytest.approx([0.5 / 255.5, 255 / 255.5])


def test_a_high_temperature_takes_confidence_away() -> None:
    scores = np.array([0.9, 0.1, 0.0, 0.0], np.float32)
    _, confidence = top_class(probabilities(scores, FLOATS, Calibrator(temperature=2.0, samples=9)))
    assert 0.5 < confidence < 0.9


@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.5])
def test_the_fit_finds_the_temperature_that_made_the_answers(true_temperature: float) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (20_000, 4))
    honest = at_temperature(np.exp(logits), 1.0, 0.0)
    truth = (random.random((len(logits), 1)) > honest.cumsum(axis=1)).sum(axis=1).clip(0, 3)
    claimed = at_temperature(honest, 1 / true_temperature, 0.0)  # sharper, or flatter, than it should be
    assert fit_temperature(claimed, truth, 1e-12) == pytest.approx(true_temperature, rel=0.06)


def test_the_calibrator_says_how_many_samples_it_was_fitted_on() -> None:
    tensors = np.array([[127, -128, -128, -128], [-128, 127, -128, -128], [127, -128, -128, -128]], np.int8)
    overconfident = fit_calibrator(tensors, np.array([0, 1, 2]), SCORES)
    assert (overconfident.samples, overconfident.temperature > 1) == (3, True)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.7, 0.2], (1, 0.7)),
        ([0.5, 0.5], (0, 0.5)),
        ([[0.2, 0.8]], (1, 0.8)),
        ([0.0, 1.004], (1, 1.0)),
        ([-0.1, -0.2], (0, 0.0)),
    ],
)
def test_top_class_is_the_first_highest_score_kept_inside_its_range(
    scores: list[float], expected: tuple[int, float]
) -> None:
    assert top_class(np.array(scores)) == expected


@pytest.mark.parametrize(("confidence", "expected"), [(0.0, 0), (0.049, 0), (0.05, 1), (0.999, 19), (1.0, 19)])
def test_confidence_bins_are_a_twentieth_wide(confidence: float, expected: int) -> None:
    assert confidence_bin(confidence) == expected
