"""Eases a device in distress: from readings of heat, throttling, memory and power to how hard its models may work.

One of four levels at a time, changed one step at a time. A trigger that stays beyond its limit for ``step_seconds``
asks for the next level, up to the worst one it may lead to; when none asks for the present level any more for
``back_seconds``, it goes one back. A trigger holds from its limit until its leave limit, so that a reading between
the two changes nothing. Pure: readings and the time of a clock that never goes back are passed in. What a measure
does to a model is the data plane's business.

A reading that is missing is no reading: it never asks for a step, and where it was there before, the level waits for
it to come back, for at most ``LOST_SECONDS``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated

import msgspec

LOST_SECONDS = 600.0  # a sensor silent for longer is gone: a level that waited for it for ever would be no mercy


class Level(str, Enum):
    """How far a device is eased, from the mildest to the worst."""

    NORMAL = "normal"  # everything works as it is set
    EASED = "eased"  # what nobody would miss rests, half of the interpreters too
    STRAINED = "strained"  # and half of the threads
    DISTRESS = "distress"  # requests that may wait are turned away

    @property
    def rank(self) -> int:
        """Return 0 for the mildest, 3 for the worst."""
        return LEVELS.index(self)


LEVELS = tuple(Level)


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """What is done at a level. One interpreter and one thread are always left."""

    shadow: bool  # candidates are compared with live requests
    interpreters: int  # of each model, one in so many works
    threads: int  # of each interpreter, one in so many
    lowest: int  # priority that is still answered; 1 is the most urgent, 10 the least
    reload: bool = True  # what serves may be loaded again for its threads: for a moment that takes memory twice


# fmt: off
TABLE: Mapping[Level, Measures] = {
    Level.NORMAL:   Measures(shadow=True,  interpreters=1, threads=1, lowest=10),
    Level.EASED:    Measures(shadow=False, interpreters=2, threads=1, lowest=10),
    Level.STRAINED: Measures(shadow=False, interpreters=2, threads=2, lowest=10),
    Level.DISTRESS: Measures(shadow=False, interpreters=4, threads=4, lowest=5),  # 5: who says nothing is answered
}
# fmt: on


class Trigger(str, Enum):
    """What may ask for a step."""

    HEAT = "heat"
    THROTTLING = "throttling"
    FREQUENCY = "frequency"
    MEMORY = "memory"
    STALL = "stall"
    VOLTAGE = "voltage"
    BATTERY = "battery"


# fmt: off
WORST: Mapping[Trigger, Level] = {
    Trigger.HEAT:       Level.DISTRESS,
    Trigger.THROTTLING: Level.STRAINED,  # the machine eases itself already
    Trigger.FREQUENCY:  Level.STRAINED,
    Trigger.MEMORY:     Level.DISTRESS,
    Trigger.STALL:      Level.DISTRESS,
    Trigger.VOLTAGE:    Level.DISTRESS,
    Trigger.BATTERY:    Level.STRAINED,  # an empty battery lasts for hours, and easing does not fill it
}
# fmt: on
OF_MEMORY = (Trigger.MEMORY, Trigger.STALL)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the machine tells of its state at one moment. None: it cannot tell."""

    temperature: float | None = None  # °C, of the hottest CPU or SoC sensor
    throttled: bool | None = None  # the firmware or the kernel slows the CPU down
    frequency: float | None = None  # per cent of the CPU's highest frequency that are allowed
    memory: float | None = None  # per cent that are available
    stall: float | None = None  # per cent of the last 10 s in which some task waited for memory
    under_voltage: bool | None = None
    battery: float | None = None  # per cent
    discharging: bool | None = None


_Celsius = Annotated[float, msgspec.Meta(ge=0, le=150)]
_Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]


class GovernorPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[governor]``: the limits, and how long is waited. A limit of 0 is not looked at."""

    enabled: bool = True
    sensor: str = ""  # of the heat, by the name of its thermal zone or chip; empty: those known to be the CPU's
    temperature: _Celsius = 80.0
    temperature_leave: _Celsius = 75.0
    throttling: bool = True
    frequency: _Percent = 90.0  # of the highest that was allowed since the agent started
    frequency_leave: _Percent = 95.0
    memory: _Percent = 5.0
    memory_leave: _Percent = 8.0
    stall: _Percent = 20.0
    stall_leave: _Percent = 5.0
    battery: _Percent = 20.0
    battery_leave: _Percent = 30.0
    step_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 10
    back_seconds: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 60


class BadPolicy(ValueError):
    """Two settings of ``[governor]`` contradict each other; the message names them."""


def check_policy(policy: GovernorPolicy) -> None:
    """Raise `BadPolicy` where a level could never be left, or would be left sooner than it was entered."""
    for name, is_high in _LIMITED:
        limit, leave = getattr(policy, name), getattr(policy, f"{name}_leave")
        if limit and (leave >= limit if is_high else leave <= limit):
            side = "below" if is_high else "above"
            raise BadPolicy(f"governor.{name}_leave is {leave:g}; it must be {side} governor.{name}, {limit:g}")
    if policy.back_seconds < policy.step_seconds:
        raise BadPolicy(
            f"governor.back_seconds is {policy.back_seconds}; it must not be below governor.step_seconds, "
            f"{policy.step_seconds}"
        )


_LIMITED = (("temperature", True), ("frequency", False), ("memory", False), ("stall", True), ("battery", False))


# ---------------------------------------------------------------- one trigger
@dataclass(frozen=True, kw_only=True)
class _Sight:
    """What a trigger sees now."""

    beyond: bool  # the limit is reached
    clear: bool  # so is the leave limit
    said: str
    limit: str = ""


def _high(value: float | None, limit: float, leave: float, number: str, what: str = "") -> _Sight | None:
    """More is worse. ``number``: how it is written; ``what``: what follows it."""
    if value is None or not limit:
        return None
    said = number.format(value) + what
    return _Sight(beyond=value >= limit, clear=value <= leave, said=said, limit=number.format(limit))


def _low(value: float | None, limit: float, leave: float, number: str, what: str = "") -> _Sight | None:
    """Less is worse."""
    if value is None or not limit:
        return None
    said = number.format(value) + what
    return _Sight(beyond=value <= limit, clear=value >= leave, said=said, limit=number.format(limit))


def _flag(value: bool | None, *, said: tuple[str, str]) -> _Sight | None:
    return None if value is None else _Sight(beyond=value, clear=not value, said=said[value])


def _heat(now: Readings, policy: GovernorPolicy) -> _Sight | None:
    return _high(now.temperature, policy.temperature, policy.temperature_leave, "{:.1f} °C")


def _throttling(now: Readings, policy: GovernorPolicy) -> _Sight | None:
    return _flag(now.throttled, said=("none", "the CPU is slowed down")) if policy.throttling else None


def _frequency(now: Readings, policy: GovernorPolicy) -> _Sight | None:
    return _low(now.frequency, policy.frequency, policy.frequency_leave, "{:.0f} %", " allowed")


def _memory(now: Readings, policy: GovernorPolicy) -> _Sight | None:
    return _low(now.memory, policy.memory, policy.memory_leave, "{:.1f} %", " available")


def _stall(now: Readings, policy: GovernorPolicy) -> _Sight | None:
    return _high(now.stall, policy.stall, policy.stall_leave, "{:.1f} %", " of the time waiting for memory")


def _voltage(now: Readings, _: GovernorPolicy) -> _Sight | None:
    return _flag(now.under_voltage, said=("enough", "too low"))


def _battery(now: Readings, policy: GovernorPolicy) -> _Sight | None:
    if now.discharging is None:
        return None
    if now.discharging:
        return _low(now.battery, policy.battery, policy.battery_leave, "{:.0f} %", " and discharging")
    is_known = now.battery is not None and policy.battery
    return _Sight(beyond=False, clear=True, said=f"{now.battery:.0f} %") if is_known else None


_SIGHTS: Mapping[Trigger, Callable[[Readings, GovernorPolicy], _Sight | None]] = {
    Trigger.HEAT: _heat,
    Trigger.THROTTLING: _throttling,
    Trigger.FREQUENCY: _frequency,
    Trigger.MEMORY: _memory,
    Trigger.STALL: _stall,
    Trigger.VOLTAGE: _voltage,
    Trigger.BATTERY: _battery,
}


@dataclass(kw_only=True)
class _Watch:
    """One trigger over time, in seconds."""

    raised: bool = False  # from the limit until the leave limit
    beyond_since: float | None = None  # without a reading short of the limit in between
    seen: float | None = None  # the newest reading

    def take(self, sight: _Sight | None, now: float) -> None:
        if sight is None:
            if self.seen is not None and now - self.seen > LOST_SECONDS:
                self.raised, self.beyond_since, self.seen = False, None, None
            return
        self.seen = now
        self.raised = sight.beyond or (self.raised and not sight.clear)
        self.beyond_since = (self.beyond_since if self.beyond_since is not None else now) if sight.beyond else None


# ---------------------------------------------------------------- the governor
@dataclass(frozen=True, kw_only=True)
class Step:
    """From one level to the one beside it."""

    before: Level
    after: Level
    said: str  # a sentence for people: why, the numbers behind it, and what is done


class Governor:
    """The level of one device. Tell it the readings about once a second."""

    def __init__(self, policy: GovernorPolicy, *, interpreters: int = 1, threads: int | None = 1) -> None:
        """``interpreters``, ``threads``: as set, for the sentences; no ``threads``: each model has its own number."""
        self.level = Level.NORMAL
        self._policy = policy
        self._interpreters = interpreters
        self._threads = threads
        self._watches = {trigger: _Watch() for trigger in Trigger}
        self._highest = 0.0  # frequency: an operator's own cap is no distress
        self._stepped: float | None = None
        self._relieved: float | None = None  # since when no trigger asks for the present level

    @property
    def measures(self) -> Measures:
        """What is to be done now. May change without a step: nothing is loaded again while memory is short."""
        is_short = any(self._watches[trigger].raised for trigger in OF_MEMORY)
        return msgspec.structs.replace(TABLE[self.level], reload=not is_short)

    def take(self, readings: Readings, now: float) -> Step | None:
        """Take readings, return the step that follows. ``now``: seconds of a clock that never goes back."""
        sights = self._look(readings)
        for trigger, watch in self._watches.items():
            watch.take(sights.get(trigger), now)
        self._note_relief(now)
        if causes := [trigger for trigger in sights if self._asks(trigger, now)]:
            return self._move(1, now, self._why(causes, sights, now))
        if self._may_go_back(sights, now):
            return self._move(-1, now, self._why_not(sights, now))
        return None

    def _look(self, readings: Readings) -> dict[Trigger, _Sight]:
        if readings.frequency is not None:
            self._highest = max(self._highest, readings.frequency)
            share = 100.0 * readings.frequency / self._highest if self._highest > 0 else None
            readings = replace(readings, frequency=share)
        seen = {trigger: see(readings, self._policy) for trigger, see in _SIGHTS.items()}
        return {trigger: sight for trigger, sight in seen.items() if sight is not None}

    # ------------------------------------------------------------ one level more
    def _asks(self, trigger: Trigger, now: float) -> bool:
        since = self._watches[trigger].beyond_since
        if since is None or self.level.rank >= WORST[trigger].rank:
            return False
        return now - self._after_step(since) >= self._policy.step_seconds

    def _why(self, causes: Iterable[Trigger], sights: Mapping[Trigger, _Sight], now: float) -> str:
        return "; ".join(self._cause(trigger, sights[trigger], now) for trigger in causes)

    def _cause(self, trigger: Trigger, sight: _Sight, now: float) -> str:
        since = self._watches[trigger].beyond_since
        assert since is not None  # it asked
        limit = f", limit {sight.limit}" if sight.limit else ""
        return f"{trigger.value}: {sight.said} for {now - since:.0f} s{limit}"

    # ------------------------------------------------------------ one level less
    def _note_relief(self, now: float) -> None:
        raised = (WORST[trigger].rank for trigger, watch in self._watches.items() if watch.raised)
        if self.level.rank <= max(raised, default=0):
            self._relieved = None
        elif self._relieved is None:
            self._relieved = now

    def _may_go_back(self, sights: Mapping[Trigger, _Sight], now: float) -> bool:
        if self._relieved is None or any(
            watch.seen is not None for trigger, watch in self._watches.items() if trigger not in sights
        ):
            return False
        return now - self._after_step(self._relieved) >= self._policy.back_seconds

    def _why_not(self, sights: Mapping[Trigger, _Sight], now: float) -> str:
        assert self._relieved is not None
        known = ", ".join(f"{trigger.value} {sight.said}" for trigger, sight in sights.items())
        return f"better for {now - self._relieved:.0f} s ({known or 'no sensor is left'})"

    # ------------------------------------------------------------ stepping
    def _after_step(self, since: float) -> float:
        """Nothing that happened before the last step counts for the next."""
        return since if self._stepped is None else max(since, self._stepped)

    def _move(self, by: int, now: float, why: str) -> Step:
        before, after = self.level, LEVELS[self.level.rank + by]
        self.level, self._stepped = after, now
        self._note_relief(now)
        return Step(before=before, after=after, said=f"{why}: {self._said()} ({before.value} → {after.value})")

    def _said(self) -> str:
        measures = self.measures
        parts = [] if measures.shadow else ["shadow paused"]
        if (working := part(self._interpreters, measures.interpreters)) < self._interpreters:
            parts.append(f"{working} of {self._interpreters} interpreters")
        parts += self._said_of_threads(measures)
        if measures.lowest < TABLE[Level.NORMAL].lowest:
            parts.append(f"only priorities 1 to {measures.lowest} are answered")
        return ", ".join(parts) or "everything as it is set"

    def _said_of_threads(self, measures: Measures) -> list[str]:
        if measures.threads == 1 or self._threads == 1:
            return []
        if not measures.reload:
            return ["threads as they are, for memory is short"]
        if self._threads is None:
            return [f"1 in {measures.threads} of each model's threads"]
        return [f"{part(self._threads, measures.threads)} of {self._threads} threads each"]


def part(count: int, one_in: int) -> int:
    """Return how many of ``count`` are left when one in so many is: rounded up, so at least one.

    >>> part(5, 2)
    3
    """
    return -(-count // one_in)
