"""Requests that nobody made: what a data plane would have counted of them. Seeded, so that a run can be repeated.

Knows how to draw requests, latencies, confidences and truth; which model serves, and what becomes of the counts, is
`simulator.device`'s business.
"""

import random
from collections import Counter
from dataclasses import dataclass

from agent.channel import StatisticsDelta
from protocol.statistics import (
    CONFIDENCE_BINS,
    ConfusionCell,
    ModelStatistics,
    TruthStatistics,
    bucket_index,
    histogram_from,
    merge_confusion,
)

_MINUTE = 60_000  # ms


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How good and how fast a model is."""

    accuracy: float = 0.95  # share of answers that are right
    confidence: float = 0.9  # mean confidence
    latency_us: int = 2000  # median
    latency_spread: float = 0.3  # standard deviation of its logarithm
    errors: float = 0.0  # share of requests that fail


@dataclass(frozen=True, kw_only=True)
class Load:
    """What clients ask for."""

    requests_per_second: float = 1.0
    classes: int = 10
    labelled: float = 0.1  # share of requests whose truth comes to be known


class Traffic:
    """Draws what happened to one model over a span of time."""

    def __init__(self, seed: int | str, load: Load) -> None:
        """``seed``: the same seed and the same questions give the same answers."""
        self._random = random.Random(seed)  # noqa: S311 - a simulation, not a secret
        self._load = load
        self._owed = 0.0  # the fraction of a request carried over

    def during(self, span: int, now: int, digest: str, behaviour: Behaviour) -> StatisticsDelta:
        """Return what the data plane counted in the ``span`` ms before ``now`` (UTC ms)."""
        self._owed += self._load.requests_per_second * max(0, span) / 1000
        requests, self._owed = int(self._owed), self._owed % 1
        if not requests:
            return StatisticsDelta()
        errors = sum(self._random.random() < behaviour.errors for _ in range(requests))
        answers = [self._answer(behaviour.accuracy) for _ in range(requests - errors)]
        model = self._statistics(digest, requests, errors, answers, behaviour)
        return StatisticsDelta(models=(model,), truth=self._truth(digest, now - now % _MINUTE, answers))

    def _answer(self, accuracy: float) -> ConfusionCell:
        true = self._random.randrange(self._load.classes)
        if self._load.classes == 1 or self._random.random() < accuracy:
            return true, true, 1
        return true, (true + self._random.randrange(1, self._load.classes)) % self._load.classes, 1

    def _statistics(
        self, digest: str, requests: int, errors: int, answers: list[ConfusionCell], behaviour: Behaviour
    ) -> ModelStatistics:
        latencies = [self._latency(behaviour) for _ in answers]
        said = Counter(predicted for _, predicted, _ in answers)
        confidences = Counter(self._confidence_bin(behaviour.confidence) for _ in answers)
        return ModelStatistics(
            digest=digest,
            requests=requests,
            errors=errors,
            latency=histogram_from(
                Counter(map(bucket_index, latencies)), zero=0, sum_=sum(latencies), max_=max(latencies, default=0)
            ),
            confidence=tuple(confidences[k] for k in range(CONFIDENCE_BINS)),
            classes=tuple(said[k] for k in range(self._load.classes)),
        )

    def _latency(self, behaviour: Behaviour) -> int:
        return max(1, round(behaviour.latency_us * self._random.lognormvariate(0.0, behaviour.latency_spread)))

    def _confidence_bin(self, mean: float) -> int:
        """Draw from a beta distribution of that mean, as softmax outputs look like."""
        mean = min(0.99, max(0.01, mean))
        return min(CONFIDENCE_BINS - 1, int(self._random.betavariate(8 * mean, 8 * (1 - mean)) * CONFIDENCE_BINS))

    def _truth(self, digest: str, minute: int, answers: list[ConfusionCell]) -> tuple[TruthStatistics, ...]:
        known = [answer for answer in answers if self._random.random() < self._load.labelled]
        return (TruthStatistics(digest=digest, minute=minute, confusion=merge_confusion(known)),) if known else ()
