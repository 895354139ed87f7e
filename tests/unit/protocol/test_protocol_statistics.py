import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.metrics import accuracy, class_metrics, macro_f1, proportion
from protocol.statistics import (
    MAX_INDEX,
    ConfusionCell,
    Histogram,
    ModelStatistics,
    TruthStatistics,
    add_counts,
    bucket_index,
    histogram_from,
    merge_by_digest,
    merge_confusion,
    merge_histograms,
    merge_models,
    merge_truth,
)

counts = st.integers(0, 10**9)
buckets = st.dictionaries(st.integers(-20, MAX_INDEX), counts, max_size=6)
histograms = st.builds(histogram_from, buckets, zero=counts, sum_=counts, max_=counts)
vectors = st.lists(counts, max_size=6).map(tuple)
models = st.builds(
    ModelStatistics,
    digest=st.just("d"),
    requests=counts,
    errors=counts,
    dropped=counts,
    late=counts,
    shed=counts,
    latency=histograms,
    confidence=vectors,
    classes=vectors,
)
cells = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 100))
truths = st.lists(
    st.builds(
        TruthStatistics,
        digest=st.sampled_from(["a", "b"]),
        minute=st.sampled_from([0, 60_000]),
        confusion=st.lists(cells, max_size=5).map(tuple),
    ),
    max_size=4,
).map(tuple)


# ---------------------------------------------------------------- merging is addition
@given(histograms, histograms, histograms)
def test_histograms_merge_in_any_order_and_keep_the_counts(a: Histogram, b: Histogram, c: Histogram) -> None:
    merged = merge_histograms(merge_histograms(a, b), c)
    assert merged == merge_histograms(a, merge_histograms(c, b))
    assert a.count + b.count + c.count == merged.count
    assert max(a.max, b.max, c.max) == merged.max


@given(histograms)
def test_an_empty_histogram_changes_nothing(a: Histogram) -> None:
    assert a == merge_histograms(a, Histogram())


@given(models, models, models)
def test_models_merge_in_any_order_and_keep_the_counts(
    a: ModelStatistics, b: ModelStatistics, c: ModelStatistics
) -> None:
    merged = merge_models(merge_models(a, b), c)
    assert merged == merge_models(a, merge_models(c, b))
    for field in ("requests", "errors", "dropped", "late", "shed"):
        assert sum(getattr(m, field) for m in (a, b, c)) == getattr(merged, field)
    assert sum(sum(m.classes) for m in (a, b, c)) == sum(merged.classes)
    assert sum(sum(m.confidence) for m in (a, b, c)) == sum(merged.confidence)


@given(truths, truths, truths)
def test_truth_merges_in_any_order_and_keeps_the_counts(
    a: tuple[TruthStatistics, ...], b: tuple[TruthStatistics, ...], c: tuple[TruthStatistics, ...]
) -> None:
    merged = merge_truth((*merge_truth((*a, *b)), *c))
    assert merged == merge_truth((*a, *merge_truth((*c, *b))))
    total = sum(n for t in (*a, *b, *c) for _, _, n in t.confusion)
    assert total == sum(n for t in merged for _, _, n in t.confusion)


def test_statistics_of_different_bundles_are_never_added() -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        merge_models(ModelStatistics(digest="a"), ModelStatistics(digest="b"))
    pair = merge_by_digest([ModelStatistics(digest=d, requests=1) for d in "bab"])
    assert [("a", 1), ("b", 2)] == [(m.digest, m.requests) for m in pair]


def test_vectors_of_different_length_are_padded() -> None:
    assert (5, 2, 0) == add_counts((1, 2, 0), (4,)) == add_counts((4,), (1, 2, 0))


def test_confusion_has_each_pair_once_and_no_zeros() -> None:
    assert ((0, 1, 5), (2, 0, 1)) == merge_confusion([(2, 0, 1), (0, 1, 2), (1, 1, 0), (0, 1, 3)])


# ---------------------------------------------------------------- the histogram
@given(st.integers(1, 2**39))
def test_a_value_lies_in_its_bucket(microseconds: int) -> None:
    index = bucket_index(microseconds)
    assert 2 ** (index / 8) * (1 - 1e-9) < microseconds <= 2 ** ((index + 1) / 8) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("microseconds", "index"), [(1, -1), (2, 7), (3, 12), (4, 15), (1024, 79), (2**60, MAX_INDEX)]
)
def test_bucket_bounds_are_those_of_the_standard(microseconds: int, index: int) -> None:
    assert index == bucket_index(microseconds)


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_is_at_most_4_4_percent_off(values: list[int], q: float) -> None:
    found: dict[int, int] = {}
    for value in values:
        found[bucket_index(value)] = found.get(bucket_index(value), 0) + 1
    histogram = histogram_from(found, zero=0, sum_=sum(values), max_=max(values))
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert histogram.quantile(q) == pytest.approx(exact, rel=0.0443)


def test_quantiles_of_little() -> None:
    assert Histogram().quantile(0.5) is None
    assert 0.0 == Histogram(zero=3, offset=10, counts=(1,), max=3).quantile(0.5)


def test_empty_ends_are_cut() -> None:
    assert Histogram(offset=5, counts=(1, 0, 2)) == histogram_from({3: 0, 5: 1, 7: 2, 9: 0}, zero=0, sum_=0, max_=0)


# ---------------------------------------------------------------- figures for people
WILSON = [
    # successes, n, low, high: Newcombe 1998, Statistics in Medicine 17:857, table I, method 3; and two extremes
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (29, 29, 0.8830, 1.0),
    (1, 1, 0.2065, 1.0),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), WILSON)
def test_intervals_are_wilsons(successes: int, n: int, low: float, high: float) -> None:
    found = proportion(successes, n)
    assert (low, high) == (pytest.approx(found.low, abs=5.1e-5), pytest.approx(found.high, abs=5.1e-5))


def test_no_support_is_not_zero() -> None:
    assert (None, None, None) == (proportion(0, 0).value, proportion(0, 0).low, proportion(0, 0).high)
    assert accuracy([]).value is None
    assert macro_f1([], 3) is None


# true 0: 5 right, 1 taken for 1 · true 1: 3 right, 2 taken for 0 · class 2 never came, but was said once for true 1
CONFUSION: list[ConfusionCell] = [(0, 0, 5), (0, 1, 1), (1, 1, 3), (1, 0, 2), (1, 2, 1)]


def test_metrics_are_those_computed_by_hand() -> None:
    assert (8, 12) == (accuracy(CONFUSION).successes, accuracy(CONFUSION).n)
    zero, one, two = class_metrics(CONFUSION, 3)
    assert (5 / 7, 5 / 6, 10 / 13, 6) == (zero.precision, zero.recall, zero.f1, zero.support)
    assert (3 / 4, 3 / 6, 6 / 10, 6) == (one.precision, one.recall, one.f1, one.support)
    assert (0.0, None, 0.0, 0) == (two.precision, two.recall, two.f1, two.support)
    assert pytest.approx((10 / 13 + 6 / 10) / 2) == macro_f1(CONFUSION, 3)


def test_a_class_that_the_model_does_not_have_counts_only_against_the_other() -> None:
    (only,) = class_metrics([(0, 0, 3), (0, 7, 1), (-1, 0, 2)], 1)
    assert (3 / 5, 3 / 4, 4) == (only.precision, only.recall, only.support)
