"""Which sums are kept of windows and truth, for how long, and which of them answers a question. Pure.

Three resolutions: what devices reported, quarters of an hour, and days. A sum belongs to the span that the *device's*
clock says, and to the UTC day on which the *server* received it: what is received on one day no longer grows once the
day is over, so a sum is exact for ever, however late the rest comes and whatever was dropped meanwhile. Sums of
several days of arrival are simply added.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.statistics import ConfusionCell, ModelStatistics, merge_by_digest, merge_confusion

QUARTER = 900_000  # ms
DAY = 86_400_000  # ms


@dataclass(frozen=True, kw_only=True)
class Kept:
    """For how many days after their arrival things are kept; no coarser one for less long than a finer one."""

    raw: int = 30
    quarters: int = 90
    days: int = 1825

    def __post_init__(self) -> None:
        """Refuse what would lose the past while its details are still there."""
        if not 1 <= self.raw <= self.quarters <= self.days:
            raise ValueError(f"reports {self.raw}, quarters {self.quarters}, days {self.days}: this must not shrink")


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What one version did on one device in one span, as far as it arrived on one day."""

    statistics: ModelStatistics
    confusion: tuple[ConfusionCell, ...] = ()

    @property
    def correct(self) -> int:
        """Right predictions among those whose truth is known."""
        return sum(n for true, predicted, n in self.confusion if true == predicted)

    @property
    def total(self) -> int:
        """Predictions whose truth is known."""
        return sum(n for _, _, n in self.confusion)


def bucket_of(at: int, width: int) -> int:
    """Return the start of the bucket that a time is in."""
    return at - at % width


def add_up(
    measured: Iterable[ModelStatistics], judged: Iterable[tuple[str, Sequence[ConfusionCell]]]
) -> dict[str, Sum]:
    """Add windows and truth up, version by version; a version with truth only did nothing else here."""
    statistics = {model.digest: model for model in merge_by_digest(measured)}
    cells: dict[str, list[ConfusionCell]] = {}
    for digest, confusion in judged:
        cells.setdefault(digest, []).extend(confusion)
    return {
        digest: Sum(
            statistics=statistics.get(digest, ModelStatistics(digest=digest)),
            confusion=merge_confusion(cells.get(digest, ())),
        )
        for digest in sorted({*statistics, *cells})
    }


def resolution_for(span: int, *, most: int, kept: Kept) -> int:
    """Return the width of the sums that answer best: 0 for what devices reported, else `QUARTER` or `DAY`.

    The finest that is still kept over the whole span, unless a coarser one is fine enough for so many points.
    """
    step = span / max(1, most)
    if step >= DAY or span > kept.quarters * DAY:
        return DAY
    return QUARTER if step >= QUARTER or span > kept.raw * DAY else 0
