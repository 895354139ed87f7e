"""Writes what devices report: one transaction per batch, everything once, and the acknowledgements that follow.

A report counts as new when its number has not arrived in its stream; its rows may have been dropped long ago. Only
then do its statistics, readings and truth count, so a batch may come twice, or in another order, and the sums are the
same. All writers of a database take turns (`dialect.writing`), so two batches cannot wait for each other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, partitions, tables
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
from fleet_server.core.rollups import DAY, QUARTER, bucket_of
from fleet_server.core.series import MINUTE
from fleet_server.ports import Batch, Stored
from protocol.messages import Acknowledgement, Birth, DeviceState, Event, Reply, Report, Will
from protocol.statistics import (
    ModelStatistics,
    TruthStatistics,
    merge_by_digest,
    merge_truth,
)

TELEMETRY, EVENTS, REPLIES = STREAMS = ("telemetry", "events", "replies")
MAX_DEAD_LETTERS = 10_000  # newest kept; a broken device must not fill the disk
MAX_DEAD_PAYLOAD = 4096  # bytes
MAX_DEAD_TEXT = 500  # characters

Stream = tuple[str, str, str]  # device, spool, stream
Row = dict[str, Any]


class DatabaseTelemetry:
    """`ports.Telemetry`."""

    def __init__(self, engine: Engine, *, on_stored: Callable[[Stored], None] = lambda _stored: None) -> None:
        """Take who counts: ``on_stored`` is called after each commit with what was new, and must not raise."""
        self._engine = engine
        self._on_stored = on_stored
        self._sliced: set[int] = set()  # days of arrival whose slices are known to exist

    def store(self, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
        """Raise `StoreUnavailable`; then nothing was written."""
        self._make_slices(bucket_of(batch.received_at, DAY))
        new = _New()
        with dialect.writing(self._engine) as connection:
            acknowledgements = _write(connection, batch, new)
        self._on_stored(new.told(batch))
        return acknowledgements

    def _make_slices(self, day: int) -> None:
        """Slices are made ahead by `retention.Retention`; a batch does not depend on it."""
        if day not in self._sliced:
            partitions.make(self._engine, first=day, last=day)
            self._sliced = {day}


@dataclass(frozen=True, kw_only=True)
class _New:
    """What of a batch was not there yet."""

    reports: list[Report] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def told(self, batch: Batch) -> Stored:
        """Return it for those who count."""
        again = len(batch.reports) + len(batch.events) - len(self.reports) - len(self.events)
        return Stored(reports=self.reports, events=self.events, again=again, received_at=batch.received_at)


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


def _write(connection: Connection, batch: Batch, new: _New) -> Sequence[tuple[str, Acknowledgement]]:
    known = _load(connection, batch)
    new.reports.extend(_write_reports(connection, batch, known))
    new.events.extend(_write_events(connection, batch, known))
    _write_replies(connection, batch, known)
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
    spools = sorted({*_sent(batch), *_birth_spools(batch)})
    devices = sorted({device for device, _ in (*batch.reports, *batch.events, *batch.replies, *batch.states)})
    found = dialect.rows_with(connection, position, (position.c.device, position.c.spool), spools)
    seen = dialect.rows_with(connection, presence, (presence.c.device,), [(device,) for device in devices])
    return _Known(
        positions={(row.device, row.spool, row.stream): from_json(row.position_json, Position) for row in found},
        standings={row.device: standing_of(row) for row in seen},
    )


def _save(connection: Connection, batch: Batch, known: _Known) -> None:
    touched = set(_sent(batch))
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


def _sent(batch: Batch) -> list[tuple[str, str]]:
    """Return the (device, spool) of everything numbered."""
    numbered: Iterable[tuple[str, Report | Event | Reply]] = (*batch.reports, *batch.events, *batch.replies)
    return list(dict.fromkeys((device, item.spool) for device, item in numbered))


def _birth_spools(batch: Batch) -> list[tuple[str, str]]:
    return [(device, state.spool) for device, state in batch.states if isinstance(state, Birth) and state.spool]


def _touched(batch: Batch, known: _Known) -> list[tuple[str, str]]:
    """Return whom to acknowledge: who sent something, and who came back and may have missed an answer."""
    waiting = [
        (device, spool)
        for device, spool in _birth_spools(batch)
        if any((device, spool, stream) in known.positions for stream in STREAMS)
    ]
    return list(dict.fromkeys([*_sent(batch), *waiting]))


def _acknowledge(known: _Known, device: str, spool: str, at: int) -> Acknowledgement:
    telemetry, missing_telemetry = known.positions.get((device, spool, TELEMETRY), Position()).told()
    events, missing_events = known.positions.get((device, spool, EVENTS), Position()).told()
    replies, missing_replies = known.positions.get((device, spool, REPLIES), Position()).told()
    return Acknowledgement(
        spool=spool,
        at=at,
        telemetry=telemetry,
        events=events,
        missing_telemetry=missing_telemetry,
        missing_events=missing_events,
        replies=replies,
        missing_replies=missing_replies,
    )


# ---------------------------------------------------------------- states
def _note_state(known: _Known, device: str, state: DeviceState, at: int) -> None:
    standing = known.standings.get(device, Standing())
    known.change(device, connection=hear(standing.connection, state, at))
    if not isinstance(state, Will):  # a will is the broker's word, not the device's
        known.change(device, last_seen=at)


# ---------------------------------------------------------------- reports
def _write_reports(connection: Connection, batch: Batch, known: _Known) -> Sequence[Report]:
    fresh: dict[tuple[str, str, int], Report] = {}
    for device, report in batch.reports:
        known.change(device, last_seen=batch.received_at)
        if known.take((device, report.spool, TELEMETRY), report.sequence - report.covers + 1, report.sequence):
            fresh[device, report.spool, report.sequence] = report
    rows = [_report_row(device, report, batch.received_at) for (device, _, _), report in fresh.items()]
    dialect.insert_new(connection, tables.report, rows)
    stored = [(device, report) for (device, _, _), report in fresh.items()]
    _write_windows(connection, stored, batch.received_at)
    _write_truth(connection, stored, batch.received_at)
    _mark_dirty(connection, stored, batch.received_at)
    for device, report in stored:
        _note_report(known, device, report)
    return [report for _, report in stored]


def _report_row(device: str, report: Report, received_at: int) -> Row:
    return {
        "device": device,
        "spool": report.spool,
        "sequence": report.sequence,
        "covers": report.covers,
        "dropped": report.dropped,
        "received_at": received_at,
    }


def _write_windows(connection: Connection, stored: Sequence[tuple[str, Report]], received_at: int) -> None:
    statistics: list[Row] = []
    resources: list[Row] = []
    for device, report in stored:
        for position, window in enumerate(report.windows):
            place = {
                "received_at": received_at,
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
def _write_truth(connection: Connection, stored: Sequence[tuple[str, Report]], received_at: int) -> None:
    """Rows of a minute are added up when they are read: nothing is read here, so nothing can be added twice."""
    rows = [
        _truth_row(device, report, truth, received_at)
        for device, report in stored
        for truth in merge_truth(_dated(truth) for truth in report.truth)
    ]
    dialect.insert_new(connection, tables.truth, rows)


def _truth_row(device: str, report: Report, truth: TruthStatistics, received_at: int) -> Row:
    return {
        "received_at": received_at,
        "device": device,
        "spool": report.spool,
        "sequence": report.sequence,
        "digest": truth.digest,
        "minute": truth.minute,
        "correct": sum(n for true, predicted, n in truth.confusion if true == predicted),
        "total": sum(n for _, _, n in truth.confusion),
        "confusion_json": to_json(truth.confusion),
    }


def _dated(truth: TruthStatistics) -> TruthStatistics:
    return msgspec.structs.replace(truth, minute=bucket_of(truth.minute, MINUTE))


# ---------------------------------------------------------------- what is to be summed again
def _mark_dirty(connection: Connection, stored: Sequence[tuple[str, Report]], received_at: int) -> None:
    """Note every bucket that something was added to, in the transaction that added it."""
    arrived = bucket_of(received_at, DAY)
    keys = {
        (width, device, bucket_of(at, width))
        for device, report in stored
        for at in (*(w.start for w in report.windows if w.models), *(truth.minute for truth in report.truth))
        for width in (QUARTER, DAY)
    }
    rows = [
        {"width": width, "arrived": arrived, "device": device, "start": start}
        for width, device, start in sorted(keys)
    ]
    dialect.insert_new(connection, tables.dirty, rows)


# ---------------------------------------------------------------- events and dead letters
def _write_events(connection: Connection, batch: Batch, known: _Known) -> Sequence[Event]:
    fresh: list[tuple[str, Event]] = []
    for device, event in batch.events:
        known.change(device, last_seen=batch.received_at)
        if known.take((device, event.spool, EVENTS), event.sequence, event.sequence):
            fresh.append((device, event))
    dialect.insert_new(connection, tables.event, [event_row(*item, batch.received_at) for item in fresh])
    return [event for _, event in fresh]


def _write_replies(connection: Connection, batch: Batch, known: _Known) -> None:
    """Take the first answer to a command; others, and answers to what nobody asked, change nothing."""
    command = tables.command
    for device, reply in batch.replies:
        known.change(device, last_seen=batch.received_at)
        if known.take((device, reply.spool, REPLIES), reply.sequence, reply.sequence):
            asked = (command.c.id == reply.command, command.c.device == device, command.c.outcome.is_(None))
            connection.execute(command.update().where(*asked).values(_answer(reply, batch.received_at)))


def _answer(reply: Reply, received_at: int) -> Row:
    return {
        "outcome": reply.outcome.value,
        "reason": reply.reason.value if reply.reason else None,
        "detail": reply.detail,
        "answered_at": received_at,
    }


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
