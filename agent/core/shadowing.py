"""What a candidate's shadow has shown: counts that add, and the sentence that sums them up.

A shadow answers a sample of the requests that the stable version answered; nobody sees its answers. Counts of one
pair of bundles add up over deltas, restarts and devices. Whether a candidate may serve after its shadow is decided in
`judge`, from the terms that the assignment sets.
"""

from dataclasses import dataclass

import msgspec

from protocol.metrics import proportion
from protocol.release import ShadowTerms
from protocol.statistics import Histogram, merge_histograms

MILLION = 1_000_000
FAILURES_ALLOWED = 0.01  # of the compared requests that the candidate could not answer


class ShadowCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How a candidate compares with the stable version on the same requests."""

    stable: str  # sha256 hex of the bundle
    candidate: str
    compared: int = 0
    agreed: int = 0  # same class
    distance: int = 0  # sum of the absolute differences of the confidence, in millionths
    dropped: int = 0  # sampled, but the shadow was busy or out of its CPU budget
    failed: int = 0  # the candidate could not answer
    latency: Histogram = msgspec.field(default_factory=Histogram)  # of the candidate, without waiting, µs


def add(first: ShadowCounts | None, second: ShadowCounts) -> ShadowCounts:
    """Add the counts of one pair; another pair begins anew."""
    if first is None or (first.stable, first.candidate) != (second.stable, second.candidate):
        return second
    return ShadowCounts(
        stable=first.stable,
        candidate=first.candidate,
        compared=first.compared + second.compared,
        agreed=first.agreed + second.agreed,
        distance=first.distance + second.distance,
        dropped=first.dropped + second.dropped,
        failed=first.failed + second.failed,
        latency=merge_histograms(first.latency, second.latency),
    )


def summary(counts: ShadowCounts | None) -> str:
    """Return a sentence for people; n comes with every share."""
    if counts is None or not (counts.compared or counts.failed):
        return "no request was compared"
    mean = counts.distance / MILLION / counts.compared if counts.compared else 0.0
    share = f" ({counts.agreed / counts.compared:.1%})" if counts.compared else ""
    took = f", {counts.latency.sum / counts.latency.count:.0f} us each" if counts.latency.count else ""
    return (
        f"candidate {counts.candidate[:16]} agreed with {counts.stable[:16]} "
        f"on {counts.agreed} of {counts.compared} requests{share}, "
        f"mean confidence distance {mean:.3f}{took}; {counts.failed} failed, {counts.dropped} dropped"
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A verdict on a shadow, and the sentence with its numbers."""

    agreed: bool
    detail: str


def judge(counts: ShadowCounts | None, terms: ShadowTerms, elapsed_ms: int) -> Comparison | None:
    """Return whether a candidate may serve, or None while that is open.

    It is settled when enough requests were compared, sooner when the agreement can no longer reach what is asked
    (its 95 % interval lies below), and at the end of the time with what there is: a device that nobody asks
    anything compares nothing, and a candidate is not refused for that.
    """
    compared = counts.compared if counts else 0
    over = compared >= terms.requests or elapsed_ms >= terms.seconds * 1000
    if counts and (complaint := _complain(counts, terms, over=over)):
        return Comparison(agreed=False, detail=f"{complaint}: {summary(counts)}")
    if over:
        return Comparison(agreed=True, detail=summary(counts))
    return None


def _complain(counts: ShadowCounts, terms: ShadowTerms, *, over: bool) -> str:
    asked = terms.agreement / 1000
    agreement = proportion(counts.agreed, counts.compared)
    value, high = agreement.value or 0.0, agreement.high or 0.0
    if counts.compared and (high < asked or (over and value < asked)):
        return f"less than the agreement of {asked:.1%} that is asked"
    if (proportion(counts.failed, counts.failed + counts.compared).low or 0.0) > FAILURES_ALLOWED:
        return "it fails requests"
    return ""


def refuse(why: str) -> Comparison:
    """Return the verdict on a candidate that cannot be compared.

    Better no update than one without the safety that was ordered; whoever ordered may order it without a shadow.
    """
    return Comparison(agreed=False, detail=f"it cannot be compared with what serves: {why}")
