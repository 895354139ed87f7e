import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.inference.prediction import Prediction, Predictor
from agent.inference.statistics import Counters, Timing
from agent.inference.truth import AlreadyJudged, TruthRing, UnknownPrediction
from protocol.manifest import Calibrator, TensorSpec
from protocol.statistics import merge_by_digest
from runtime.calibrator import probabilities, top_class
from runtime.interpreter import DTYPES

MINUTE = 60_000


def counters() -> Counters:
    return Counters(model="digits", version=1, digest="a" * 64, classes=3)


def timing(microseconds: int) -> Timing:
    return Timing(0, 0, microseconds * 1000, 0)


@pytest.mark.parametrize(
    ("confidence", "place"),
    [(0.0, 0), (0.049, 0), (0.05, 1), (0.5, 10), (0.999, 19), (1.0, 19), (1.000001, 19)],
)
def test_confidence_falls_into_the_wires_bins(confidence: float, place: int) -> None:
    one = counters()
    one.succeeded(timing(5), Prediction(2, confidence), 0)
    taken = one.take()
    assert taken is not None
    assert taken.confidence.index(1) == place
    assert taken.classes == (0, 0, 1)


def test_every_kind_of_end_is_counted_in_its_place() -> None:
    one = counters()
    one.succeeded(timing(0), None, 7)
    one.succeeded(timing(100), None, 8)
    one.failed(9)
    one.dropped()
    one.dropped(late=True)
    one.dropped(shed=True)
    taken, totals = one.take(), one.totals()
    assert taken is not None
    assert (taken.requests, taken.errors) == (3, 1)
    assert (taken.dropped, taken.late, taken.shed) == (3, 1, 1)
    assert (taken.latency.zero, taken.latency.count, taken.latency.sum, taken.latency.max) == (1, 2, 100, 100)
    assert (totals.success, totals.failure, totals.last_ms) == (2, 1, 9)
    assert (totals.rejected, totals.late, totals.shed) == (3, 1, 1)
    assert one.take() is None


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=5), max_size=5))
def test_differences_add_up_to_what_happened(spans: list[list[int]]) -> None:
    split, whole = counters(), counters()
    taken = []
    for span in spans:
        for microseconds in span:
            for one in (split, whole):
                one.succeeded(timing(microseconds), Prediction(1, 0.5), 0)
        taken.append(split.take())
    assert merge_by_digest(one for one in taken if one) == merge_by_digest(one for one in [whole.take()] if one)


# ---------------------------------------------------------------- prediction
@given(
    dtype=st.sampled_from(["INT8", "UINT8", "FP32"]),
    temperature=st.none() | st.floats(0.1, 5),
    seed=st.integers(0, 2**31),
)
def test_the_quick_prediction_is_the_calibrators(dtype: str, temperature: float | None, seed: int) -> None:
    quantised = dtype != "FP32"
    spec = TensorSpec(
        name="scores",
        dtype=dtype,
        shape=(1, 10),
        scale=1 / 256 if quantised else None,
        zero_point={"INT8": -128, "UINT8": 0}.get(dtype),
    )
    calibrator = Calibrator(temperature=temperature, samples=100) if temperature else None
    rng = np.random.default_rng(seed)
    tensor = (
        rng.integers(0, 256, 10).astype(np.uint8).view(DTYPES[dtype]) if quantised else rng.random(10, np.float32)
    )
    expected = top_class(probabilities(tensor, spec, calibrator))
    label, confidence = Predictor(spec, calibrator).predict(tensor.tobytes())
    assert label == expected[0]
    assert confidence == pytest.approx(expected[1], rel=1e-9)


# ---------------------------------------------------------------- truth
def remember(ring: TruthRing, request_id: str, at: int = 0, *, digest: str = "d1", predicted: int = 1) -> None:
    ring.remember("digits", request_id, digest=digest, now_ms=at, predicted=predicted)


def test_truth_is_counted_under_the_minute_and_bundle_of_its_prediction() -> None:
    ring = TruthRing()
    remember(ring, "a", at=MINUTE + 1)
    remember(ring, "b", at=2 * MINUTE - 1)
    remember(ring, "c", at=2 * MINUTE, digest="d2", predicted=3)
    for request_id in "abc":
        ring.judge("digits", request_id, 1)
    records, unknown = ring.take_delta()
    assert [(one.digest, one.minute, one.confusion) for one in records] == [
        ("d1", MINUTE, ((1, 1, 2),)),
        ("d2", 2 * MINUTE, ((1, 3, 1),)),
    ]
    assert unknown == 0
    assert ring.take_delta() == ((), 0)


def test_the_truth_of_a_prediction_counts_once() -> None:
    ring = TruthRing()
    remember(ring, "a")
    ring.judge("digits", "a", 1)
    with pytest.raises(AlreadyJudged):
        ring.judge("digits", "a", 2)
    records, _ = ring.take_delta()
    assert records[0].confusion == ((1, 1, 1),)


def test_an_id_that_comes_again_stands_for_the_newer_prediction() -> None:
    ring = TruthRing()
    remember(ring, "a", predicted=1)
    ring.judge("digits", "a", 0)
    remember(ring, "a", predicted=2)
    ring.judge("digits", "a", 0)
    records, _ = ring.take_delta()
    assert records[0].confusion == ((0, 1, 1), (0, 2, 1))


def test_memory_is_bounded_and_what_is_forgotten_is_unknown() -> None:
    ring = TruthRing(capacity=2)
    for request_id in "abc":
        remember(ring, request_id)
    with pytest.raises(UnknownPrediction):
        ring.judge("digits", "a", 1)
    ring.judge("digits", "b", 1)
    with pytest.raises(UnknownPrediction):
        ring.judge("faces", "b", 1)
    assert ring.take_delta()[1] == 2


def test_a_withdrawn_models_predictions_are_forgotten() -> None:
    ring = TruthRing()
    remember(ring, "a")
    ring.forget("digits")
    ring.forget("never")
    with pytest.raises(UnknownPrediction):
        ring.judge("digits", "a", 1)
