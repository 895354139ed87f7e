"""Rows to facts and back: the one place where stored JSON is encoded and decoded."""

from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa

from fleet_server.core.presence import DEFAULT_INTERVAL, Connection
from fleet_server.ports import Assigned, Device, PublishedBundle, SignedDesire, StoredEvent
from protocol.messages import Birth, Event
from protocol.release import DeviceConfig
from protocol.states import DeploymentState, EventKind, RejectReason

T = TypeVar("T")


def to_json(fact: object) -> str:
    """Encode a typed fact."""
    return msgspec.json.encode(fact).decode()


def from_json(text: str, type_: type[T]) -> T:
    """Decode what `to_json` made."""
    return msgspec.json.decode(text, type=type_)


def device_of(row: sa.Row[Any]) -> Device:
    """Return the device of a row of ``device``."""
    return Device(
        id=row.id,
        labels=from_json(row.labels_json, dict[str, str]),
        certificate=row.certificate,
        enrolled_at=row.enrolled_at,
        revoked=row.revoked,
        next_certificate=row.next_certificate,
        open_until=row.open_until,
    )


def bundle_of(row: sa.Row[Any]) -> PublishedBundle:
    """Return the bundle of a row of ``bundle``."""
    return from_json(row.bundle_json, PublishedBundle)


def bundle_row(bundle: PublishedBundle) -> dict[str, Any]:
    """Return the row of a bundle."""
    return {
        "path": bundle.path,
        "sha256": bundle.sha256,
        "length": bundle.length,
        "model": bundle.release.model,
        "version": bundle.release.version,
        "bundle_json": to_json(bundle),
        "published_at": bundle.published_at,
    }


def desire_of(row: sa.Row[Any]) -> SignedDesire:
    """Return the desire of a row of ``desired``."""
    return SignedDesire(
        device=row.device,
        version=row.version,
        assigned=from_json(row.assigned_json, tuple[Assigned, ...]),
        config=from_json(row.config_json, DeviceConfig),
        timestamp=row.timestamp,
        snapshot=row.snapshot,
        targets=row.targets,
        issued_at=row.issued_at,
        expires_at=row.expires_at,
    )


def desire_row(desire: SignedDesire) -> dict[str, Any]:
    """Return the row of a desire."""
    return {
        "device": desire.device,
        "version": desire.version,
        "assigned_json": to_json(desire.assigned),
        "config_json": to_json(desire.config),
        "timestamp": desire.timestamp,
        "snapshot": desire.snapshot,
        "targets": desire.targets,
        "issued_at": desire.issued_at,
        "expires_at": desire.expires_at,
    }


def event_of(row: sa.Row[Any]) -> StoredEvent:
    """Return the event of a row of ``event``."""
    event = Event(
        spool=row.spool,
        sequence=row.sequence,
        at=row.at,
        kind=EventKind(row.kind),
        model=row.model,
        version=row.version,
        digest=row.digest,
        state=DeploymentState(row.state) if row.state else None,
        reason=RejectReason(row.reason) if row.reason else None,
        attempt=row.attempt,
        detail=row.detail,
    )
    return StoredEvent(row=row.row, device=row.device, received_at=row.received_at, event=event)


def event_row(device: str, event: Event, received_at: int) -> dict[str, Any]:
    """Return the row of an event."""
    return {
        "device": device,
        "spool": event.spool,
        "sequence": event.sequence,
        "received_at": received_at,
        "at": event.at,
        "kind": event.kind.value,
        "model": event.model,
        "version": event.version,
        "digest": event.digest,
        "state": event.state.value if event.state else None,
        "reason": event.reason.value if event.reason else None,
        "attempt": event.attempt,
        "detail": event.detail,
    }


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """A row of ``presence``: the connection, when it was heard, and its newest readings."""

    connection: Connection = Connection()
    last_seen: int | None = None
    report_interval: int = DEFAULT_INTERVAL
    resources_json: str | None = None
    resources_at: int = 0
    reports: int = 0


def standing_of(row: sa.Row[Any] | None) -> Standing:
    """Return the standing of a row of ``presence``; a device that was never seen has none."""
    if row is None:
        return Standing()
    birth = from_json(row.birth_json, Birth) if row.birth_json else None
    return Standing(
        connection=Connection(birth=birth, ended=row.ended, goodbye=row.goodbye, ended_at=row.ended_at),
        last_seen=row.last_seen,
        report_interval=row.report_interval,
        resources_json=row.resources_json,
        resources_at=row.resources_at,
        reports=row.reports,
    )


def standing_row(device: str, standing: Standing) -> dict[str, Any]:
    """Return the row of a standing."""
    known = standing.connection
    return {
        "device": device,
        "birth_json": to_json(known.birth) if known.birth else None,
        "ended": known.ended,
        "goodbye": known.goodbye,
        "ended_at": known.ended_at,
        "last_seen": standing.last_seen,
        "report_interval": standing.report_interval,
        "resources_json": standing.resources_json,
        "resources_at": standing.resources_at,
        "reports": standing.reports,
    }
