"""Commands to devices. Their answers are written with the rest of what devices say (`telemetry.py`)."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.ports import CommandRecord
from protocol.commands import Command, decode_command, encode_command
from protocol.states import CommandOutcome, RejectReason

_TABLE = tables.command


class DatabaseCommands:
    """`ports.CommandStore`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, record: CommandRecord) -> None:
        command = record.command
        row = {
            "id": command.id,
            "device": command.device,
            "sequence": command.sequence,
            "by": record.by,
            "issued_at": command.issued,
            "expires_at": command.expires,
            "payload": encode_command(command),
            "detail": "",
        }
        with dialect.writing(self._engine) as connection:
            connection.execute(_TABLE.insert(), row)

    def newest(self, device_id: str, limit: int) -> Sequence[CommandRecord]:
        chosen = sa.select(_TABLE).where(_TABLE.c.device == device_id)
        with self._engine.connect() as connection:
            rows = connection.execute(chosen.order_by(_TABLE.c.sequence.desc()).limit(limit)).all()
        return [_record_of(row) for row in rows]

    def waiting(self, device_id: str | None, now: int) -> Sequence[Command]:
        chosen = sa.select(_TABLE).where(_TABLE.c.outcome.is_(None), _TABLE.c.expires_at > now)
        if device_id is not None:
            chosen = chosen.where(_TABLE.c.device == device_id)
        with self._engine.connect() as connection:
            rows = connection.execute(chosen.order_by(_TABLE.c.device, _TABLE.c.sequence)).all()
        return [decode_command(row.payload) for row in rows]

    def highest(self, device_id: str) -> int:
        chosen = sa.select(sa.func.max(_TABLE.c.sequence)).where(_TABLE.c.device == device_id)
        with self._engine.connect() as connection:
            return int(connection.scalar(chosen) or 0)


def _record_of(row: sa.Row[Any]) -> CommandRecord:
    return CommandRecord(
        command=decode_command(row.payload),
        by=row.by,
        outcome=CommandOutcome(row.outcome) if row.outcome else None,
        reason=RejectReason(row.reason) if row.reason else None,
        detail=row.detail,
        answered_at=row.answered_at,
    )
