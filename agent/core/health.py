"""Whether a model on probation does as well as it must: the device's own verdict, taken without any server. Pure.

Compared are counts of the version on probation with those of the version before it, on the same device. A share
counts as worse only when its Wilson interval lies wholly beyond the other's (and beyond an absolute limit), so that a
handful of unlucky requests takes no model back; latency is judged by a quantile and a factor, for its noise on a
small machine is not that of independent draws. No requests, no verdict from counts: the golden samples, run where the
model serves, speak at the end of every probation.
"""

from dataclasses import dataclass
from enum import Enum

from protocol.metrics import proportion
from protocol.states import RejectReason
from protocol.statistics import CONFIDENCE_BINS, ModelStatistics

LOW_CONFIDENCE = 0.5  # a prediction below this is an unsure one


@dataclass(frozen=True, kw_only=True)
class HealthLimits:
    """What a version on probation may not exceed."""

    requests: int = 30  # fewer say nothing
    errors: float = 0.05  # share of the requests
    slowdown: float = 3.0  # 95th percentile against the version before
    slack_us: int = 5_000  # a slowdown by less than this disturbs nobody
    unsure: float = 0.3  # growth of the share of unsure predictions


@dataclass(frozen=True, kw_only=True)
class GoldenRun:
    """What the golden samples said where the model serves."""

    passed: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Probation:
    """What is known of a model on probation."""

    elapsed_ms: int  # since it began to serve
    length_ms: int
    before: ModelStatistics | None = None  # the version before, lately
    now: ModelStatistics | None = None  # the version on probation, since it serves
    golden: GoldenRun | None = None  # since it serves


class Verdict(str, Enum):
    """What follows."""

    WATCH = "watch"
    RUN_GOLDEN = "run-golden"  # time is up, and only the golden samples have not spoken
    HEALTHY = "healthy"
    SICK = "sick"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A verdict with its reason, for the machine and in a sentence with the numbers behind it."""

    verdict: Verdict
    reason: RejectReason | None = None
    detail: str = ""


def judge(probation: Probation, limits: HealthLimits) -> Finding:
    """Return what follows from what is known. A sick model need not serve out its time."""
    if probation.golden and not probation.golden.passed:
        return _sick(RejectReason.GOLDEN_FAILED, probation.golden.detail)
    if probation.now and (complaint := _complain(probation.now, probation.before, limits)):
        return complaint
    if probation.elapsed_ms < probation.length_ms:
        return Finding(verdict=Verdict.WATCH)
    if probation.golden is None:
        return Finding(verdict=Verdict.RUN_GOLDEN)
    return Finding(verdict=Verdict.HEALTHY, detail=_summary(probation))


def _complain(now: ModelStatistics, before: ModelStatistics | None, limits: HealthLimits) -> Finding | None:
    return (
        _too_many_errors(now, before, limits)
        or (before and _too_slow(now, before, limits))
        or (before and _less_sure(now, before, limits))
        or None
    )


def _too_many_errors(now: ModelStatistics, before: ModelStatistics | None, limits: HealthLimits) -> Finding | None:
    if now.requests < limits.requests:
        return None
    usual = _high(before.errors, before.requests) if before else 0.0
    if _low(now.errors, now.requests) <= max(limits.errors, usual):
        return None
    detail = f"{_share(now.errors, now.requests)} of the requests failed; allowed {limits.errors:.1%}"
    if before and before.requests:
        detail += f", before it {_share(before.errors, before.requests)}"
    return _sick(RejectReason.TOO_MANY_ERRORS, detail)


def _too_slow(now: ModelStatistics, before: ModelStatistics, limits: HealthLimits) -> Finding | None:
    if min(now.latency.count, before.latency.count) < limits.requests:
        return None
    slow, usual = now.latency.quantile(0.95), before.latency.quantile(0.95)
    if slow is None or usual is None or slow <= max(limits.slowdown * usual, usual + limits.slack_us):
        return None
    detail = (
        f"95 % of {now.latency.count} requests within {slow / 1000:.1f} ms; "
        f"before it {usual / 1000:.1f} ms (n={before.latency.count}), allowed {limits.slowdown:g} times that"
    )
    return _sick(RejectReason.TOO_SLOW, detail)


def _less_sure(now: ModelStatistics, before: ModelStatistics, limits: HealthLimits) -> Finding | None:
    (unsure, n), (usual, m) = _unsure(now), _unsure(before)
    if min(n, m) < limits.requests or _low(unsure, n) <= _high(usual, m) + limits.unsure:
        return None
    detail = f"{_share(unsure, n)} of the predictions are below {LOW_CONFIDENCE:g}; before it {_share(usual, m)}"
    return _sick(RejectReason.CONFIDENCE_COLLAPSED, detail)


def _unsure(statistics: ModelStatistics) -> tuple[int, int]:
    """Return how many predictions are unsure, and of how many."""
    below = int(LOW_CONFIDENCE * CONFIDENCE_BINS)
    return sum(statistics.confidence[:below]), sum(statistics.confidence)


def _low(part: int, whole: int) -> float:
    return proportion(part, whole).low or 0.0


def _high(part: int, whole: int) -> float:
    return proportion(part, whole).high or 0.0


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({_low(part, whole):.1%}-{_high(part, whole):.1%})"


def _sick(reason: RejectReason, detail: str) -> Finding:
    return Finding(verdict=Verdict.SICK, reason=reason, detail=detail)


def _summary(probation: Probation) -> str:
    golden = probation.golden.detail if probation.golden else ""
    answered = probation.now.requests if probation.now else 0
    return f"{answered} requests in {probation.elapsed_ms / 1000:.0f} s; {golden}"
