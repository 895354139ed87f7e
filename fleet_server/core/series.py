"""Windows and truth put together: points over time, and summaries per version. Pure.

Knows that everything is counts, so that merging is addition, and figures are computed only at the end. Truth is
dated by the UTC minute of its predictions, so it belongs to the point in which that minute begins.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from protocol.metrics import Proportion, proportion
from protocol.statistics import Histogram, merge_histograms

MINUTE = 60_000  # ms


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model version did in one window."""

    start: int
    span: int
    version: int | None
    requests: int
    errors: int
    latency: Histogram
    dropped: int = 0
    late: int = 0
    shed: int = 0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Truth of one model version for one UTC minute."""

    minute: int
    version: int | None
    right: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts over some span, and the figures they give."""

    requests: int = 0
    errors: int = 0
    dropped: int = 0  # turned away; late and shed are parts of it
    late: int = 0
    shed: int = 0
    latency: Histogram = field(default_factory=Histogram)
    right: int = 0
    total: int = 0

    @property
    def p50_us(self) -> float | None:
        """Median latency; None without a successful request."""
        return self.latency.quantile(0.5)

    @property
    def p95_us(self) -> float | None:
        """Latency that 95 % of requests stayed below."""
        return self.latency.quantile(0.95)

    @property
    def accuracy(self) -> Proportion | None:
        """Share of right predictions among those whose truth is known; None without any."""
        return proportion(self.right, self.total) if self.total else None


@dataclass(frozen=True, kw_only=True)
class Point:
    """One version over one step of time."""

    start: int
    span: int
    version: int | None
    summary: Summary


def summarise(measured: Iterable[Measured], judged: Iterable[Judged]) -> Summary:
    """Add everything up."""
    windows, minutes = tuple(measured), tuple(judged)
    return Summary(
        requests=sum(window.requests for window in windows),
        errors=sum(window.errors for window in windows),
        dropped=sum(window.dropped for window in windows),
        late=sum(window.late for window in windows),
        shed=sum(window.shed for window in windows),
        latency=functools.reduce(merge_histograms, (window.latency for window in windows), Histogram()),
        right=sum(minute.right for minute in minutes),
        total=sum(minute.total for minute in minutes),
    )


def summarise_by_version(measured: Sequence[Measured], judged: Sequence[Judged]) -> dict[int | None, Summary]:
    """Add up version by version."""
    versions = {window.version for window in measured} | {minute.version for minute in judged}
    return {
        version: summarise(
            [window for window in measured if window.version == version],
            [minute for minute in judged if minute.version == version],
        )
        for version in versions
    }


def points(measured: Iterable[Measured], judged: Iterable[Judged], *, step: int) -> tuple[Point, ...]:
    """Return one point per version and step of ``step`` ms, oldest first."""
    cells: dict[tuple[int, int | None], tuple[list[Measured], list[Judged]]] = {}
    for window in measured:
        cells.setdefault((_floor(window.start, step), window.version), ([], []))[0].append(window)
    for minute in judged:
        cells.setdefault((_floor(minute.minute, step), minute.version), ([], []))[1].append(minute)
    return tuple(
        Point(start=start, span=step, version=version, summary=summarise(*cells[start, version]))
        for start, version in sorted(cells, key=lambda key: (key[0], key[1] or 0))
    )


def step_for(span: int, *, window: int, most: int = 120) -> int:
    """Return the width of a point in ms: whole windows, and not more than ``most`` points over ``span``."""
    windows_per_point = -(-span // (most * window))
    return window * max(1, windows_per_point)


def _floor(at: int, step: int) -> int:
    return at - at % step
