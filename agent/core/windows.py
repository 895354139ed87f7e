"""Adds up what the data plane sends and closes windows on UTC multiples of their length. Pure: ``now`` is passed in.

The first and the last window are as long as they really were. A clock that jumps closes the window where the jump
was seen, so that a span is never negative and never covers time that did not pass. What becomes of a closed window
is the reporter's business.
"""

from collections.abc import Iterable

from protocol.messages import Window
from protocol.statistics import ModelStatistics, TruthStatistics, merge_by_digest, merge_truth

DEFAULT_LENGTH = 60_000  # ms
SHORTEST = 1_000  # ms; control adds up once a second
LONGEST = 3_600_000  # ms; a UTC hour


class Windows:
    """The window that is open, and the truth that has come in since it was opened."""

    def __init__(self, now: int, length: int = DEFAULT_LENGTH) -> None:
        """``now``: UTC ms; ``length``: ms."""
        self._start = now
        self._seen = now  # newest time this was told
        self._length = _bounded(length)
        self._models: tuple[ModelStatistics, ...] = ()
        self._truth: tuple[TruthStatistics, ...] = ()

    @property
    def length(self) -> int:
        """The length of a whole window in ms."""
        return self._length

    def set_length(self, length: int) -> None:
        """Close windows on other multiples from now on; the open one ends at the next of them."""
        self._length = _bounded(length)

    def add(self, models: Iterable[ModelStatistics], truth: Iterable[TruthStatistics] = ()) -> None:
        """Add what happened since the last time."""
        self._models = merge_by_digest((*self._models, *models))
        self._truth = merge_truth((*self._truth, *truth))

    def close(self, now: int) -> Window | None:
        """Return the window that is due, or None. Call often: at least once per window."""
        if self._jumped(now):
            return self._end(self._seen, reopen=now, now=now)
        self._seen = max(now, self._seen)
        end = now - now % self._length
        if end <= self._start:
            return None
        return self._end(end, reopen=end, now=now)

    def flush(self, now: int) -> Window | None:
        """Return what is left as a last, shorter window; None when no time has passed and nothing was counted."""
        return self._end(self._seen if self._jumped(now) else max(now, self._seen), reopen=now, now=now)

    def take_truth(self) -> tuple[TruthStatistics, ...]:
        """Return the truth that came in since the last call; it belongs to earlier minutes, not to the window."""
        truth, self._truth = self._truth, ()
        return truth

    def _jumped(self, now: int) -> bool:
        return now < self._start or abs(now - self._seen) > 2 * self._length

    def _end(self, end: int, *, reopen: int, now: int) -> Window | None:
        start, models = self._start, self._models
        self._start, self._seen, self._models = reopen, now, ()
        if end <= start and not models:
            return None
        return Window(start=start, span=max(1, end - start), models=models)


def _bounded(length: int) -> int:
    return min(LONGEST, max(SHORTEST, length))
