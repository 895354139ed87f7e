"""What the data plane counts on its hot path: mutable counters that end up in the shapes of ``protocol.statistics``.

One `Counters` per bundle digest, so that a swap splits the numbers exactly. Each holds the *difference* since it was
last taken (control adds these up and closes windows), and totals for this process's own ``/metrics``. It stops there:
truth is joined in `truth`, windows are cut by control.
"""

import threading
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from agent.inference.prediction import Prediction
from protocol.names import short_digest
from protocol.statistics import CONFIDENCE_BINS, ModelStatistics, bucket_index, histogram_from


class Timing(NamedTuple):
    """How long the steps of one request took, in ns. A tuple, for one is made for every request."""

    queue: int
    copy_in: int
    infer: int
    copy_out: int


@dataclass(kw_only=True, slots=True)
class Totals:
    """Since the process started. Durations in ns."""

    success: int = 0
    failure: int = 0
    rejected: int = 0
    late: int = 0  # of the rejected: those that missed their deadline
    shed: int = 0  # of the rejected: those a device in distress does not answer
    success_ns: int = 0
    failure_ns: int = 0
    queue_ns: int = 0
    copy_in_ns: int = 0
    infer_ns: int = 0
    copy_out_ns: int = 0
    last_ms: int = 0  # UTC, of the last request that ran


@dataclass(kw_only=True, slots=True)
class _Difference:
    requests: int = 0
    errors: int = 0
    dropped: int = 0
    late: int = 0
    shed: int = 0
    zero: int = 0
    sum: int = 0
    max: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    confidence: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)


class Counters:
    """The numbers of one bundle. Safe to use from several threads."""

    def __init__(self, *, model: str, version: int, digest: str, classes: int) -> None:
        """Start at zero; ``classes`` is 0 for what is not a classifier."""
        self.model = model
        self.version = version
        self.short_digest = short_digest(digest)
        self._classes = classes
        self._lock = threading.Lock()
        self._difference = self._empty()
        self._totals = Totals()

    def succeeded(self, timing: Timing, prediction: Prediction | None, now_ms: int) -> None:
        """Count a request that was answered."""
        whole = sum(timing)
        with self._lock:
            difference, totals = self._difference, self._totals
            difference.requests += 1
            _record(difference, whole // 1000)
            if prediction is not None:
                _predict(difference, prediction)
            totals.success += 1
            totals.success_ns += whole
            totals.queue_ns += timing.queue
            totals.copy_in_ns += timing.copy_in
            totals.infer_ns += timing.infer
            totals.copy_out_ns += timing.copy_out
            totals.last_ms = now_ms

    def failed(self, now_ms: int, duration_ns: int = 0) -> None:
        """Count a request that reached the model and could not be answered."""
        with self._lock:
            self._difference.requests += 1
            self._difference.errors += 1
            self._totals.failure += 1
            self._totals.failure_ns += duration_ns
            self._totals.last_ms = now_ms

    def dropped(self, *, late: bool = False, shed: bool = False) -> None:
        """Count a request turned away; ``late``: for its deadline, ``shed``: for its priority, in distress."""
        with self._lock:
            for counts in (self._difference, self._totals):
                counts.late += late
                counts.shed += shed
            self._difference.dropped += 1
            self._totals.rejected += 1

    def take(self) -> ModelStatistics | None:
        """Return what happened since the last call, or None when nothing did."""
        with self._lock:
            taken, self._difference = self._difference, self._empty()
        if not taken.requests and not taken.dropped:
            return None
        return ModelStatistics(
            digest=self.short_digest,
            requests=taken.requests,
            errors=taken.errors,
            dropped=taken.dropped,
            late=taken.late,
            shed=taken.shed,
            latency=histogram_from(taken.buckets, zero=taken.zero, sum_=taken.sum, max_=taken.max),
            confidence=tuple(taken.confidence),
            classes=tuple(taken.classes),
        )

    def totals(self) -> Totals:
        """Return a copy of the totals."""
        with self._lock:
            return replace(self._totals)

    def _empty(self) -> _Difference:
        if not self._classes:
            return _Difference()
        return _Difference(confidence=[0] * CONFIDENCE_BINS, classes=[0] * self._classes)


class Statistics:
    """The counters of every bundle this process has served."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, Counters] = {}

    def counters(self, *, model: str, version: int, digest: str, classes: int) -> Counters:
        """Return the counters of a bundle; one that comes back goes on where it stopped."""
        with self._lock:
            known = self._counters.get(digest)
            if known is None:
                known = Counters(model=model, version=version, digest=digest, classes=classes)
                self._counters[digest] = known
            return known

    def all(self) -> tuple[Counters, ...]:
        """Return every bundle's counters, by model and version."""
        with self._lock:
            return tuple(sorted(self._counters.values(), key=lambda known: (known.model, known.version)))

    def take_delta(self) -> tuple[ModelStatistics, ...]:
        """Return what happened since the last call; what was taken is never given again."""
        return tuple(taken for counters in self.all() if (taken := counters.take()) is not None)


def _record(difference: _Difference, microseconds: int) -> None:
    if microseconds:
        index = bucket_index(microseconds)
        difference.buckets[index] = difference.buckets.get(index, 0) + 1
    else:
        difference.zero += 1
    difference.sum += microseconds
    difference.max = max(difference.max, microseconds)


def _predict(difference: _Difference, prediction: Prediction) -> None:
    if prediction.label < len(difference.classes):
        difference.classes[prediction.label] += 1
        place = int(prediction.confidence * CONFIDENCE_BINS)
        difference.confidence[min(max(place, 0), CONFIDENCE_BINS - 1)] += 1
