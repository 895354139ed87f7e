"""Which numbers of a stream have arrived, and which are missing. Pure.

A device numbers its reports 1, 2, 3, … per spool; they may come twice, late, or merged (one report that covers
several numbers). A `Position` remembers the contiguous part and the ranges above it. It knows numbers only, not
what they stand for.
"""

import msgspec

MAX_RANGES = 512  # a stream with more holes is broken or hostile: its oldest hole is given up
MAX_MISSING_TOLD = 64  # ranges in one acknowledgement; keeps it far below the telemetry cap

Range = tuple[int, int]  # inclusive


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """What has arrived of one stream."""

    upto: int = 0  # every number up to here
    above: tuple[Range, ...] = ()  # sorted, disjoint, not touching each other or ``upto``

    @property
    def highest(self) -> int:
        """The highest number that arrived."""
        return self.above[-1][1] if self.above else self.upto

    def has(self, number: int) -> bool:
        """Say whether a number has arrived."""
        return number <= self.upto or any(first <= number <= last for first, last in self.above)

    def missing(self) -> tuple[Range, ...]:
        """Return the holes below the highest number."""
        ends = (self.upto, *(last for _, last in self.above))
        return tuple((end + 1, first - 1) for end, (first, _) in zip(ends, self.above, strict=False))

    def count_missing(self) -> int:
        """Return how many numbers are known to be missing."""
        return sum(last - first + 1 for first, last in self.missing())

    def told(self) -> tuple[int, tuple[Range, ...]]:
        """Return what to acknowledge: everything up to a number, except these ranges (a bounded list of them)."""
        missing = self.missing()
        if len(missing) <= MAX_MISSING_TOLD:
            return self.highest, missing
        return self.above[MAX_MISSING_TOLD - 1][1], missing[:MAX_MISSING_TOLD]


def arrived(position: Position, first: int, last: int) -> Position:
    """Return the position after the numbers from ``first`` to ``last`` have arrived."""
    merged: list[Range] = [(0, position.upto)]
    for start, end in sorted((*position.above, (max(1, first), last))):
        low, high = merged[-1]
        if start <= high + 1:
            merged[-1] = (low, max(high, end))
        else:
            merged.append((start, end))
    while len(merged) > MAX_RANGES:
        merged[:2] = [(0, merged[1][1])]
    return Position(upto=merged[0][1], above=tuple(merged[1:]))
