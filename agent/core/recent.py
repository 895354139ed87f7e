"""What a version did lately: the measure that its successor on probation is held to. Pure."""

from protocol.statistics import ModelStatistics, merge_models

SPAN_SECONDS = 900.0  # a full span and the begun one are kept, so between 15 and 30 minutes


class Recent:
    """Additive counts of one version that forget what is long ago."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._older: ModelStatistics | None = None
        self._newer: ModelStatistics | None = None
        self._since = 0.0

    def add(self, statistics: ModelStatistics, at: float) -> None:
        """Add what was counted until ``at`` (seconds that never jump)."""
        if self._newer is None:
            self._since = at
        elif at - self._since >= SPAN_SECONDS:
            self._older, self._newer, self._since = self._newer, None, at
        self._newer = added(self._newer, statistics)

    @property
    def statistics(self) -> ModelStatistics | None:
        """Return what is remembered."""
        return added(self._older, self._newer) if self._older and self._newer else self._newer or self._older


def added(first: ModelStatistics | None, second: ModelStatistics) -> ModelStatistics:
    """Add counts of one version; nothing and something is something."""
    return merge_models(first, second) if first else second
