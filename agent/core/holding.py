"""When a device may be disturbed by an update: the application's hold, and maintenance hours in local time. Pure.

Downloading disturbs nobody and is not held; the trial, the shadow and the swap are. A forced assignment is bound by
neither. Hours are read on the device's own clock in its own time zone: they concern the people around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta, tzinfo

_MINUTE_MS = 60_000
MAX_HOLD_MS = 24 * 3_600_000  # an application that died must not hold an update for ever


@dataclass(frozen=True, kw_only=True)
class Hours:
    """A daily span of local time; one that ends before it begins goes past midnight."""

    start: time
    end: time

    def __str__(self) -> str:
        """Return it as it is written in the settings."""
        return f"{self.start:%H:%M}-{self.end:%H:%M}"


@dataclass(frozen=True, kw_only=True)
class Wait:
    """An update has to wait. ``until``: UTC ms; look again then."""

    until: int
    why: str


def parse_hours(text: str) -> Hours:
    """Read ``02:00-05:30``; raise ValueError."""
    start, separator, end = text.partition("-")
    if not separator:
        raise ValueError(f"{text!r} is not a span of hours like 02:00-05:30")
    hours = Hours(start=_parse_time(start), end=_parse_time(end))
    if hours.start == hours.end:
        raise ValueError(f"{text!r} begins when it ends")
    return hours


def must_wait(now: int, *, hold: int, hours: Sequence[Hours], zone: tzinfo, forced: bool) -> Wait | None:
    """Return until when an update has to wait, or None when it may go on.

    ``now`` and ``hold`` (until when an application asked for peace) are UTC ms; no ``hours``: any time will do.
    """
    if forced:
        return None
    if now < hold <= now + MAX_HOLD_MS:
        return Wait(until=hold, why="an application holds updates")
    if hours and not any(_contains(span, _local(now, zone).time()) for span in hours):
        said = ", ".join(str(span) for span in hours)
        return Wait(until=_next_start(now, hours, zone), why=f"maintenance hours are {said}")
    return None


def _parse_time(text: str) -> time:
    try:
        hour, minute = text.strip().split(":")
        return time(int(hour), int(minute))
    except ValueError:
        raise ValueError(f"{text.strip()!r} is not a time of day like 02:00") from None


def _contains(span: Hours, moment: time) -> bool:
    if span.start < span.end:
        return span.start <= moment < span.end
    return moment >= span.start or moment < span.end


def _next_start(now: int, hours: Sequence[Hours], zone: tzinfo) -> int:
    """Return the next beginning of a span. Where a clock change skips it, the first minute after it counts."""
    here = _local(now, zone)
    days = (here.date() + timedelta(days=n) for n in range(3))
    starts = (datetime.combine(day, span.start, zone) for day in days for span in hours)
    later = (int(start.timestamp() * 1000) for start in starts)
    return min((start for start in later if start > now), default=now + _MINUTE_MS)


def _local(now: int, zone: tzinfo) -> datetime:
    return datetime.fromtimestamp(now / 1000, zone)
