"""A model's interpreters and the line before them: who goes next, who is one too many, who cannot make it in time.

A request that finds an interpreter free takes it; the others stand in line, the more urgent before the less, equals
in the order they came. The line is bounded: where it is full, the last and least urgent has to go. A request with a
deadline is turned away as soon as it is clear that it would be late, never answered late without a word. What an
interpreter does is not known here.

An interpreter that comes free is handed to the first in line only if order matters: where priorities differ, where
somebody has a deadline, or where the first has been patient for long enough. Otherwise the first is only called, and
an equal that comes by before it has woken up may go first. Handing over costs a switch between threads each time,
which takes longer than a small model does.
"""

import math
import threading
import time
from bisect import bisect, insort
from collections.abc import Sequence
from typing import NamedTuple

from runtime.interpreter import LoadedModel

HIGHEST, LOWEST = 1, 10  # priorities; Triton's order: a lower number goes first
DEFAULT_PRIORITY = 5  # in the middle: there is room for what may wait and for what must not
QUEUE_LIMIT = 64  # requests waiting or running, per model
SHED_SECONDS = 30  # until asking again may help: distress does not pass within a second
OVERTAKINGS = 8  # of a request by equals that came later, at most
OVERTAKEN_NS = 5_000_000  # and none once it has waited this long
_SMOOTHING = 0.1  # weight of the newest service time in the moving average


class Urgency(NamedTuple):
    """How soon a request wants to be answered."""

    priority: int = DEFAULT_PRIORITY
    deadline: int | None = None  # ns of `time.perf_counter_ns`; None: no matter when


NORMAL = Urgency()


class Retired(Exception):
    """This generation takes no more requests; another may serve under the name."""


class NoneFree(Exception):
    """No interpreter came free in time."""


class TurnedAway(Exception):
    """A request is not worked on now. ``retry_after``: seconds until asking again may help."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        """Say why."""
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(TurnedAway):
    """Too many requests are waiting."""


class TooLate(TurnedAway):
    """The request's deadline has passed, or will have by the time it could be answered."""


class Shed(TurnedAway):
    """The device is in distress, and this request's priority is too low for it now."""


class _Waiter:
    """A request in line. Its gate opens when it got an interpreter, or a refusal, or should come and take one."""

    __slots__ = ("before", "gate", "model", "number", "refusal", "since", "urgency")

    def __init__(self, urgency: Urgency, number: int, before: int) -> None:
        """``before``: how many overtakings there were before it came."""
        self.urgency = urgency
        self.number = number
        self.before = before
        self.since = time.perf_counter_ns()
        self.model: LoadedModel | None = None
        self.refusal: TurnedAway | None = None
        self.gate = threading.Lock()
        self.gate.acquire()

    def __lt__(self, other: "_Waiter") -> bool:
        return (self.urgency.priority, self.number) < (other.urgency.priority, other.number)

    @property
    def is_settled(self) -> bool:
        return self.model is not None or self.refusal is not None

    # ------------------------------------------------------------ the pool's lock is held
    def call(self) -> None:
        """Open the gate. It may be open already: then the request has not woken up yet."""
        if self.gate.locked():
            self.gate.release()

    def call_off(self) -> None:
        """Close the gate again, unless the request has passed it: then it comes, finds nothing, and waits again."""
        self.gate.acquire(blocking=False)

    def refuse(self, refusal: TurnedAway) -> None:
        self.refusal = refusal
        self.call()


class Pool:
    """The interpreters of one generation. Safe to use from several threads."""

    def __init__(self, models: Sequence[LoadedModel], limit: int = QUEUE_LIMIT) -> None:
        """Take over loaded models; ``limit``: how many requests may wait or run."""
        self.size = len(models)
        self._free = list(models)
        self._limit = limit
        self._lock = threading.Lock()
        self._line: list[_Waiter] = []  # sorted
        self._number = 0
        self._overtakings = 0
        self._in_order = 0  # up to this number nobody is overtaken: somebody there has a deadline
        self._busy = 0
        self._width = self.size  # how many may work at once
        self._lowest = LOWEST  # priorities beyond are turned away
        self._retired = False
        self._broken: TurnedAway | None = None
        self._service_ns = 0.0  # moving average

    @property
    def waiting(self) -> int:
        """Return how many requests wait or run."""
        return self._busy + len(self._line)

    def lease(self, urgency: Urgency = NORMAL, patience: float = 30.0) -> LoadedModel:
        """Return an interpreter, to be given back; raise `Retired`, `TurnedAway`, or `NoneFree` in the end."""
        with self._lock:
            self._check_open(urgency)
            if self._may_go(urgency):
                return self._go_first()
            waiter = self._join(urgency)
        return self._await(waiter, patience)

    def give_back(self, model: LoadedModel, took_ns: int = 0) -> None:
        """Let the next one have it; ``took_ns``: how long a successful run held it."""
        with self._lock:
            self._free.append(model)
            self._busy -= 1
            if took_ns:
                self._service_ns += _SMOOTHING * (took_ns - self._service_ns)
            self._call_next()

    def retire(self) -> None:
        """Take no more requests; those in line are still served."""
        with self._lock:
            self._retired = True

    def fail(self, refusal: TurnedAway) -> None:
        """Turn everybody away, those in line too: an interpreter hangs and will not come back."""
        with self._lock:
            self._broken = refusal
            line, self._line = self._line, []
            for waiter in line:
                waiter.refuse(refusal)

    def restrict(self, *, width: int | None = None, lowest: int = LOWEST) -> None:
        """Let at most ``width`` interpreters work at once, and only requests up to priority ``lowest`` in."""
        with self._lock:
            self._width = max(1, min(self.size, width or self.size))
            self._lowest = lowest
            self._call_next()

    def empty(self) -> list[LoadedModel]:
        """Return the interpreters that nobody holds, and forget them."""
        with self._lock:
            free, self._free = self._free, []
        return free

    # ------------------------------------------------------------ coming; the lock is held
    def _check_open(self, urgency: Urgency) -> None:
        if self._broken:
            raise self._broken
        if self._retired:
            raise Retired
        if urgency.priority > self._lowest:
            said = f"the device is in distress; only priorities up to {self._lowest} are answered now"
            raise Shed(said, SHED_SECONDS)

    def _may_go(self, urgency: Urgency) -> bool:
        """Tell whether a newcomer gets an interpreter without standing in line."""
        if self._busy >= self._width:
            return False
        if not self._line:
            return True
        first = self._line[0]
        if urgency.priority != first.urgency.priority:
            return urgency.priority < first.urgency.priority
        return not self._is_strict(first)

    def _go_first(self) -> LoadedModel:
        if self._line:
            self._overtakings += 1
            if self._busy + 1 == self._width:
                self._line[0].call_off()
        return self._take()

    def _take(self) -> LoadedModel:
        self._busy += 1
        return self._free.pop()

    def _is_strict(self, first: _Waiter) -> bool:
        """Tell whether nobody may overtake the first in line."""
        return (
            first.urgency.priority != self._line[-1].urgency.priority
            or first.number <= self._in_order
            or self._overtakings - first.before >= OVERTAKINGS
            or time.perf_counter_ns() - first.since >= OVERTAKEN_NS
        )

    def _join(self, urgency: Urgency) -> _Waiter:
        self._number += 1
        waiter = _Waiter(urgency, self._number, self._overtakings)
        self._check_deadline(waiter)
        if self.waiting >= self._limit:
            self._make_room(urgency)
        insort(self._line, waiter)
        if urgency.deadline is not None:
            self._in_order = waiter.number
        return waiter

    def _check_deadline(self, waiter: _Waiter) -> None:
        deadline = waiter.urgency.deadline
        if deadline is None:
            return
        ahead = self._busy + bisect(self._line, waiter)
        expected = self._wait_ns(ahead)
        if time.perf_counter_ns() + expected >= deadline:
            said = f"{ahead} requests are ahead, about {expected / 1e3:.0f} us; that is past the deadline"
            raise TooLate(said, self._retry_after())

    def _make_room(self, urgency: Urgency) -> None:
        """Turn away the last in line for someone more urgent, or else the newcomer."""
        refusal = QueueFull(f"{self.waiting} requests are waiting already", self._retry_after())
        if not self._line or self._line[-1].urgency.priority <= urgency.priority:
            raise refusal
        self._line.pop().refuse(refusal)

    def _wait_ns(self, ahead: int) -> float:
        return ahead * self._service_ns / self._width

    def _retry_after(self) -> int:
        return max(1, math.ceil(self._wait_ns(self.waiting) / 1e9))

    def _call_next(self) -> None:
        while self._line and self._busy < self._width:
            first = self._line[0]
            if not self._is_strict(first):
                first.call()  # it calls the next when it comes, if there is another interpreter
                return
            del self._line[0]
            self._hand_over(first)

    def _hand_over(self, waiter: _Waiter) -> None:
        if is_past(waiter.urgency):
            waiter.refuse(self._passed())
            return
        waiter.model = self._take()
        waiter.call()

    def _passed(self) -> TooLate:
        return TooLate("the deadline passed while the request waited", self._retry_after())

    # ------------------------------------------------------------ waiting; the lock is not held
    def _await(self, waiter: _Waiter, patience: float) -> LoadedModel:
        deadline = waiter.urgency.deadline
        if deadline is not None:
            patience = min(patience, max(0.0, (deadline - time.perf_counter_ns()) / 1e9))
        until = time.monotonic() + patience
        while waiter.gate.acquire(timeout=max(0.0, until - time.monotonic())):
            if waiter.is_settled or self._come(waiter):
                break
        else:
            self._leave_line(waiter)
        if waiter.refusal:
            raise waiter.refusal
        if waiter.model is None:
            raise self._passed() if is_past(waiter.urgency) else NoneFree
        return waiter.model

    def _come(self, waiter: _Waiter) -> bool:
        """Take what the waiter was called for; False when another was quicker."""
        with self._lock:
            if not waiter.is_settled and self._busy < self._width:
                self._line.remove(waiter)
                waiter.model = self._take()
                self._call_next()
            return waiter.is_settled

    def _leave_line(self, waiter: _Waiter) -> None:
        with self._lock:
            if not waiter.is_settled:  # else it got its answer just now
                self._line.remove(waiter)
                self._call_next()  # it may have been called just now


def is_past(urgency: Urgency) -> bool:
    """Tell whether a deadline has passed."""
    return urgency.deadline is not None and time.perf_counter_ns() >= urgency.deadline
