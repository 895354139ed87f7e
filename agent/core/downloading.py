"""What a download decides: from where, how much today, how fast, what an answer means, and what is worth telling.

Pure: facts in, decisions out; time is passed in (UTC ms for the day, any seconds for the pace). Fetching, and what is
kept on disk, is ``agent/adapters/download.py``'s.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import msgspec

from protocol.release import NO_BASE, Delta

DAY_MS = 24 * 3600 * 1000
RESERVE = 16 * 1024 * 1024  # bytes of disk that a download leaves free for the agent's own records
MIN_BANDWIDTH = 1024  # bytes per second; servers give up on clients that read slower
MIDNIGHT_SPREAD = 900.0  # seconds that waiting devices come apart by after midnight
BURST_SECONDS = 1.0  # how much of the bandwidth may come at once
TELL_MS = 10_000  # progress is told at most so often
QUARTERS = 4
REBUILD_FACTOR = 5  # of the bundle's length: base and its container, the delta, the new one, what a decoder takes
MEMORY_SHARE = 0.25  # of the machine that rebuilding may take


# ---------------------------------------------------------------- answers
class Judgement(Enum):
    """What the status of an answer means for the bytes that were asked for."""

    WHOLE = "whole"  # all of it comes, also where a part was asked for
    PART = "part"  # what was asked for comes
    ABSENT = "absent"  # this source will never have it
    RESTART = "restart"  # what is here does not fit to what is there
    BUSY = "busy"  # later, and Retry-After may say when
    TROUBLE = "trouble"  # this source cannot answer now


_JUDGEMENTS = {
    200: Judgement.WHOLE,
    206: Judgement.PART,
    404: Judgement.ABSENT,
    410: Judgement.ABSENT,
    416: Judgement.RESTART,
    429: Judgement.BUSY,
    503: Judgement.BUSY,
}


def judge(status: int) -> Judgement:
    """Return what a status means. Redirects are trouble: a device talks to whom it was told to."""
    return _JUDGEMENTS.get(status, Judgement.TROUBLE)


# ---------------------------------------------------------------- the day's budget
class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that downloads took on one UTC day."""

    day: int = 0  # days since 1970
    spent: int = 0


def today(ledger: Ledger, now: int) -> Ledger:
    """Return the ledger of the day that ``now`` (UTC ms) is in; another day begins at nothing."""
    day = now // DAY_MS
    return ledger if ledger.day == day else Ledger(day=day)


def book(ledger: Ledger, count: int, now: int) -> Ledger:
    """Add bytes to today's; a negative count gives back what was booked ahead and did not come."""
    current = today(ledger, now)
    return Ledger(day=current.day, spent=max(0, current.spent + count))


def left_today(ledger: Ledger, budget: int, now: int, *, forced: bool = False) -> int | None:
    """Return how many bytes may still come today, or None for no limit. A forced download has none."""
    if forced or not budget:
        return None
    return max(0, budget - today(ledger, now).spent)


def seconds_to_next_day(now: int, chance: float) -> float:
    """Return how long until the next UTC day, and a bit more by chance (in [0, 1)): a fleet waits for it too."""
    return (DAY_MS - now % DAY_MS) / 1000 + MIDNIGHT_SPREAD * chance


# ---------------------------------------------------------------- pace
@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A token bucket: ``rate`` bytes per second flow in, as many as come in `BURST_SECONDS` fit."""

    rate: int
    level: float  # bytes that may come at once; below zero: so many came too early
    at: float  # seconds, when the level was true


def full_bucket(rate: int, at: float) -> Bucket:
    """Return a bucket that allows one burst."""
    return Bucket(rate=rate, level=rate * BURST_SECONDS, at=at)


def take(bucket: Bucket, count: int, at: float) -> tuple[Bucket, float]:
    """Take so many bytes out; return the bucket and the seconds to wait before more may come."""
    flowed = max(0.0, at - bucket.at) * bucket.rate
    level = min(bucket.rate * BURST_SECONDS, bucket.level + flowed) - count
    return replace(bucket, level=level, at=max(at, bucket.at)), max(0.0, -level / bucket.rate)


# ---------------------------------------------------------------- sources
@dataclass(frozen=True, kw_only=True)
class Offer:
    """A delta that this device could use."""

    base: str  # digest, or NO_BASE
    delta: Delta


def sources(mirrors: Sequence[str], distrusted: Collection[str]) -> tuple[str | None, ...]:
    """Return where to ask for a whole bundle, in order; None is the server itself, and always the last.

    A mirror that once sent wrong bytes is asked no more by this process.
    """
    return (*(mirror for mirror in mirrors if mirror not in distrusted), None)


def choose_delta(
    deltas: Mapping[str, Delta],
    *,
    length: int,
    held: int,
    methods: Collection[str],
    has: Callable[[str], bool],
    memory: int,
) -> Offer | None:
    """Return the delta that saves most, or None where the bundle itself takes no more bytes.

    ``held``: bytes of the bundle that are here already; ``has`` tells whether a base is in the store; ``memory`` is
    the machine's, in bytes: a rebuild that would take too much of it is not tried.
    """
    if length * REBUILD_FACTOR > memory * MEMORY_SHARE:
        return None
    usable = [
        Offer(base=base, delta=delta)
        for base, delta in sorted(deltas.items())
        if delta.method in methods and 0 < delta.length < length - held and (base == NO_BASE or has(base))
    ]
    return min(usable, key=lambda offer: offer.delta.length, default=None)


def space_needed(length: int, held: int, delta: Delta | None = None) -> int:
    """Return the bytes of free disk before a download starts: what comes, the bundle extracted, and a reserve."""
    return (delta.length if delta else 0) + (length - held) + length + RESERVE


# ---------------------------------------------------------------- telling
@dataclass(frozen=True, kw_only=True)
class Told:
    """How far a download was when it was last told, in quarters, and when (UTC ms)."""

    quarter: int
    at: int


def worth_telling(told: Told, done: int, length: int, now: int) -> Told | None:
    """Return what to tell now, or None. A quarter that was passed too soon after the last is left out."""
    quarter = QUARTERS * done // max(1, length)
    if quarter <= told.quarter or now - told.at < TELL_MS:
        return None
    return Told(quarter=quarter, at=now)
