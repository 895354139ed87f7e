"""Where SQLite and PostgreSQL differ. The only place that knows which one it is.

Everything else of this package is SQLAlchemy Core that both understand.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from fleet_server.ingest import StoreUnavailable

Insert = sqlite.Insert | postgresql.Insert

BUSY_TIMEOUT = 5.0  # seconds a writer waits for another process; then the caller tries again
_WRITER_LOCK = 0x45_57_44_42  # "EWDB": number of the PostgreSQL advisory lock
_BIND_CHUNK = 500  # keys in one IN (…): SQLite takes at most 32,766 parameters, old builds 999


def connect(url: str) -> Engine:
    """Return an engine; on SQLite with WAL, foreign keys and real transactions."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(parsed, pool_size=10, max_overflow=30, pool_pre_ping=True)
    engine = sa.create_engine(
        parsed, pool_size=10, max_overflow=30, connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False}
    )
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a write transaction, one at a time over all threads and processes.

    SQLite would otherwise fail half-way when a read turns into a write; on PostgreSQL two ingest workers could add
    to the same truth row. Batches make one writer enough. Raises `StoreUnavailable` when the database is locked,
    full or gone: then nothing was written.
    """
    try:
        with engine.connect().execution_options(ew_writes=True) as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER_LOCK)))
            yield connection
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
        raise StoreUnavailable(str(error.__cause__ or error)) from error


def insert(connection: Connection, table: sa.Table) -> Insert:
    """Return an INSERT that knows ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def insert_new(connection: Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Insert rows; those whose key is taken change nothing. Return the primary keys of what was new."""
    if not rows:
        return set()
    statement = insert(connection, table).on_conflict_do_nothing().returning(*table.primary_key)
    return {tuple(row) for row in connection.execute(statement, rows)}


def put(connection: Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows, or overwrite those with the same primary key."""
    if rows:
        statement = insert(connection, table)
        keys = [column.name for column in table.primary_key]
        new = {name: statement.excluded[name] for name in rows[0] if name not in keys}
        connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=new), rows)


def rows_with(
    connection: Connection, table: sa.Table, columns: Sequence[sa.Column[Any]], keys: Sequence[tuple[Any, ...]]
) -> list[sa.Row[Any]]:
    """Return the rows whose columns equal one of the keys."""
    found: list[sa.Row[Any]] = []
    for at in range(0, len(keys), _BIND_CHUNK // len(columns)):
        chunk = keys[at : at + _BIND_CHUNK // len(columns)]
        found += connection.execute(sa.select(table).where(sa.tuple_(*columns).in_(chunk))).all()
    return found


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, else reads and DDL run outside of transactions
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("ew_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
