"""When a device asks for its next certificate, and when it asks the server whether it is still a member.

Pure: times and random numbers are passed in. Spans that a wrong clock must not bend are given in seconds of a clock
that only runs forward; only *is it due* is asked of the wall clock, which the caller never lets fall behind what
the fleet has signed. A clock that is ahead makes a renewal come early, and SPACING keeps it from coming again and
again: the server dates the certificate by its own clock.
"""

from dataclasses import dataclass
from enum import Enum
from math import inf

from agent.core.retry import BackOff, after_failure

DUE_AT = (2, 3)  # of the lease: a third is left for servers and networks that are away
SPREAD = 30  # a fleet enrolled in one day renews over a thirtieth of the lease: 12 days of a year
SPACING = 6 * 3600.0  # seconds between renewals, unless a person orders one
ASK_EVERY = 24 * 3600.0  # seconds; so a next CA is known to every device in about a day
ASK_WHEN_CUT_OFF = 600.0  # seconds between questions while the broker does not let us in
PATIENCE = 60.0  # seconds without the broker before that is a reason to ask
SHUT_OUT_REST = 900.0  # seconds until one that was refused asks again
RETRY = BackOff(first=60.0, ceiling=4 * 3600.0)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """From when until when a certificate counts (UTC ms). ``chance``: its own random number in [0, 1)."""

    start: int
    end: int
    chance: float = 0.0

    @property
    def due(self) -> int:
        """Return when it is to be renewed (UTC ms)."""
        life = self.end - self.start
        return self.start + life * DUE_AT[0] // DUE_AT[1] + int(life / SPREAD * self.chance)


class Step(Enum):
    """What is to be done now."""

    WAIT = "wait"
    ASK = "ask"  # the server: am I a member, and which CAs are in force?
    RENEW = "renew"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the decision is made from. Seconds, but for the lease."""

    lease: Lease
    wanted: bool = False  # a person ordered it, or the server has a CA that is not held here
    shut_out: bool = False  # the server refused this device when it was asked last
    since_answer: float = inf  # that the server gave, whatever it said
    since_renewal: float = inf
    cut_off: float = 0.0  # how long the broker has not let us in
    rested: float = inf  # since the last attempt
    rest: float = 0.0  # to be kept after it


def next_step(situation: Situation, now: int) -> Step:
    """Decide; ``now`` is UTC ms, never before what the fleet has signed."""
    if situation.rested < situation.rest:
        return Step.WAIT
    if situation.shut_out:
        return Step.ASK
    wanted = situation.wanted or now >= situation.lease.due
    if wanted and situation.since_renewal >= SPACING:
        return Step.RENEW
    spread = 1.0 + situation.lease.chance  # of questions; the broker's restart is every device's at once
    if situation.since_answer >= ASK_EVERY * (1.0 + situation.lease.chance / 10):
        return Step.ASK
    if situation.cut_off >= PATIENCE * spread and situation.since_answer >= ASK_WHEN_CUT_OFF * spread:
        return Step.ASK
    return Step.WAIT


def rest_after_failure(failures: int, chance: float, retry_after: float | None = None) -> float:
    """Return the seconds to rest after ``failures`` attempts in a row that came to nothing."""
    return after_failure(RETRY, failures, chance, retry_after)


def rest_after_refusal(chance: float) -> float:
    """Return the seconds to rest after the server refused this device."""
    return SHUT_OUT_REST * (1.0 + chance)
