"""Joins truth that arrives late with the prediction it is about.

Remembers, per model, the last predictions by request id: which bundle answered, in which UTC minute, which class. The
memory is bounded, so very late truth finds nothing; it is counted and refused. Each prediction's truth counts once.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from protocol.statistics import ConfusionCell, TruthStatistics, merge_truth

CAPACITY = 8192  # predictions remembered per model: over two minutes at 60 a second
MINUTE_MS = 60_000


class UnknownPrediction(Exception):
    """No prediction with this id is remembered."""


class AlreadyJudged(Exception):
    """The truth of this prediction has been counted."""


@dataclass(slots=True)
class _Remembered:
    digest: str
    minute: int
    predicted: int
    judged: bool = False


class TruthRing:
    """The predictions whose truth may still come, and the truth that came. Safe to use from several threads."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        """Remember up to ``capacity`` predictions of each model."""
        self._capacity = capacity
        self._lock = threading.Lock()
        self._predictions: dict[str, OrderedDict[str, _Remembered]] = {}
        self._confusion: dict[tuple[str, int, int, int], int] = {}
        self._unknown = 0

    def remember(self, model: str, request_id: str, *, digest: str, now_ms: int, predicted: int) -> None:
        """Keep a prediction; an id that comes again stands for the newer one."""
        entry = _Remembered(digest, now_ms - now_ms % MINUTE_MS, predicted)
        with self._lock:
            ring = self._predictions.get(model)
            if ring is None:
                ring = self._predictions[model] = OrderedDict()
            ring.pop(request_id, None)
            ring[request_id] = entry
            if len(ring) > self._capacity:
                ring.popitem(last=False)

    def judge(self, model: str, request_id: str, truth: int) -> None:
        """Count the true class of a prediction; raise `UnknownPrediction` or `AlreadyJudged`."""
        with self._lock:
            ring = self._predictions.get(model)
            entry = ring.get(request_id) if ring else None
            if entry is None:
                self._unknown += 1
                raise UnknownPrediction(request_id)
            if entry.judged:
                raise AlreadyJudged(request_id)
            entry.judged = True
            key = (entry.digest, entry.minute, truth, entry.predicted)
            self._confusion[key] = self._confusion.get(key, 0) + 1

    def forget(self, model: str) -> None:
        """Drop the predictions of a model that is not served any more."""
        with self._lock:
            self._predictions.pop(model, None)

    def take_delta(self) -> tuple[tuple[TruthStatistics, ...], int]:
        """Return the truth since the last call, and how much of it met no prediction."""
        with self._lock:
            confusion, self._confusion = self._confusion, {}
            unknown, self._unknown = self._unknown, 0
        return merge_truth(_record(*key, n) for key, n in confusion.items()), unknown


def _record(digest: str, minute: int, truth: int, predicted: int, n: int) -> TruthStatistics:
    cell: ConfusionCell = (truth, predicted, n)
    return TruthStatistics(digest=digest, minute=minute, confusion=(cell,))
