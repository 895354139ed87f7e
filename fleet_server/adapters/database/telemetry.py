"""Writes what devices report: one transaction per batch, everything once, and the acknowledgements that follow.

A report counts as new when its number has not arrived in its stream *and* its row is new. Only then do its
statistics, readings and truth count, so a batch may come twice, or in another order, and the sums are the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.adapters.database.records import (
    Standing,
    event_row,
    from_json,
    standing_of,
    standing_row,
    to_json,
)
from fleet_server.core.positions import Position, arrived
from fleet_server.core.presence import hear, interval_of
from fleet_server.core.series import MINUTE
from fleet_server.ports import Batch
from protocol.messages import Acknowledgement, Birth, DeviceState, Event, Report, Will
from protocol.statistics import (
    ConfusionCell,
    ModelStatistics,
    TruthStatistics,
    merge_by_digest,
    merge_confusion,
)

TELEMETRY, EVENTS = "telemetry", "events"
MAX_DEAD_LETTERS = 10_000  # newest kept; a broken device must not fill the disk
MAX_DEAD_PAYLOAD = 4096  # bytes
MAX_DEAD_TEXT = 500  # characters

Stream = tuple[str, str, str]  # device, spool, stream
TruthKey = tuple[str, str, int]  # device, digest, minute
Row = dict[str, Any]


class DatabaseTelemetry:
    """`ports.Telemetry`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def store(self, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
        """Raise `StoreUnavailable`; then nothing was written."""
        with dialect.writing(self._engine) as connection:
            return _write(connection, batch)

    def forget(self, *, before: int) -> int:
        """Delete reports received, and truth of predictions made, before a time; return how many reports."""
        report, truth = tables.report, tables.truth
        with dialect.writing(self._engine) as connection:
            connection.execute(truth.delete().where(truth.c.minute < before))
            return connection.execute(report.delete().where(report.c.received_at < before)).rowcount


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What the database held of the devices in a batch, brought up to date as the batch is read."""

    positions: dict[Stream, Position] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)

    def take(self, stream: Stream, first: int, last: int) -> bool:
        """Note that numbers have arrived; say whether the last of them is new."""
        position = self.positions.get(stream, Position())
        if position.has(last):
            return False
        self.positions[stream] = arrived(position, first, last)
        return True

    def change(self, device: str, **changes: object) -> None:
        """Note something about a device."""
        before = self.standings.get(device, Standing())
        self.standings[device] = msgspec.structs.replace(before, **changes)


def _write(connection: Connection, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
    known = _load(connection, batch)
    _write_reports(connection, batch, known)
    _write_events(connection, batch, known)
    for device, state in batch.states:
        _note_state(known, device, state, batch.received_at)
    _write_dead_letters(connection, batch)
    _save(connection, batch, known)
    return [
        (device, _acknowledge(known, device, spool, batch.received_at)) for device, spool in _touched(batch, known)
    ]


# ---------------------------------------------------------------- what is known
def _load(connection: Connection, batch: Batch) -> _Known:
    position, presence = tables.position, tables.presence
    spools = sorted({*_spools(batch.reports), *_spools(batch.events), *_birth_spools(batch)})
    devices = sorted({device for device, _ in (*batch.reports, *batch.events, *batch.states)})
    found = dialect.rows_with(connection, position, (position.c.device, position.c.spool), spools)
    seen = dialect.rows_with(connection, presence, (presence.c.device,), [(device,) for device in devices])
    return _Known(
        positions={(row.device, row.spool, row.stream): from_json(row.position_json, Position) for row in found},
        standings={row.device: standing_of(row) for row in seen},
    )


def _save(connection: Connection, batch: Batch, known: _Known) -> None:
    touched = {*_spools(batch.reports), *_spools(batch.events)}
    positions = [
        {
            "device": device,
            "spool": spool,
            "stream": stream,
            "position_json": to_json(position),
            "missing": position.count_missing(),
            "seen_at": batch.received_at,
        }
        for (device, spool, stream), position in sorted(known.positions.items())
        if (device, spool) in touched
    ]
    dialect.put(connection, tables.position, positions)
    dialect.put(connection, tables.presence, [standing_row(*item) for item in sorted(known.standings.items())])


def _spools(items: Iterable[tuple[str, Report]] | Iterable[tuple[str, Event]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((device, item.spool) for device, item in items))


def _birth_spools(batch: Batch) -> list[tuple[str, str]]:
    return [(device, state.spool) for device, state in batch.states if isinstance(state, Birth) and state.spool]


def _touched(batch: Batch, known: _Known) -> list[tuple[str, str]]:
    """Return whom to acknowledge: who sent something, and who came back and may have missed an answer."""
    waiting = [
        (device, spool)
        for device, spool in _birth_spools(batch)
        if any((device, spool, stream) in known.positions for stream in (TELEMETRY, EVENTS))
    ]
    return list(dict.fromkeys([*_spools(batch.reports), *_spools(batch.events), *waiting]))


def _acknowledge(known: _Known, device: str, spool: str, at: int) -> Acknowledgement:
    telemetry, missing_telemetry = known.positions.get((device, spool, TELEMETRY), Position()).told()
    events, missing_events = known.positions.get((device, spool, EVENTS), Position()).told()
    return Acknowledgement(
        spool=spool,
        at=at,
        telemetry=telemetry,
        events=events,
        missing_telemetry=missing_telemetry,
        missing_events=missing_events,
    )


# ---------------------------------------------------------------- states
def _note_state(known: _Known, device: str, state: DeviceState, at: int) -> None:
    standing = known.standings.get(device, Standing())
    known.change(device, connection=hear(standing.connection, state, at))
    if not isinstance(state, Will):  # a will is the broker's word, not the device's
        known.change(device, last_seen=at)


# ---------------------------------------------------------------- reports
def _write_reports(connection: Connection, batch: Batch, known: _Known) -> None:
    fresh: dict[tuple[str, str, int], Report] = {}
    for device, report in batch.reports:
        known.change(device, last_seen=batch.received_at)
        if known.take((device, report.spool, TELEMETRY), report.sequence - report.covers + 1, report.sequence):
            fresh[device, report.spool, report.sequence] = report
    rows = [_report_row(device, report, batch.received_at) for (device, _, _), report in fresh.items()]
    new = dialect.insert_new(connection, tables.report, rows)
    stored = [(key[0], report) for key, report in fresh.items() if key in new]
    _write_windows(connection, stored)
    _add_truth(connection, stored)
    for device, report in stored:
        _note_report(known, device, report)


def _report_row(device: str, report: Report, received_at: int) -> Row:
    return {
        "device": device,
        "spool": report.spool,
        "sequence": report.sequence,
        "covers": report.covers,
        "dropped": report.dropped,
        "received_at": received_at,
    }


def _write_windows(connection: Connection, stored: Sequence[tuple[str, Report]]) -> None:
    statistics: list[Row] = []
    resources: list[Row] = []
    for device, report in stored:
        for position, window in enumerate(report.windows):
            place = {
                "device": device,
                "spool": report.spool,
                "sequence": report.sequence,
                "position": position,
                "start": window.start,
                "span": window.span,
            }
            statistics += [{**place, **_counts(model)} for model in merge_by_digest(window.models)]
            if window.resources is not None:
                resources.append({**place, "resources_json": to_json(window.resources)})
    dialect.insert_new(connection, tables.statistics, statistics)
    dialect.insert_new(connection, tables.resources, resources)


def _counts(model: ModelStatistics) -> Row:
    return {
        "digest": model.digest,
        "requests": model.requests,
        "errors": model.errors,
        "dropped": model.dropped,
        "late": model.late,
        "shed": model.shed,
        "latency_json": to_json(model.latency),
        "confidence_json": to_json(model.confidence),
        "classes_json": to_json(model.classes),
    }


def _note_report(known: _Known, device: str, report: Report) -> None:
    """Keep the newest readings, the rhythm, and the count."""
    standing = known.standings[device]
    known.change(
        device, reports=standing.reports + 1, report_interval=interval_of(report) or standing.report_interval
    )
    for window in report.windows:
        if window.resources is not None and window.start >= known.standings[device].resources_at:
            known.change(device, resources_json=to_json(window.resources), resources_at=window.start)


# ---------------------------------------------------------------- truth
def _add_truth(connection: Connection, stored: Sequence[tuple[str, Report]]) -> None:
    added: dict[TruthKey, list[ConfusionCell]] = {}
    for device, report in stored:
        for truth in report.truth:
            added.setdefault((device, truth.digest, _minute_of(truth)), []).extend(truth.confusion)
    table = tables.truth
    before = dialect.rows_with(connection, table, (table.c.device, table.c.digest, table.c.minute), list(added))
    for row in before:
        added[row.device, row.digest, row.minute] += from_json(row.confusion_json, tuple[ConfusionCell, ...])
    dialect.put(connection, table, [_truth_row(key, merge_confusion(cells)) for key, cells in added.items()])


def _truth_row(key: TruthKey, cells: Sequence[ConfusionCell]) -> Row:
    device, digest, minute = key
    return {
        "device": device,
        "digest": digest,
        "minute": minute,
        "correct": sum(n for true, predicted, n in cells if true == predicted),
        "total": sum(n for _, _, n in cells),
        "confusion_json": to_json(cells),
    }


def _minute_of(truth: TruthStatistics) -> int:
    return truth.minute - truth.minute % MINUTE


# ---------------------------------------------------------------- events and dead letters
def _write_events(connection: Connection, batch: Batch, known: _Known) -> None:
    rows = []
    for device, event in batch.events:
        known.change(device, last_seen=batch.received_at)
        if known.take((device, event.spool, EVENTS), event.sequence, event.sequence):
            rows.append(event_row(device, event, batch.received_at))
    dialect.insert_new(connection, tables.event, rows)


def _write_dead_letters(connection: Connection, batch: Batch) -> None:
    if not batch.dead_letters:
        return
    rows = [
        {
            "topic": _clean(topic),
            "payload": payload[:MAX_DEAD_PAYLOAD],
            "reason": _clean(reason),
            "received_at": batch.received_at,
        }
        for topic, payload, reason in batch.dead_letters
    ]
    dead = tables.dead_letter
    connection.execute(dead.insert(), rows)
    newest = connection.scalar(sa.select(sa.func.max(dead.c.row))) or 0
    connection.execute(dead.delete().where(dead.c.row <= newest - MAX_DEAD_LETTERS))


def _clean(text: str) -> str:
    """Keep what every database can hold: no NUL, no lone surrogates, not too long."""
    return text.replace("\x00", "\ufffd").encode(errors="replace").decode()[:MAX_DEAD_TEXT]
