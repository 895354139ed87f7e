"""Tables that grow with time, in slices by the day of arrival: made ahead, and dropped when they are old.

PostgreSQL drops a slice as a whole: one table less, whatever was in it. SQLite has no partitions; there old rows are
deleted in small steps along the primary key, which begins with the arrival, and their pages are used again.
Slices go by the server's clock, never by a device's: a clock that is wrong by years makes no slice.
"""

import re
from collections.abc import Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.core.rollups import DAY

AHEAD = 3 * DAY  # ms; slices that exist before they are needed
STEP = 2000  # rows that SQLite deletes in one transaction; a writer waits no longer than that takes
PATIENCE = "3s"  # what a slice's making or dropping waits for readers, while others wait behind it
WIDTHS = {  # ms per slice, and the column that it goes by
    tables.report: DAY,
    tables.statistics: DAY,
    tables.resources: DAY,
    tables.truth: DAY,
    tables.quarter: 7 * DAY,
    tables.day: 28 * DAY,
}
_SLICE = re.compile(r"_s(\d+)$")  # the number of a slice ends its name


def is_slice(name: str | None) -> bool:
    """Tell whether a table's name is that of a slice."""
    return bool(_SLICE.search(name or ""))


def make(engine: Engine, *, first: int, last: int, only: Sequence[sa.Table] = tuple(WIDTHS)) -> None:
    """Make the slices for arrivals between two times; each in a transaction of its own, so that no two locks meet."""
    if engine.dialect.name != "postgresql":
        return
    for table in only:
        for number in _lacking(engine, table, first, last):
            with dialect.writing(engine) as connection:
                _be_brief(connection)
                connection.exec_driver_sql(_making(table, number))


def _lacking(engine: Engine, table: sa.Table, first: int, last: int) -> list[int]:
    """Return the numbers of the slices that are not there."""
    width = WIDTHS[table]
    with dialect.writing(engine) as connection:
        known = set(_slices(connection, table))
    return [number for number in range(first // width, last // width + 1) if number not in known]


def drop_before(engine: Engine, table: sa.Table, before: int) -> int:
    """Forget everything of a table that arrived before a time; return how many slices or rows that were."""
    if engine.dialect.name != "postgresql":
        return sum(_delete_in_steps(engine, table, before))
    dropped = 0
    width = WIDTHS[table]
    with dialect.writing(engine) as connection:
        numbers = [number for number in _slices(connection, table) if (number + 1) * width <= before]
    for number in numbers:
        with dialect.writing(engine) as connection:
            _be_brief(connection)
            connection.exec_driver_sql(f'DROP TABLE IF EXISTS "{_name(table, number)}"')
        dropped += 1
    return dropped


def _slices(connection: Connection, table: sa.Table) -> list[int]:
    """Return the numbers of a table's slices."""
    query = sa.text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(:name)")
    names = connection.scalars(query, {"name": table.name})
    return sorted(int(found[1]) for name in names if (found := _SLICE.search(name.strip('"'))))


def _making(table: sa.Table, number: int) -> str:
    width = WIDTHS[table]
    bounds = f"FROM ({number * width}) TO ({(number + 1) * width})"
    return f'CREATE TABLE IF NOT EXISTS "{_name(table, number)}" PARTITION OF "{table.name}" FOR VALUES {bounds}'


def _name(table: sa.Table, number: int) -> str:
    return f"{table.name}_s{number}"


def _be_brief(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{PATIENCE}'")


def _delete_in_steps(engine: Engine, table: sa.Table, before: int) -> Iterator[int]:
    """Whole slices only, as PostgreSQL does, so that both keep the same."""
    arrival = next(iter(table.primary_key))
    until = before - before % WIDTHS[table]
    rowid: sa.ColumnClause[int] = sa.literal_column("rowid")
    old = sa.select(rowid).select_from(table).where(arrival < until).limit(STEP)
    while True:
        with dialect.writing(engine) as connection:
            deleted = connection.execute(table.delete().where(rowid.in_(old))).rowcount
        yield deleted
        if deleted < STEP:
            return
