"""What came in of each model version since the start, merged over all devices. Pure: counts in, counts out.

Keeps sums only, so it costs the same however many devices there are, and nobody has to read old reports again.
At most `MAX_COHORTS` versions have sums of their own; one more takes the place of the version that was silent for
longest, or, when none was silent for an hour, is counted under `OTHER`. So no sum is ever moved, and none goes down.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fleet_server.core.series import MINUTE
from protocol.metrics import Proportion, proportion
from protocol.statistics import BUCKETS_PER_OCTAVE, Histogram, ModelStatistics, TruthStatistics

MAX_COHORTS = 50  # versions with figures of their own
SILENT = 60 * MINUTE  # ms after which a version may lose its place
JUDGED_OVER = 60 * MINUTE  # ms; accuracy is of the predictions of the last hour
SHORTEST_OCTAVE, LONGEST_OCTAVE = 6, 24  # latencies are told apart from 64 µs to 16.8 s, by powers of two

Version = tuple[str, int]  # model, version; variants of a version count as one
OTHER: Version | None = None


@dataclass(frozen=True, kw_only=True)
class CohortFacts:
    """One version, merged over devices and its variants."""

    version: Version | None
    requests: int
    errors: int
    dropped: int
    octaves: tuple[int, ...]  # answers up to 2^SHORTEST_OCTAVE µs, up to the next power …, and longer ones
    latency_sum_us: int
    right: int
    judged: int
    accuracy: Proportion | None  # of the last hour; None without truth


@dataclass(kw_only=True)
class _Sums:
    active: int
    requests: int = 0
    errors: int = 0
    dropped: int = 0
    octaves: list[int] = field(default_factory=lambda: [0] * (LONGEST_OCTAVE - SHORTEST_OCTAVE + 2))
    latency_sum_us: int = 0
    right: int = 0
    judged: int = 0
    minutes: dict[int, tuple[int, int]] = field(default_factory=dict)  # right, judged

    def add_window(self, model: ModelStatistics) -> None:
        self.requests += model.requests
        self.errors += model.errors
        self.dropped += model.dropped
        self.latency_sum_us += model.latency.sum
        for place, n in _by_octave(model.latency):
            self.octaves[place] += n

    def add_minute(self, minute: int, right: int, judged: int) -> None:
        before = self.minutes.get(minute, (0, 0))
        self.minutes[minute] = (before[0] + right, before[1] + judged)

    def facts(self, version: Version | None, now: int) -> CohortFacts:
        self.minutes = {minute: n for minute, n in self.minutes.items() if abs(now - minute) <= JUDGED_OVER}
        right, judged = (sum(n[k] for n in self.minutes.values()) for k in (0, 1))
        return CohortFacts(
            version=version,
            requests=self.requests,
            errors=self.errors,
            dropped=self.dropped,
            octaves=tuple(self.octaves),
            latency_sum_us=self.latency_sum_us,
            right=self.right,
            judged=self.judged,
            accuracy=proportion(right, judged) if judged else None,
        )


@dataclass(kw_only=True)
class Cohorts:
    """The sums. Not for several threads at once; times are the server's UTC ms."""

    most: int = MAX_COHORTS
    _sums: dict[Version | None, _Sums] = field(init=False, default_factory=dict)

    def count_window(self, version: Version | None, model: ModelStatistics, now: int) -> None:
        """Add what a version did in one window on one device."""
        self._sums_of(version, now).add_window(model)

    def count_truth(self, version: Version | None, truth: TruthStatistics, now: int) -> None:
        """Add truth that arrived; what is of another hour counts for the sums, not for the accuracy of this one."""
        right = sum(n for true, predicted, n in truth.confusion if true == predicted)
        judged = sum(n for _, _, n in truth.confusion)
        sums = self._sums_of(version, now)
        sums.right += right
        sums.judged += judged
        if abs(now - truth.minute) <= JUDGED_OVER:
            sums.add_minute(truth.minute - truth.minute % MINUTE, right, judged)

    def recall(self, version: Version | None, minute: int, right: int, judged: int, now: int) -> None:
        """Take truth that was counted before the start: it is part of the last hour, not of the sums."""
        self._sums_of(version, now).add_minute(minute, right, judged)

    def facts(self, now: int) -> tuple[CohortFacts, ...]:
        """Return every version's figures, in the order of names, others last."""
        named = sorted(version for version in self._sums if version is not None)
        present = [*named, *([OTHER] if OTHER in self._sums else [])]
        return tuple(self._sums[version].facts(version, now) for version in present)

    def _sums_of(self, version: Version | None, now: int) -> _Sums:
        if version not in self._sums and not self._has_room(now):
            version = OTHER
        sums = self._sums.setdefault(version, _Sums(active=now))
        sums.active = now
        return sums

    def _has_room(self, now: int) -> bool:
        named = [version for version in self._sums if version is not OTHER]
        if len(named) < self.most:
            return True
        longest = min(named, key=lambda version: self._sums[version].active)
        if now - self._sums[longest].active < SILENT:
            return False
        del self._sums[longest]
        return True


def bounds_us() -> tuple[int, ...]:
    """Return the upper bounds of all `CohortFacts.octaves` but the last, in µs."""
    return tuple(2**octave for octave in range(SHORTEST_OCTAVE, LONGEST_OCTAVE + 1))


def _by_octave(latency: Histogram) -> Iterable[tuple[int, int]]:
    """Return (place, count): every power of two is a bound of the finer buckets too, so nothing is estimated."""
    last = LONGEST_OCTAVE - SHORTEST_OCTAVE + 1
    yield 0, latency.zero
    for index, n in latency.buckets().items():
        octave = index // BUCKETS_PER_OCTAVE + 1  # the bucket ends at or below 2^octave
        yield min(last, max(0, octave - SHORTEST_OCTAVE)), n
