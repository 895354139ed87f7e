"""Keeps the database from growing without end: sums brought up to date, slices made ahead, old ones dropped.

What is not summed yet is not dropped, however old. Times are passed in; when to come is for the wiring.
"""

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, partitions, sums, tables
from fleet_server.core.rollups import DAY, QUARTER, Kept

REPORTED = (tables.statistics, tables.resources, tables.truth, tables.report)


class Retention:
    """What is done at intervals. Every step may be cut short and comes again."""

    def __init__(self, engine: Engine, *, kept: Kept) -> None:
        self._engine = engine
        self._kept = kept

    def sum_up(self, width: int = DAY) -> int:
        """Bring sums of a width, and the finer ones, up to date; return how many buckets changed."""
        done = sums.bring_up_to_date(self._engine, QUARTER)
        return done + (sums.bring_up_to_date(self._engine, DAY) if width == DAY else 0)

    def make_ahead(self, now: int) -> None:
        """Make the slices of the next days."""
        partitions.make(self._engine, first=now, last=now + partitions.AHEAD)

    def forget(self, now: int) -> int:
        """Drop what is older than it is to be kept; return how many slices, or rows on SQLite."""
        self.make_ahead(now)
        self.sum_up()
        dropped = sum(self._drop(table, now - self._kept.raw * DAY) for table in REPORTED)
        dropped += self._drop(tables.quarter, now - self._kept.quarters * DAY)
        return dropped + self._drop(tables.day, now - self._kept.days * DAY)

    def _drop(self, table: sa.Table, before: int) -> int:
        with dialect.reading(self._engine) as connection:
            unsummed = sums.oldest_dirty(connection)
        return partitions.drop_before(self._engine, table, before if unsummed is None else min(before, unsummed))
