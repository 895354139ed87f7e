"""Small charts drawn on the server as SVG geometry: a line over time, with its interval. Pure.

The page puts the numbers into a table beside each chart; the drawing itself says nothing that the caption and the
table do not. A gap in the data is a gap in the line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600, 120  # of the drawing; CSS scales it
LEFT, TOP, BOTTOM = 4, 8, 8  # margins
_GAP_STEPS = 1.5  # two points further apart than this many steps are not joined


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A value at a time; ``low`` and ``high`` are its interval."""

    at: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Dot:
    """Where a value is drawn."""

    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """Where another version begins."""

    x: float
    version: int


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template draws."""

    width: int
    height: int
    line: str  # path
    band: str  # path around the intervals
    dots: tuple[Dot, ...]
    changes: tuple[Change, ...]
    top: float  # value at the upper edge; the lower one is 0


def draw(
    samples: Sequence[Sample],
    *,
    since: int,
    until: int,
    step: int,
    top: float,
    versions: Sequence[tuple[int, int]] = (),
) -> Chart:
    """Return the chart of samples between two times, with the value axis from 0 to ``top``."""
    samples = [sample for sample in samples if since <= sample.at <= until]
    scale = _Scale(since=since, until=max(until, since + 1), top=top)
    runs = _runs(samples, step)
    return Chart(
        width=WIDTH,
        height=HEIGHT,
        line=" ".join(_path([(scale.x(s.at), scale.y(s.value)) for s in run]) for run in runs),
        band=" ".join(_band(run, scale) for run in runs),
        dots=tuple(Dot(x=scale.x(s.at), y=scale.y(s.value)) for s in samples),
        changes=tuple(Change(x=scale.x(at), version=version) for at, version in versions if at >= since),
        top=top,
    )


def nice_top(values: Sequence[float]) -> float:
    """Return a round number at or above all values, for the upper edge of an axis that starts at 0.

    >>> nice_top([3.2, 7.9]), nice_top([120.0]), nice_top([])
    (10.0, 200.0, 1.0)
    """
    highest = max(values, default=0.0)
    if highest <= 0:
        return 1.0
    magnitude = 1.0
    while magnitude < highest:
        magnitude *= 10
    while magnitude / 10 >= highest:
        magnitude /= 10
    return next(magnitude * share for share in (0.1, 0.2, 0.5, 1.0) if magnitude * share >= highest)


@dataclass(frozen=True, kw_only=True)
class _Scale:
    since: int
    until: int
    top: float

    def x(self, at: int) -> float:
        share = (at - self.since) / (self.until - self.since)
        return round(LEFT + share * (WIDTH - 2 * LEFT), 1)

    def y(self, value: float) -> float:
        share = min(max(value, 0.0), self.top) / self.top
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _runs(samples: Sequence[Sample], step: int) -> list[list[Sample]]:
    """Split where data is missing."""
    runs: list[list[Sample]] = []
    for sample in samples:
        if runs and sample.at - runs[-1][-1].at <= _GAP_STEPS * step:
            runs[-1].append(sample)
        else:
            runs.append([sample])
    return runs


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x} {y}" for x, y in places)


def _band(run: Sequence[Sample], scale: _Scale) -> str:
    upper = [(scale.x(s.at), scale.y(s.high)) for s in run if s.high is not None]
    lower = [(scale.x(s.at), scale.y(s.low)) for s in run if s.low is not None]
    return f"{_path([*upper, *reversed(lower)])} Z" if upper and lower else ""
