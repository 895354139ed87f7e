"""Additive statistics: histogram, confusion, one model's share of a window. Add and merge, exactly.

All of it is counts, so merging is addition: associative, commutative, and lossless over windows, devices and
versions. What follows from the counts (accuracy, F1, quantiles with intervals) stands in ``metrics.py``.
The hot path's mutable counters live in ``agent/inference/statistics.py`` and end up in these shapes.

The latency histogram is OpenTelemetry's exponential histogram at fixed scale 3 (OTEP 149): bucket *i* holds
values in (2^(i/8), 2^((i+1)/8)] µs, so a value read back at the bucket's geometric middle is at most 4.4 % off.
The scale never changes within wire version 1, hence no downscaling is ever needed.
"""

import math
from collections.abc import Iterable, Mapping

import msgspec

SCALE = 3
BUCKETS_PER_OCTAVE: int = 2**SCALE
MAX_INDEX = 40 * BUCKETS_PER_OCTAVE  # 2^40 µs is twelve days; longer values are counted in the last bucket
CONFIDENCE_BINS = 20

ConfusionCell = tuple[int, int, int]  # true class, predicted class, count


class Histogram(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exponential histogram of durations in µs. ``counts[k]`` belongs to bucket ``offset + k``."""

    zero: int = msgspec.field(default=0, name="z")  # values of 0 µs
    offset: int = msgspec.field(default=0, name="o")
    counts: tuple[int, ...] = msgspec.field(default=(), name="c")
    sum: int = msgspec.field(default=0, name="s")  # µs
    max: int = msgspec.field(default=0, name="m")  # µs

    @property
    def count(self) -> int:
        """How many values were recorded."""
        return self.zero + sum(self.counts)

    def buckets(self) -> dict[int, int]:
        """Return {bucket index: count} for the non-empty buckets."""
        return {self.offset + k: n for k, n in enumerate(self.counts) if n}

    def quantile(self, q: float) -> float | None:
        """Return the q-quantile in µs (the bucket's geometric middle, ≤ 4.4 % off), or None when empty."""
        total = self.count
        if not total:
            return None
        rank = max(1, math.ceil(q * total))
        seen = self.zero
        if rank <= seen:
            return 0.0
        for index, n in sorted(self.buckets().items()):
            seen += n
            if rank <= seen:
                return float(min(2 ** ((index + 0.5) / BUCKETS_PER_OCTAVE), self.max or math.inf))
        return float(self.max)


class ModelStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one model version did on one device over one span. All fields add, except ``latency.max``."""

    digest: str = msgspec.field(name="d")  # short digest of the bundle
    requests: int = msgspec.field(default=0, name="n")  # answered, errors included
    errors: int = msgspec.field(default=0, name="e")
    dropped: int = msgspec.field(default=0, name="x")  # turned away, whatever for: queue full, deadline, distress
    late: int = msgspec.field(default=0, name="xl")  # of the dropped: would have missed, or did miss, their deadline
    shed: int = msgspec.field(default=0, name="xs")  # of the dropped: not urgent enough for a device in distress
    latency: Histogram = msgspec.field(default_factory=Histogram, name="l")  # of successful requests
    confidence: tuple[int, ...] = msgspec.field(default=(), name="f")  # CONFIDENCE_BINS bins on [0, 1]
    classes: tuple[int, ...] = msgspec.field(default=(), name="c")  # predictions per class


class TruthStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Truth that arrived for predictions of one model made within one UTC minute."""

    digest: str = msgspec.field(name="d")
    minute: int = msgspec.field(name="t")  # UTC ms of the minute's start, of the *prediction*
    confusion: tuple[ConfusionCell, ...] = msgspec.field(default=(), name="c")


def bucket_index(microseconds: int) -> int:
    """Return the histogram bucket of a positive duration in µs.

    Bounds are (lower, upper]; see the module docstring for the source.
    """
    index = math.ceil(math.log2(microseconds) * BUCKETS_PER_OCTAVE - 1e-9) - 1
    return min(MAX_INDEX, index)


def histogram_from(buckets: Mapping[int, int], *, zero: int, sum_: int, max_: int) -> Histogram:
    """Build the dense form from {bucket index: count}; empty ends are cut."""
    used = [index for index, n in buckets.items() if n]
    if not used:
        return Histogram(zero=zero, sum=sum_, max=max_)
    low, high = min(used), max(used)
    counts = tuple(buckets.get(index, 0) for index in range(low, high + 1))
    return Histogram(zero=zero, offset=low, counts=counts, sum=sum_, max=max_)


def merge_histograms(first: Histogram, second: Histogram) -> Histogram:
    """Add two histograms."""
    total = first.buckets()
    for index, n in second.buckets().items():
        total[index] = total.get(index, 0) + n
    return histogram_from(
        total,
        zero=first.zero + second.zero,
        sum_=first.sum + second.sum,
        max_=max(first.max, second.max),
    )


def add_counts(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """Add two count vectors; the shorter one is padded with zeros, trailing zeros are kept."""
    if len(first) < len(second):
        first, second = second, first
    return tuple(n + (second[k] if k < len(second) else 0) for k, n in enumerate(first))


def merge_confusion(cells: Iterable[ConfusionCell]) -> tuple[ConfusionCell, ...]:
    """Add sparse confusion cells; the result is sorted and has each (true, predicted) once."""
    total: dict[tuple[int, int], int] = {}
    for true, predicted, n in cells:
        total[true, predicted] = total.get((true, predicted), 0) + n
    return tuple((true, predicted, n) for (true, predicted), n in sorted(total.items()) if n)


def merge_models(first: ModelStatistics, second: ModelStatistics) -> ModelStatistics:
    """Add the statistics of the same model version; raise ValueError when the digests differ."""
    if first.digest != second.digest:
        raise ValueError(f"statistics of {first.digest} and {second.digest} cannot be added")
    return ModelStatistics(
        digest=first.digest,
        requests=first.requests + second.requests,
        errors=first.errors + second.errors,
        dropped=first.dropped + second.dropped,
        late=first.late + second.late,
        shed=first.shed + second.shed,
        latency=merge_histograms(first.latency, second.latency),
        confidence=add_counts(first.confidence, second.confidence),
        classes=add_counts(first.classes, second.classes),
    )


def merge_by_digest(items: Iterable[ModelStatistics]) -> tuple[ModelStatistics, ...]:
    """Add statistics model version by model version; sorted by digest."""
    total: dict[str, ModelStatistics] = {}
    for item in items:
        total[item.digest] = merge_models(total[item.digest], item) if item.digest in total else item
    return tuple(total[digest] for digest in sorted(total))


def merge_truth(items: Iterable[TruthStatistics]) -> tuple[TruthStatistics, ...]:
    """Add truth records per (digest, minute); sorted."""
    total: dict[tuple[str, int], list[ConfusionCell]] = {}
    for item in items:
        total.setdefault((item.digest, item.minute), []).extend(item.confusion)
    return tuple(
        TruthStatistics(digest=digest, minute=minute, confusion=merge_confusion(cells))
        for (digest, minute), cells in sorted(total.items())
    )
