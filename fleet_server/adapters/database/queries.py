"""What people ask of the database: the fleet, a device, versions, events, series. Reads only.

Each view of the whole fleet takes a fixed number of queries, however many devices there are. Figures are computed
from merged counts, never averaged. Windows are chosen by the device's clock, since that is what they are about.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.authority import facts_of
from fleet_server.adapters.database import dialect, sums, tables
from fleet_server.adapters.database.records import Standing as Seen
from fleet_server.adapters.database.records import bundle_of, device_of, event_of, from_json, standing_of
from fleet_server.adapters.database.telemetry import TELEMETRY
from fleet_server.api_types import DeviceView, EventView, ModelOnDevice, ModelVersion, SeriesPoint
from fleet_server.core.care import newest_sentence
from fleet_server.core.presence import state_of
from fleet_server.core.rollups import DAY, Kept, resolution_for
from fleet_server.core.running import models_now
from fleet_server.core.series import MINUTE, Judged, Measured, Summary, points, step_for, summarise
from fleet_server.ports import Assigned, CertificateFacts, Device, PublishedBundle, StoredEvent
from protocol.messages import Event, Resources, RunningModel
from protocol.metrics import proportion
from protocol.names import SHORT_DIGEST_LENGTH
from protocol.states import DeploymentState, EventKind
from protocol.statistics import Histogram

RECENT = 5 * MINUTE  # ms; what "now" means for accuracy and latency
MAX_EVENTS = 1000  # rows in one answer
_STEPS_REMEMBERED = 200  # newest deployment events per device that may follow its birth


class Queries:
    """The read side. ``clock`` gives UTC ms."""

    def __init__(self, engine: Engine, *, clock: Callable[[], int], kept: Kept | None = None) -> None:
        """``kept`` says how far back each resolution goes."""
        self._engine = engine
        self._clock = clock
        self._kept = kept or Kept()

    # ------------------------------------------------------------ counts
    def counts(self) -> tuple[int, int]:
        """Return how many reports were stored, and how many dead letters are kept."""
        with dialect.reading(self._engine) as connection:
            reports = connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(tables.presence.c.reports), 0)))
            dead = connection.scalar(sa.select(sa.func.count()).select_from(tables.dead_letter))
        return int(reports or 0), int(dead or 0)

    # ------------------------------------------------------------ devices
    def devices(self) -> tuple[DeviceView, ...]:
        """Return all devices by id."""
        with dialect.reading(self._engine) as connection:
            rows = connection.execute(sa.select(tables.device).order_by(tables.device.c.id))
            devices = [device_of(row) for row in rows]
            fleet = _load_fleet(connection, self._clock(), None)
        return tuple(_view(device, fleet, self._clock()) for device in devices)

    def device(self, device_id: str) -> DeviceView | None:
        """Return one device."""
        with dialect.reading(self._engine) as connection:
            row = connection.execute(sa.select(tables.device).where(tables.device.c.id == device_id)).one_or_none()
            if row is None:
                return None
            fleet = _load_fleet(connection, self._clock(), device_id)
            steps = _newest_steps(connection, device_id)
        return _with_sentences(_view(device_of(row), fleet, self._clock()), steps)

    # ------------------------------------------------------------ models
    def model_versions(self) -> tuple[ModelVersion, ...]:
        """Return every published variant, newest version first within a model."""
        with dialect.reading(self._engine) as connection:
            bundles = _bundles(connection)
            judged = _judged_by_digest(connection)
            serving = _serving(connection)
        versions = [_model_version(bundle, judged, serving) for bundle in bundles]
        return tuple(sorted(versions, key=lambda v: (v.model, -v.version, v.variant)))

    # ------------------------------------------------------------ events
    def events(
        self, *, device: str | None = None, after: int | None = None, limit: int = 50
    ) -> tuple[EventView, ...]:
        """Return the newest events, newest first; with ``after`` the oldest of those that came after a row."""
        event = tables.event
        query = sa.select(event).limit(min(limit, MAX_EVENTS))
        if device is not None:
            query = query.where(event.c.device == device)
        if after is None:
            query = query.order_by(event.c.row.desc())
        else:
            query = query.where(event.c.row > after).order_by(event.c.row)
        with dialect.reading(self._engine) as connection:
            rows = connection.execute(query).all()
        views = [_event_view(event_of(row)) for row in rows]
        return tuple(sorted(views, key=lambda view: -view.row))

    # ------------------------------------------------------------ series
    def series(self, device_id: str, model: str, *, span: int, most: int = 120) -> tuple[SeriesPoint, ...]:
        """Return at most ``most`` steps over the last ``span`` ms, oldest first."""
        since = self._clock() - span
        width = resolution_for(span, most=most, kept=self._kept)
        with dialect.reading(self._engine) as connection:
            versions = {_short(b): b.release.version for b in _bundles(connection) if b.release.model == model}
            asked = _Asked(connection=connection, device=device_id, since=since, width=width)
            measured = _measured(asked, versions)
            judged = _judged(asked, versions)
        longest = max((window.span for window in measured), default=width or MINUTE)
        step = step_for(span, window=max(1000, longest), most=most)
        return tuple(
            SeriesPoint(
                start=point.start,
                span=point.span,
                version=point.version,
                requests=point.summary.requests,
                errors=point.summary.errors,
                dropped=point.summary.dropped,
                late=point.summary.late,
                shed=point.summary.shed,
                p50_us=point.summary.p50_us,
                p95_us=point.summary.p95_us,
                accuracy=point.summary.accuracy,
            )
            for point in points(measured, judged, step=step)
        )


@dataclass(frozen=True, kw_only=True)
class _Fleet:
    """What was read to make views of devices."""

    seen: Mapping[str, Seen]
    wanted: Mapping[str, tuple[int, tuple[Assigned, ...]]]
    steps: Mapping[str, Sequence[Event]]
    missing: Mapping[str, int]
    recent: Mapping[tuple[str, str], Summary]  # device, short digest
    bundles: Mapping[str, PublishedBundle] = field(default_factory=dict)  # by short digest


def _load_fleet(connection: Connection, now: int, device: str | None) -> _Fleet:
    seen = {row.device: standing_of(row) for row in _of(connection, tables.presence, device)}
    return _Fleet(
        seen=seen,
        wanted={
            row.device: (row.version, from_json(row.assigned_json, tuple[Assigned, ...]))
            for row in _of(connection, tables.desired, device)
        },
        steps=_steps_since_birth(connection, seen, device),
        missing=_missing(connection, seen, device),
        recent=_recent(connection, now - RECENT, device),
        bundles={_short(bundle): bundle for bundle in _bundles(connection)},
    )


def _of(connection: Connection, table: sa.Table, device: str | None) -> Sequence[sa.Row[Any]]:
    query = sa.select(table)
    return connection.execute(query if device is None else query.where(table.c.device == device)).all()


def _steps_since_birth(
    connection: Connection, seen: Mapping[str, Seen], device: str | None
) -> Mapping[str, Sequence[Event]]:
    """Return each device's deployment events since its birth, in order of happening."""
    event = tables.event
    births = [s.connection.birth.at for s in seen.values() if s.connection.birth is not None]
    query = (
        sa.select(event)
        .where(event.c.kind == EventKind.DEPLOYMENT.value, event.c.at >= min(births, default=0))
        .order_by(event.c.row.desc())
        .limit(_STEPS_REMEMBERED * max(1, len(seen)))
    )
    if device is not None:
        query = query.where(event.c.device == device)
    steps: dict[str, list[StoredEvent]] = defaultdict(list)
    for row in connection.execute(query):
        steps[row.device].append(event_of(row))
    return {name: _in_order(stored) for name, stored in steps.items()}


def _newest_steps(connection: Connection, device: str) -> Sequence[Event]:
    """Return a device's newest deployment events, also from before its birth, in order of happening."""
    event = tables.event
    query = sa.select(event).where(event.c.device == device, event.c.kind == EventKind.DEPLOYMENT.value)
    rows = connection.execute(query.order_by(event.c.row.desc()).limit(_STEPS_REMEMBERED))
    return _in_order(event_of(row) for row in rows)


def _in_order(stored: Iterable[StoredEvent]) -> list[Event]:
    """Order one device's events as they happened: by number within a spool; another spool came before or after."""
    by_arrival = sorted(stored, key=lambda item: item.row)
    spools = list(dict.fromkeys(item.event.spool for item in by_arrival))
    return sorted((item.event for item in by_arrival), key=lambda event: (spools.index(event.spool), event.sequence))


def _missing(connection: Connection, seen: Mapping[str, Seen], device: str | None) -> Mapping[str, int]:
    """Return how many reports are known to be missing from each device's current spool."""
    position = tables.position
    query = sa.select(position.c.device, position.c.spool, position.c.missing).where(
        position.c.stream == TELEMETRY, position.c.missing > 0
    )
    if device is not None:
        query = query.where(position.c.device == device)
    current = {name: s.connection.birth.spool for name, s in seen.items() if s.connection.birth is not None}
    return {
        row.device: row.missing
        for row in connection.execute(query)
        if current.get(row.device, row.spool) == row.spool
    }


def _recent(connection: Connection, since: int, device: str | None) -> Mapping[tuple[str, str], Summary]:
    """Return what each version did on each device since a time."""
    statistics, truth = tables.statistics, tables.truth
    windows = sa.select(statistics).where(statistics.c.start >= since)
    minutes = sa.select(truth).where(truth.c.minute > since - MINUTE)
    if device is not None:
        windows = windows.where(statistics.c.device == device)
        minutes = minutes.where(truth.c.device == device)
    measured: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    judged: dict[tuple[str, str], list[Judged]] = defaultdict(list)
    for row in connection.execute(windows):
        measured[row.device, row.digest].append(_measured_of(row, None, row.span))
    for row in connection.execute(minutes):
        judged[row.device, row.digest].append(_judged_of(row, None))
    return {key: summarise(measured[key], judged[key]) for key in {*measured, *judged}}


def _view(device: Device, fleet: _Fleet, now: int) -> DeviceView:
    seen = fleet.seen.get(device.id, Seen())
    birth = seen.connection.birth
    wanted_version, assigned = fleet.wanted.get(device.id, (0, ()))
    running = models_now(birth, fleet.steps.get(device.id, ()))
    certificate = _certificate_of(device)
    return DeviceView(
        id=device.id,
        labels=device.labels,
        presence=state_of(
            seen.connection,
            last_seen=seen.last_seen,
            now=now,
            interval=seen.report_interval,
            revoked=device.revoked,
        ),
        last_seen=seen.last_seen,
        agent=birth.agent if birth else None,
        device_class=birth.device_class if birth else None,
        director_version_wanted=wanted_version,
        director_version_accepted=birth.director_version if birth else 0,
        models=_models_on(device.id, running, assigned, fleet),
        resources=from_json(seen.resources_json, Resources) if seen.resources_json else None,
        reports=seen.reports,
        missing=fleet.missing.get(device.id, 0),
        facts=_facts_of(seen),
        certificate_expires=certificate.expires_at if certificate else None,
        ca=certificate.ca if certificate else "",
        open_until=device.open_until if device.open_until > now else None,
    )


def _with_sentences(view: DeviceView, steps: Sequence[Event]) -> DeviceView:
    """Add what the device said of its newest steps."""
    models = []
    for model in view.models:
        detail, verdict = newest_sentence(steps, model.model)
        models.append(msgspec.structs.replace(model, detail=detail, shadow_verdict=verdict))
    return msgspec.structs.replace(view, models=tuple(models))


def _certificate_of(device: Device) -> CertificateFacts | None:
    """Return what the certificate in force says; a list of devices is shown even when one cannot be read."""
    try:
        return facts_of(device.certificate)
    except ValueError:
        return None


def _facts_of(seen: Seen) -> dict[str, str]:
    birth = seen.connection.birth
    if birth is None:
        return {}
    runtimes = ", ".join(name.value for name in birth.runtimes)
    return {**birth.facts, "time zone": birth.timezone, **({"runtimes": runtimes} if runtimes else {})}


def _models_on(
    device: str, running: Sequence[RunningModel], assigned: Sequence[Assigned], fleet: _Fleet
) -> tuple[ModelOnDevice, ...]:
    wanted = {item.bundle.release.model: item for item in assigned}
    models = {model.model: model for model in running}
    return tuple(
        _model_on(device, models.get(name, RunningModel(model=name, state=DeploymentState.IDLE)), wanted, fleet)
        for name in sorted({*wanted, *models})
    )


def _model_on(device: str, model: RunningModel, wanted: Mapping[str, Assigned], fleet: _Fleet) -> ModelOnDevice:
    digest = (model.digest or "")[:SHORT_DIGEST_LENGTH]
    recent = fleet.recent.get((device, digest), Summary())
    target = wanted.get(model.model)
    return ModelOnDevice(
        model=model.model,
        wanted_version=target.bundle.release.version if target else None,
        running_version=model.version,
        running_digest=model.digest,
        state=model.state,
        reason=model.reason,
        forced=target is not None and target.assignment.forced,
        shadow=target.assignment.shadow if target else None,
        requests=recent.requests,
        errors=recent.errors,
        dropped=recent.dropped,
        late=recent.late,
        shed=recent.shed,
        p50_us=recent.p50_us,
        p95_us=recent.p95_us,
        accuracy=recent.accuracy,
    )


# ---------------------------------------------------------------- models
def _bundles(connection: Connection) -> list[PublishedBundle]:
    return [bundle_of(row) for row in connection.execute(sa.select(tables.bundle))]


def _short(bundle: PublishedBundle) -> str:
    return bundle.sha256[:SHORT_DIGEST_LENGTH]


def _judged_by_digest(connection: Connection) -> Mapping[str, tuple[int, int]]:
    """Return right and all predictions with a truth of each version, as far back as sums go."""
    total: dict[str, tuple[int, int]] = {}
    for source, conditions in sums.sources_of(DAY, sums.TRUTH):
        table = source.table
        query = sa.select(table.c.digest, sa.func.sum(table.c.correct), sa.func.sum(table.c.total))
        for digest, right, all_ in connection.execute(query.where(*conditions).group_by(table.c.digest)):
            before = total.get(digest, (0, 0))
            total[digest] = (before[0] + int(right), before[1] + int(all_))
    return total


def _serving(connection: Connection) -> Mapping[str, int]:
    """Return how many devices serve each short digest."""
    seen = {row.device: standing_of(row) for row in _of(connection, tables.presence, None)}
    steps = _steps_since_birth(connection, seen, None)
    serving: dict[str, int] = defaultdict(int)
    for device, standing in seen.items():
        for model in models_now(standing.connection.birth, steps.get(device, ())):
            serving[(model.digest or "")[:SHORT_DIGEST_LENGTH]] += 1
    return serving


def _model_version(
    bundle: PublishedBundle, judged: Mapping[str, tuple[int, int]], serving: Mapping[str, int]
) -> ModelVersion:
    release = bundle.release
    correct, total = judged.get(_short(bundle), (0, 0))
    return ModelVersion(
        model=release.model,
        version=release.version,
        variant=release.variant,
        family=release.family,
        title=release.title,
        task=release.task,
        sha256=bundle.sha256,
        length=bundle.length,
        published_at=bundle.published_at,
        running_on=serving.get(_short(bundle), 0),
        accuracy=proportion(correct, total) if total else None,
    )


# ---------------------------------------------------------------- series
def _measured(asked: "_Asked", versions: Mapping[str, int]) -> list[Measured]:
    rows = asked.rows(sums.STATISTICS, asked.since, list(versions))
    return [_measured_of(row, versions[row.digest], span) for row, span in rows]


def _judged(asked: "_Asked", versions: Mapping[str, int]) -> list[Judged]:
    rows = asked.rows(sums.TRUTH, asked.since - MINUTE + 1, list(versions))
    return [
        Judged(minute=row.at, version=versions[row.digest], right=row.correct, total=row.total) for row, _ in rows
    ]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a series is about, and which sums tell it."""

    connection: Connection
    device: str
    since: int
    width: int  # of the sums; 0: what devices reported

    def rows(self, finest: sums.Source, since: int, digests: Sequence[str]) -> Iterator[tuple[sa.Row[Any], int]]:
        """Return rows from a time on, each with its span; sums in whose span the time falls are taken whole."""
        for source, conditions in sums.sources_of(self.width, finest):
            table = source.table
            span = sums.span_of(source)
            query = sa.select(table, source.at.label("at")).where(
                table.c.device == self.device,
                source.at > since - max(1, span),
                table.c.digest.in_(digests),
                *conditions,
            )
            for row in self.connection.execute(query):
                yield row, span or getattr(row, "span", MINUTE)


def _measured_of(row: sa.Row[Any], version: int | None, span: int) -> Measured:
    return Measured(
        start=row.start,
        span=span,
        version=version,
        requests=row.requests,
        errors=row.errors,
        dropped=row.dropped,
        late=row.late,
        shed=row.shed,
        latency=from_json(row.latency_json, Histogram),
    )


def _judged_of(row: sa.Row[Any], version: int | None) -> Judged:
    return Judged(minute=row.minute, version=version, right=row.correct, total=row.total)


# ---------------------------------------------------------------- events
def _event_view(stored: StoredEvent) -> EventView:
    event = stored.event
    return EventView(
        row=stored.row,
        device=stored.device,
        at=event.at,
        received_at=stored.received_at,
        kind=event.kind,
        model=event.model,
        version=event.version,
        state=event.state,
        reason=event.reason,
        detail=event.detail,
    )
