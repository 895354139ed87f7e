"""Whether a request's tensors are kept as a sample: which trigger chose it, and what the day's budget says.

Pure: facts in, a trigger or a reason out. Encrypting and storing is the data plane's business, and so is the random
number. Budgets count by the UTC day and never run backwards: a clock that is set back gives no second budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Literal

import msgspec

DAY_MS = 24 * 3600 * 1000
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class CapturePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[capture]``: which samples are kept on this device, how many, and for how long."""

    enabled: bool = False
    models: tuple[str, ...] = ()  # empty: all
    margin_below: Share = 0.0  # best score minus second best; 0: not a trigger
    entropy_above: Share = 1.0  # of the scores, 1 is the most there can be; 1: not a trigger
    disagreement: bool = False  # the candidate, in the shadow, gave another class
    random: Share = 0.0  # chance of any request
    class_quota: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0  # first samples of each class a day; 0: none
    samples_per_day: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 100
    bytes_per_day: Annotated[int, msgspec.Meta(ge=0, le=2**40)] = 10 * 1024 * 1024
    keep_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 14  # then a sample is deleted
    queue: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16  # chosen samples that may wait for the disk
    redact: str = ""  # module:function
    redact_command: tuple[str, ...] = ()  # a program, instead of a function
    consent: bool = False  # samples may leave the device


class Trigger(str, Enum):
    """Why a sample was kept."""

    DISAGREEMENT = "disagreement"
    MARGIN = "margin"
    ENTROPY = "entropy"
    CLASS_QUOTA = "class-quota"
    RANDOM = "random"


class Refusal(str, Enum):
    """Why a chosen sample was not kept."""

    SAMPLES = "samples-per-day"
    BYTES = "bytes-per-day"
    QUOTA = "class-quota"


State = Literal["held", "released", "expired"]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a request that was answered. Scores are absent for what is not a classifier."""

    model: str
    label: int | None = None
    margin: float | None = None
    entropy: float | None = None
    disagrees: bool = False
    chance: float = 1.0  # random, in [0, 1)


@dataclass(frozen=True, kw_only=True)
class Day:
    """What was kept on one UTC day."""

    number: int = 0  # days since 1970
    samples: int = 0
    bytes: int = 0
    quotas: Mapping[str, int] = field(default_factory=dict)  # by `class_key`


def class_key(model: str, label: int) -> str:
    """Return the name under which a class is counted."""
    return f"{model}/{label}"


def choose(policy: CapturePolicy, seen: Seen, day: Day) -> Trigger | None:
    """Return the first trigger that asks for this sample, rarest cause first."""
    if not policy.enabled or (policy.models and seen.model not in policy.models):
        return None
    if policy.disagreement and seen.disagrees:
        return Trigger.DISAGREEMENT
    if seen.margin is not None and seen.margin < policy.margin_below:
        return Trigger.MARGIN
    if seen.entropy is not None and policy.entropy_above < 1 and seen.entropy > policy.entropy_above:
        return Trigger.ENTROPY
    if seen.label is not None and _taken(day, seen.model, seen.label) < policy.class_quota:
        return Trigger.CLASS_QUOTA
    return Trigger.RANDOM if seen.chance < policy.random else None


def refuse(policy: CapturePolicy, day: Day, seen: Seen, trigger: Trigger, size: int) -> Refusal | None:
    """Return why the day's budget has no room for a sample of ``size`` bytes, or None."""
    if day.samples >= policy.samples_per_day:
        return Refusal.SAMPLES
    if day.bytes + size > policy.bytes_per_day:
        return Refusal.BYTES
    full = seen.label is not None and _taken(day, seen.model, seen.label) >= policy.class_quota
    return Refusal.QUOTA if trigger is Trigger.CLASS_QUOTA and full else None


def charge(day: Day, seen: Seen, size: int) -> Day:
    """Return the day with one more sample."""
    quotas = dict(day.quotas)
    if seen.label is not None:
        key = class_key(seen.model, seen.label)
        quotas[key] = quotas.get(key, 0) + 1
    return replace(day, samples=day.samples + 1, bytes=day.bytes + size, quotas=quotas)


def today(day: Day, now_ms: int) -> Day:
    """Return the day to charge: the same, or a fresh one when the UTC day has moved on."""
    number = now_ms // DAY_MS
    return Day(number=number) if number > day.number else day


def state_of(policy: CapturePolicy, taken_ms: int, now_ms: int) -> State:
    """Return what may happen with a sample."""
    if now_ms - taken_ms >= policy.keep_days * DAY_MS:
        return "expired"
    return "released" if policy.consent else "held"


def _taken(day: Day, model: str, label: int) -> int:
    return day.quotas.get(class_key(model, label), 0)
