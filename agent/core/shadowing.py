"""What a candidate's shadow has shown: counts that add, and the sentence that sums them up.

A shadow answers a sample of the requests that the stable version answered; nobody sees its answers. Counts of one
pair of bundles add up over deltas, restarts and devices. What follows from them is decided elsewhere.
"""

import msgspec

from protocol.statistics import Histogram, merge_histograms

MILLION = 1_000_000


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
