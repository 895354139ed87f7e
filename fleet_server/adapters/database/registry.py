"""Devices, tokens, bundles, and what each device should run: the parts of the database that people change."""

import hashlib
import hmac
from collections.abc import Callable, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.adapters.database.records import (
    bundle_of,
    bundle_row,
    desire_of,
    desire_row,
    device_of,
    from_json,
    standing_of,
    to_json,
)
from fleet_server.core.presence import state_of
from fleet_server.enrolment import DeviceExists, TokenRefused
from fleet_server.ports import (
    DeploymentRecord,
    Device,
    Presence,
    PublishedBundle,
    SignedDesire,
    TokenRecord,
)
from protocol.states import DeploymentState, EventKind


class StaleDesire(ValueError):
    """A desired state is not newer than the stored one. Two were signed at the same time; sign again."""


class DatabaseRegistry:
    """`ports.Registry`. ``clock`` gives UTC ms; presence depends on it."""

    def __init__(self, engine: Engine, *, clock: Callable[[], int]) -> None:
        self._engine = engine
        self._clock = clock

    def add_token(self, token: TokenRecord) -> None:
        row = {
            "id": token.id,
            "secret_sha256": token.secret_sha256,
            "labels_json": to_json(token.labels),
            "uses_left": token.uses_left,
            "expires_at": token.expires_at,
        }
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.token.insert(), row)

    def redeem_token(self, token_id: str, secret_sha256: str, now: int) -> TokenRecord:
        with dialect.writing(self._engine) as connection:
            token = _verified_token(connection, token_id, secret_sha256, now)
            if token.uses_left < 1:
                raise TokenRefused("the token is used up")
            connection.execute(
                tables.token.update().where(tables.token.c.id == token_id).values(uses_left=token.uses_left - 1)
            )
        return token

    def check_token(self, token_id: str, secret_sha256: str, now: int) -> None:
        with self._engine.connect() as connection:
            _verified_token(connection, token_id, secret_sha256, now)

    def add_device(self, device: Device) -> None:
        row = {
            "id": device.id,
            "labels_json": to_json(device.labels),
            "certificate": device.certificate,
            "enrolled_at": device.enrolled_at,
            "revoked": device.revoked,
        }
        with dialect.writing(self._engine) as connection:
            if not dialect.insert_new(connection, tables.device, [row]):
                raise DeviceExists(device.id)

    def replace_device(self, device: Device, now: int) -> None:
        with dialect.writing(self._engine) as connection:
            known = _device(connection, device.id)
            if known is None or known.open_until <= now:
                raise DeviceExists(device.id)
            _retire(connection, known, now, known.certificate, known.next_certificate)
            _change(
                connection,
                device.id,
                labels_json=to_json(device.labels),
                certificate=device.certificate,
                next_certificate="",
                enrolled_at=device.enrolled_at,
                revoked=False,
                open_until=0,
            )

    def offer_certificate(self, device_id: str, certificate: str, now: int) -> None:
        with dialect.writing(self._engine) as connection:
            known = _device(connection, device_id)
            if known is not None:
                _retire(connection, known, now, known.next_certificate)
                _change(connection, device_id, next_certificate=certificate)

    def promote(self, device_id: str, certificate: str, now: int) -> None:
        with dialect.writing(self._engine) as connection:
            known = _device(connection, device_id)
            if known is not None and known.next_certificate == certificate:
                _retire(connection, known, now, known.certificate)
                _change(connection, device_id, certificate=certificate, next_certificate="")

    def revoke(self, device_id: str, now: int) -> None:
        with dialect.writing(self._engine) as connection:
            known = _device(connection, device_id)
            if known is not None:
                _retire(connection, known, now, known.certificate, known.next_certificate)
                _change(connection, device_id, revoked=True, open_until=0)

    def reopen(self, device_id: str, until: int) -> None:
        with dialect.writing(self._engine) as connection:
            _change(connection, device_id, open_until=until)

    def retired(self) -> Sequence[str]:
        query = sa.select(tables.retired_certificate.c.certificate).order_by("sha256")
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def forget_retired(self, certificates: Sequence[str]) -> None:
        with dialect.writing(self._engine) as connection:
            for certificate in certificates:
                gone = tables.retired_certificate.c.sha256 == _sha256(certificate)
                connection.execute(tables.retired_certificate.delete().where(gone))

    def device(self, device_id: str) -> Device | None:
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(tables.device).where(tables.device.c.id == device_id)).one_or_none()
        return None if row is None else device_of(row)

    def devices(self) -> Sequence[Device]:
        with self._engine.connect() as connection:
            return [device_of(row) for row in connection.execute(sa.select(tables.device).order_by("id"))]

    def presence(self, device_id: str) -> Presence:
        device, presence = tables.device, tables.presence
        with self._engine.connect() as connection:
            revoked = connection.scalar(sa.select(device.c.revoked).where(device.c.id == device_id))
            row = connection.execute(sa.select(presence).where(presence.c.device == device_id)).one_or_none()
        standing = standing_of(row)
        known = standing.connection
        return Presence(
            device=device_id,
            birth=known.birth,
            connected=known.connected,
            said_goodbye=known.goodbye and not known.connected,
            last_seen=standing.last_seen,
            state=state_of(
                known,
                last_seen=standing.last_seen,
                now=self._clock(),
                interval=standing.report_interval,
                revoked=bool(revoked),
            ),
        )


class DatabaseReleases:
    """`ports.Releases`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_bundles(self, bundles: Sequence[PublishedBundle]) -> None:
        with dialect.writing(self._engine) as connection:
            dialect.insert_new(connection, tables.bundle, [bundle_row(bundle) for bundle in bundles])

    def bundles(self, model: str | None = None) -> Sequence[PublishedBundle]:
        bundle = tables.bundle
        query = sa.select(bundle).order_by(bundle.c.model, bundle.c.version, bundle.c.path)
        if model is not None:
            query = query.where(bundle.c.model == model)
        with self._engine.connect() as connection:
            return [bundle_of(row) for row in connection.execute(query)]


class DatabaseDesiredStates:
    """`ports.DesiredStates`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def desired(self, device_id: str) -> SignedDesire | None:
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(tables.desired).where(tables.desired.c.device == device_id)
            ).one_or_none()
        return None if row is None else desire_of(row)

    def save_desired(self, desire: SignedDesire) -> None:
        with dialect.writing(self._engine) as connection:
            _put_newer(connection, desire)
            _remember_attempts(connection, desire)

    def expiring(self, before: int) -> Sequence[SignedDesire]:
        query = sa.select(tables.desired).where(tables.desired.c.expires_at < before)
        with self._engine.connect() as connection:
            return [desire_of(row) for row in connection.execute(query.order_by(tables.desired.c.expires_at))]

    def add_deployment(self, deployment: DeploymentRecord) -> None:
        row = {
            "id": deployment.id,
            "kind": deployment.kind,
            "model": deployment.model,
            "by": deployment.by,
            "at": deployment.at,
            "targets_json": to_json(deployment.targets),
        }
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.deployment.insert(), row)

    def deployment(self, deployment_id: str) -> DeploymentRecord | None:
        """Return an order that was given."""
        query = sa.select(tables.deployment).where(tables.deployment.c.id == deployment_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        targets = from_json(row.targets_json, dict[str, int])
        return DeploymentRecord(id=row.id, kind=row.kind, model=row.model, by=row.by, at=row.at, targets=targets)

    def committed_versions(self, device_id: str, model: str) -> Sequence[int]:
        event = tables.event
        query = (
            sa.select(event.c.spool, event.c.sequence, event.c.version, event.c.row)
            .where(event.c.device == device_id, event.c.model == model)
            .where(event.c.kind == EventKind.DEPLOYMENT.value, event.c.state == DeploymentState.COMMITTED.value)
            .where(event.c.version.is_not(None))
            .order_by(event.c.row)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        # Events of one spool may arrive out of order, and the device's clock may be wrong: their numbers decide.
        spools = list(dict.fromkeys(row.spool for row in rows))
        return [row.version for row in sorted(rows, key=lambda row: (spools.index(row.spool), row.sequence))]

    def highest_attempt(self, device_id: str, sha256: str) -> int:
        attempt = tables.attempt
        query = sa.select(attempt.c.attempt).where(attempt.c.device == device_id, attempt.c.sha256 == sha256)
        with self._engine.connect() as connection:
            return connection.scalar(query) or 0


def _verified_token(connection: Connection, token_id: str, secret_sha256: str, now: int) -> TokenRecord:
    token = _token(connection, token_id)
    if token is None or not hmac.compare_digest(token.secret_sha256, secret_sha256):
        raise TokenRefused("the token is unknown")
    if token.expires_at <= now:
        raise TokenRefused("the token has expired")
    return token


def _device(connection: Connection, device_id: str) -> Device | None:
    query = sa.select(tables.device).where(tables.device.c.id == device_id).with_for_update()
    row = connection.execute(query).one_or_none()
    return None if row is None else device_of(row)


def _change(connection: Connection, device_id: str, **values: object) -> None:
    connection.execute(tables.device.update().where(tables.device.c.id == device_id).values(**values))


def _retire(connection: Connection, device: Device, now: int, *certificates: str) -> None:
    """Note certificates that count no more; those noted before stay as they are."""
    rows = [
        {"sha256": _sha256(certificate), "device": device.id, "certificate": certificate, "retired_at": now}
        for certificate in certificates
        if certificate
    ]
    dialect.insert_new(connection, tables.retired_certificate, rows)


def _sha256(certificate: str) -> str:
    return hashlib.sha256(certificate.encode()).hexdigest()


def _token(connection: Connection, token_id: str) -> TokenRecord | None:
    row = connection.execute(
        sa.select(tables.token).where(tables.token.c.id == token_id).with_for_update()
    ).one_or_none()
    if row is None:
        return None
    return TokenRecord(
        id=row.id,
        secret_sha256=row.secret_sha256,
        labels=from_json(row.labels_json, dict[str, str]),
        uses_left=row.uses_left,
        expires_at=row.expires_at,
    )


def _put_newer(connection: Connection, desire: SignedDesire) -> None:
    stored = connection.scalar(sa.select(tables.desired.c.version).where(tables.desired.c.device == desire.device))
    if stored is not None and stored >= desire.version:
        raise StaleDesire(f"version {desire.version} for {desire.device} is not above the stored {stored}")
    dialect.put(connection, tables.desired, [desire_row(desire)])


def _remember_attempts(connection: Connection, desire: SignedDesire) -> None:
    attempt = tables.attempt
    query = sa.select(attempt.c.sha256, attempt.c.attempt).where(attempt.c.device == desire.device)
    highest = {row.sha256: row.attempt for row in connection.execute(query)}
    for assigned in desire.assigned:
        known = highest.get(assigned.bundle.sha256, 0)
        highest[assigned.bundle.sha256] = max(known, assigned.assignment.attempt)
    rows = [
        {"device": desire.device, "sha256": assigned.bundle.sha256, "attempt": highest[assigned.bundle.sha256]}
        for assigned in desire.assigned
    ]
    dialect.put(connection, attempt, rows)
