"""The whole database as one SQLite file, at one moment, and back: whichever database it came from or goes to.

A file of PostgreSQL's may thus be put into SQLite and the other way round. For databases of many gigabytes
PostgreSQL's own tools are faster; what is here reads every row once.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, partitions, tables
from fleet_server.adapters.database.opening import newest_revision, open_database, revision_of
from fleet_server.adapters.durable import flush_folder

CHUNK = 1000  # rows in memory


class WrongSchema(Exception):
    """The database has not the schema that this code knows."""


class NotEmpty(Exception):
    """There is something in the database already."""


def take(url: str, path: Path) -> str:
    """Write a database into a new file; return its schema. Servers may write meanwhile. Raises `WrongSchema`."""
    engine = dialect.connect(url)
    try:
        with dialect.reading(engine) as connection:
            revision = _expected_revision(connection)
            if engine.dialect.name == "sqlite":
                _copy_file(Path(engine.url.database or ""), path)
            else:
                _copy_out(connection, path)
    finally:
        engine.dispose()
    return revision


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite database; None for PostgreSQL."""
    parsed = sa.make_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def check_target(url: str, *, force: bool) -> None:
    """Raise unless a PostgreSQL database can take a snapshot: it is reached, not newer, and empty unless forced."""
    target = open_database(url)
    try:
        with dialect.reading(target) as connection:
            names = [table.name for table in tables.metadata.sorted_tables]
            filled = [name for name in names if connection.scalar(sa.text(f'SELECT 1 FROM "{name}" LIMIT 1'))]  # noqa: S608 - a name of ours
    finally:
        target.dispose()
    if filled and not force:
        raise NotEmpty(f"the database {target.url!r} is not empty ({filled[0]}); --force replaces what is in it")


def put_back(path: Path, url: str) -> None:
    """Bring a file to the newest schema and its rows into PostgreSQL, in one transaction; what was there goes."""
    source, target = open_database(f"sqlite:///{path}"), open_database(url)
    try:
        with dialect.reading(source) as rows:
            _make_slices(rows, target)
            with dialect.writing(target) as connection:
                _empty(connection)
                for table in tables.metadata.sorted_tables:
                    _copy_table(rows, connection, table)
                _go_on_counting(connection)
    finally:
        source.dispose()
        target.dispose()


# ---------------------------------------------------------------- out
def _expected_revision(connection: Connection) -> str:
    found, known = revision_of(connection), newest_revision()
    if found != known:
        raise WrongSchema(
            f"the database has schema {found}, and this program knows {known}: use the program that wrote it, "
            "or start the server of this version first"
        )
    return known


def _copy_file(source: Path, path: Path) -> None:
    """SQLite's own way: one read transaction, and a file without a journal beside it."""
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(path)) as copy:
        reading.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
    _make_durable(path)


def _copy_out(connection: Connection, path: Path) -> None:
    target = open_database(f"sqlite:///{path}")
    try:
        with dialect.writing(target) as writing:
            for table in tables.metadata.sorted_tables:
                _copy_table(connection, writing, table)
    finally:
        target.dispose()
    with closing(sqlite3.connect(path)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE")
    _make_durable(path)


def _make_durable(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fchmod(handle, 0o600)
        os.fsync(handle)
    finally:
        os.close(handle)
    flush_folder(path.parent)


# ---------------------------------------------------------------- back
def _make_slices(rows: Connection, target: Engine) -> None:
    for table, width in partitions.WIDTHS.items():
        arrival = next(iter(table.primary_key))
        numbers = rows.scalars(sa.select(arrival - arrival % width).distinct())
        for start in sorted(numbers):
            partitions.make(target, first=start, last=start, only=[table])


def _empty(connection: Connection) -> None:
    names = ", ".join(f'"{table.name}"' for table in tables.metadata.sorted_tables)
    connection.exec_driver_sql(f"TRUNCATE {names} CASCADE")


def _go_on_counting(connection: Connection) -> None:
    """Rows that are numbered by the database go on above the highest."""
    for table in (tables.event, tables.dead_letter):
        connection.execute(
            sa.text(
                f"SELECT setval(pg_get_serial_sequence('{table.name}', 'row'), "  # noqa: S608 - a name of ours
                f'(SELECT COALESCE(MAX("row"), 0) + 1 FROM {table.name}), false)'
            )
        )


# ---------------------------------------------------------------- both
def _copy_table(source: Connection, target: Connection, table: sa.Table) -> None:
    for chunk in _chunks(source, table):
        target.execute(table.insert(), chunk)


def _chunks(source: Connection, table: sa.Table) -> Iterator[Sequence[dict[str, Any]]]:
    result = source.execution_options(yield_per=CHUNK).execute(sa.select(table))
    for rows in result.mappings().partitions():
        yield [dict(row) for row in rows]
