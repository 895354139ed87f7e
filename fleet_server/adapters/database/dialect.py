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
CONNECT_TIMEOUT = 10  # seconds until a PostgreSQL that does not answer counts as gone
WRITER_LOCK = 0x45_57_44_42  # "EWDB": number of the PostgreSQL advisory lock
_BIND_CHUNK = 500  # keys in one IN (…): SQLite takes at most 32,766 parameters, old builds 999


class BadDatabase(Exception):
    """The database that the settings name cannot be used; the operator must mend it."""


def connect(url: str) -> Engine:
    """Return an engine; on SQLite with WAL, foreign keys and real transactions. Raises `BadDatabase`."""
    parsed = _understood(url)
    if parsed.get_backend_name() == "postgresql":
        return _connect_postgresql(parsed)
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
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITER_LOCK)))
            yield connection
    except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
        raise StoreUnavailable(str(error.__cause__ or error)) from error
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise StoreUnavailable(str(error.__cause__ or error)) from error
        raise


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that sees one moment, however many queries it asks."""
    level = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    with engine.connect().execution_options(**level) as connection:
        yield connection


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
    for chunk in chunks(keys, columns=len(columns)):
        found += connection.execute(sa.select(table).where(sa.tuple_(*columns).in_(chunk))).all()
    return found


def chunks(keys: Sequence[tuple[Any, ...]], *, columns: int) -> Iterator[Sequence[tuple[Any, ...]]]:
    """Cut keys of so many columns into what one statement can take."""
    size = _BIND_CHUNK // columns
    for at in range(0, len(keys), size):
        yield keys[at : at + size]


def _understood(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise BadDatabase("database: this is not a URL like postgresql://user@host/name") from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise BadDatabase(f"database: {parsed.get_backend_name()} is not known; use sqlite or postgresql")
    return parsed


def _connect_postgresql(url: sa.URL) -> Engine:
    options = {"connect_timeout": str(CONNECT_TIMEOUT), "application_name": "edgewarden-server"}
    named = url.set(drivername="postgresql+psycopg").update_query_dict({**options, **url.query})
    try:
        return sa.create_engine(named, pool_size=10, max_overflow=30, pool_pre_ping=True)
    except ImportError as error:
        raise BadDatabase(
            "database: PostgreSQL needs the extra 'postgresql': pip install 'edgewarden[server,postgresql]'"
        ) from error


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, else reads and DDL run outside of transactions
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("ew_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
