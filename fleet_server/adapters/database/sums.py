"""Sums over quarters of an hour and days: made anew where something was added, and read together with what is newer.

A bucket whose sum is out of date is in ``dirty``, since the transaction that added to it. Readers take sums of clean
buckets, and for dirty ones what they are made from, so that an answer is exact at any moment, whenever the sums are
made. Days are made from quarters, and quarters from what devices reported.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, partitions, tables
from fleet_server.adapters.database.records import from_json, to_json
from fleet_server.core.rollups import DAY, QUARTER, Sum, add_up, bucket_of
from protocol.statistics import ConfusionCell, Histogram, ModelStatistics

CHUNK = 200  # buckets in one transaction: other writers wait no longer than these take
SUMS = {QUARTER: tables.quarter, DAY: tables.day}
Bucket = tuple[int, str, int]  # arrived, device, start
Counts = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table, and what tells the bucket that its rows are in."""

    table: sa.Table
    at: sa.Column[Any]
    arrival: sa.Column[Any]


STATISTICS = Source(table=tables.statistics, at=tables.statistics.c.start, arrival=tables.statistics.c.received_at)
TRUTH = Source(table=tables.truth, at=tables.truth.c.minute, arrival=tables.truth.c.received_at)
QUARTERS = Source(table=tables.quarter, at=tables.quarter.c.start, arrival=tables.quarter.c.arrived)
DAYS = Source(table=tables.day, at=tables.day.c.start, arrival=tables.day.c.arrived)


# ---------------------------------------------------------------- making
def bring_up_to_date(engine: Engine, width: int) -> int:
    """Make every sum of a width that is out of date; return how many buckets that were. Quarters come before days."""
    done = 0
    while True:
        with dialect.writing(engine) as connection:
            buckets = _next_dirty(connection, width)
        _make_slices(engine, buckets, width)
        with dialect.writing(engine) as connection:
            _make_sums(connection, buckets, width)
        done += len(buckets)
        if len(buckets) < CHUNK:
            return done


def oldest_dirty(connection: Connection) -> int | None:
    """Return the first day of arrival of which something is not summed yet."""
    oldest: int | None = connection.scalar(sa.select(sa.func.min(tables.dirty.c.arrived)))
    return oldest


def _next_dirty(connection: Connection, width: int) -> list[Bucket]:
    dirty = tables.dirty
    query = sa.select(dirty.c.arrived, dirty.c.device, dirty.c.start).where(dirty.c.width == width)
    rows = connection.execute(query.order_by(dirty.c.arrived, dirty.c.device, dirty.c.start).limit(CHUNK))
    return [(row.arrived, row.device, row.start) for row in rows]


def _make_slices(engine: Engine, buckets: Sequence[Bucket], width: int) -> None:
    for arrived in sorted({arrived for arrived, _, _ in buckets}):
        partitions.make(engine, first=arrived, last=arrived, only=[SUMS[width]])


def _make_sums(connection: Connection, buckets: Sequence[Bucket], width: int) -> None:
    """What a bucket gets after this transaction marks it again."""
    if not buckets:
        return
    parts = _parts(connection, buckets, width)
    rows = [_sum_row(bucket, sum_) for bucket in buckets for sum_ in add_up(*parts.get(bucket, ((), ()))).values()]
    dialect.put(connection, SUMS[width], rows)
    dirty = tables.dirty
    key = sa.tuple_(dirty.c.arrived, dirty.c.device, dirty.c.start)
    for chunk in dialect.chunks(buckets, columns=3):
        connection.execute(dirty.delete().where(dirty.c.width == width, key.in_(chunk)))


Parts = tuple[list[ModelStatistics], list[tuple[str, Sequence[ConfusionCell]]]]


def _parts(connection: Connection, buckets: Sequence[Bucket], width: int) -> Mapping[Bucket, Parts]:
    """Return what each bucket is made from."""
    parts: dict[Bucket, Parts] = defaultdict(lambda: ([], []))
    for source in (STATISTICS, TRUTH) if width == QUARTER else (QUARTERS,):
        for row in _rows_in(connection, source, buckets, width):
            bucket = (bucket_of(row.arrival, DAY), row.device, bucket_of(row.at, width))
            if source is not TRUTH:
                parts[bucket][0].append(statistics_of(row))
            if source is not STATISTICS:
                parts[bucket][1].append((row.digest, from_json(row.confusion_json, tuple[ConfusionCell, ...])))
    return parts


def _rows_in(connection: Connection, source: Source, buckets: Sequence[Bucket], width: int) -> list[sa.Row[Any]]:
    dirty = tables.dirty
    key = sa.tuple_(dirty.c.arrived, dirty.c.device, dirty.c.start)
    query = sa.select(source.table, source.at.label("at"), source.arrival.label("arrival")).join(
        dirty, sa.and_(dirty.c.width == width, *_inside(source, width))
    )
    return [
        row for chunk in dialect.chunks(buckets, columns=3) for row in connection.execute(query.where(key.in_(chunk)))
    ]


def _inside(source: Source, width: int) -> tuple[sa.ColumnElement[bool], ...]:
    """Tell whether a row is in a dirty bucket, in words that an index understands."""
    dirty = tables.dirty
    return (
        source.table.c.device == dirty.c.device,
        source.at >= dirty.c.start,
        source.at < dirty.c.start + width,
        source.arrival >= dirty.c.arrived,
        source.arrival < dirty.c.arrived + DAY,
    )


def _sum_row(bucket: Bucket, sum_: Sum) -> dict[str, Any]:
    arrived, device, start = bucket
    model = sum_.statistics
    return {
        "arrived": arrived,
        "device": device,
        "digest": model.digest,
        "start": start,
        "requests": model.requests,
        "errors": model.errors,
        "dropped": model.dropped,
        "late": model.late,
        "shed": model.shed,
        "latency_json": to_json(model.latency),
        "confidence_json": to_json(model.confidence),
        "classes_json": to_json(model.classes),
        "correct": sum_.correct,
        "total": sum_.total,
        "confusion_json": to_json(sum_.confusion),
    }


def statistics_of(row: sa.Row[Any]) -> ModelStatistics:
    """Return the statistics of a row of ``statistics``, ``quarter`` or ``day``."""
    return ModelStatistics(
        digest=row.digest,
        requests=row.requests,
        errors=row.errors,
        dropped=row.dropped,
        late=row.late,
        shed=row.shed,
        latency=from_json(row.latency_json, Histogram),
        confidence=from_json(row.confidence_json, Counts),
        classes=from_json(row.classes_json, Counts),
    )


# ---------------------------------------------------------------- reading
def span_of(source: Source) -> int:
    """Return the ms that a row of a source stands for; 0 when its rows say so themselves, or are of a minute."""
    return {tables.quarter: QUARTER, tables.day: DAY}.get(source.table, 0)


def sources_of(width: int, finest: Source) -> tuple[tuple[Source, tuple[sa.ColumnElement[bool], ...]], ...]:
    """Return which rows together tell everything at a resolution: sums, and of dirty buckets what they are made from.

    ``width`` 0 is what devices reported. ``finest`` is `STATISTICS` or `TRUTH`.
    """
    if width == 0:
        return ((finest, ()),)
    if width == QUARTER:
        return ((QUARTERS, (~_dirty(QUARTERS, QUARTER),)), (finest, (_dirty(finest, QUARTER),)))
    return (
        (DAYS, (~_dirty(DAYS, DAY),)),
        (QUARTERS, (_dirty(QUARTERS, DAY), ~_dirty(QUARTERS, QUARTER))),
        (finest, (_dirty(finest, DAY), _dirty(finest, QUARTER))),
    )


def _dirty(source: Source, width: int) -> sa.ColumnElement[bool]:
    """Tell whether a row is in a dirty bucket. The bucket is computed from the row: a look-up by key."""
    dirty = tables.dirty
    return (
        sa.select(sa.literal(1))
        .where(
            dirty.c.width == width,
            dirty.c.arrived == source.arrival - source.arrival % DAY,
            dirty.c.device == source.table.c.device,
            dirty.c.start == source.at - source.at % width,
        )
        .correlate(source.table)
        .exists()
    )
