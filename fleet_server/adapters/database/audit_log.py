"""The audit log's table. Adds entries at the end of the chain, and nothing else.

The writers' lock (`dialect.writing`) makes the chain one line over all threads and processes.
"""

from collections.abc import Iterable, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.core.audit import BEGINNING, Act, Entry, Head, Result, follow


class DatabaseAuditLog:
    """`ports.AuditLog`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def append(self, acts: Sequence[Act]) -> None:
        with dialect.writing(self._engine) as connection:
            append(connection, acts)

    def entries(self, *, after: int, limit: int) -> Sequence[Entry]:
        audit = tables.audit
        query = sa.select(audit).where(audit.c.sequence > after).order_by(audit.c.sequence).limit(limit)
        return self._read(query)

    def newest(self, *, before: int | None, limit: int, who: str | None, action: str | None) -> Sequence[Entry]:
        audit = tables.audit
        query = sa.select(audit).order_by(audit.c.sequence.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.sequence < before)
        if who is not None:
            query = query.where(audit.c.who == who)
        if action is not None:
            query = query.where(audit.c.action == action)
        return self._read(query)

    def _read(self, query: sa.Select[tuple[object, ...]]) -> Sequence[Entry]:
        with self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query)]


def append(connection: Connection, acts: Iterable[Act]) -> None:
    """Add acts in a write transaction that is open, so that they are there if and only if the rest of it is."""
    head = _head(connection)
    for act in acts:
        entry = follow(head, act)
        connection.execute(tables.audit.insert(), _row(entry))
        head = Head(sequence=entry.sequence, digest=entry.digest)


def _head(connection: Connection) -> Head:
    audit = tables.audit
    query = sa.select(audit.c.sequence, audit.c.digest).order_by(audit.c.sequence.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return BEGINNING if row is None else Head(sequence=row.sequence, digest=row.digest)


def _row(entry: Entry) -> dict[str, object]:
    act = entry.act
    return {
        "sequence": entry.sequence,
        "at": act.at,
        "who": act.who,
        "by": act.by,
        "address": act.address,
        "action": act.action,
        "about": act.about,
        "result": act.result.value,
        "detail": act.detail,
        "previous": entry.previous,
        "digest": entry.digest,
    }


def _entry(row: sa.Row[tuple[object, ...]]) -> Entry:
    facts = row._mapping  # noqa: SLF001 - SQLAlchemy's public name
    act = Act(
        at=facts["at"],
        who=facts["who"],
        by=facts["by"],
        address=facts["address"],
        action=facts["action"],
        about=facts["about"],
        result=Result(facts["result"]),
        detail=facts["detail"],
    )
    return Entry(sequence=facts["sequence"], act=act, previous=facts["previous"], digest=facts["digest"])
