"""What `/metrics` asks of the database. Reads only, and cheaply: rows per device, never the reports themselves.

What serves where follows from births and the steps after them, as everywhere (`core/running.py`); steps are read
once, from the last row seen on, and kept. `fleet` is not for several threads at once.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import tables
from fleet_server.adapters.database.records import Standing, event_of, standing_of
from fleet_server.core.cohorts import Version
from fleet_server.core.exposition import FleetFacts
from fleet_server.core.presence import state_of
from fleet_server.core.running import models_now
from fleet_server.ports import StoredEvent
from protocol.messages import Event
from protocol.names import SHORT_DIGEST_LENGTH
from protocol.states import DeploymentState, EventKind, PresenceState

STREAMS = ("telemetry", "events")  # announced even while nothing is missing
STEPS_KEPT = 50  # newest per device that change what serves; a birth makes the older ones void
_CHANGES = (DeploymentState.PROBATION, DeploymentState.COMMITTED, DeploymentState.ROLLED_BACK)
_CHUNK = 20_000  # rows of steps held at once

Known = Mapping[str, Version]  # by short digest


class FleetMeasures:
    """The reader. ``clock`` gives UTC ms."""

    def __init__(self, engine: Engine, *, clock: Callable[[], int]) -> None:
        self._engine = engine
        self._clock = clock
        self._steps: dict[str, deque[StoredEvent]] = defaultdict(lambda: deque(maxlen=STEPS_KEPT))
        self._read_to = 0  # row of the newest event that was read

    def ping(self) -> None:
        """Ask the smallest possible question; raises what SQLAlchemy raises when there is no answer."""
        with self._engine.connect() as connection:
            connection.execute(sa.select(1))

    def versions(self) -> Known:
        """Return the model and version of every published bundle."""
        bundle = tables.bundle
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(bundle.c.sha256, bundle.c.model, bundle.c.version))
            return {row.sha256[:SHORT_DIGEST_LENGTH]: (row.model, row.version) for row in rows}

    def truth_since(self, minute: int) -> Sequence[tuple[str, int, int, int]]:
        """Return (short digest, minute, right, judged) merged over devices, from a minute on."""
        truth = tables.truth
        query = (
            sa.select(truth.c.digest, truth.c.minute, sa.func.sum(truth.c.correct), sa.func.sum(truth.c.total))
            .where(truth.c.minute >= minute)
            .group_by(truth.c.digest, truth.c.minute)
        )
        with self._engine.connect() as connection:
            return [(d, m, int(right), int(judged)) for d, m, right, judged in connection.execute(query)]

    def fleet(self, known: Known) -> FleetFacts:
        """Read the figures of the whole fleet."""
        with self._engine.connect() as connection:
            seen = _standings(connection)
            self._read_steps(connection)
            missing = _missing(connection)
            dead = connection.scalar(sa.select(sa.func.count()).select_from(tables.dead_letter))
        return FleetFacts(
            presence=_presence(seen, self._clock()),
            serving=self._serving(seen, known),
            missing=missing,
            dead_letters=int(dead or 0),
        )

    def _read_steps(self, connection: Connection) -> None:
        event = tables.event
        query = (
            sa.select(event)
            .where(event.c.kind == EventKind.DEPLOYMENT.value, event.c.state.in_([s.value for s in _CHANGES]))
            .order_by(event.c.row)
            .limit(_CHUNK)
        )
        newest = connection.scalar(sa.select(sa.func.max(event.c.row))) or 0
        while self._read_to < newest:
            rows = connection.execute(query.where(event.c.row > self._read_to, event.c.row <= newest)).all()
            for row in rows:
                self._steps[row.device].append(event_of(row))
            self._read_to = rows[-1].row if len(rows) == _CHUNK else newest

    def _serving(self, seen: Mapping[str, tuple[Standing, bool]], known: Known) -> Mapping[Version | None, int]:
        serving: Counter[Version | None] = Counter()
        for device, (standing, revoked) in seen.items():
            if revoked:
                continue
            for model in models_now(standing.connection.birth, _in_order(self._steps.get(device, ()))):
                if model.digest:
                    serving[known.get(model.digest[:SHORT_DIGEST_LENGTH])] += 1
        return serving


def _standings(connection: Connection) -> Mapping[str, tuple[Standing, bool]]:
    """Return every device's standing, and whether it is revoked."""
    device, presence = tables.device, tables.presence
    revoked = {row.id: bool(row.revoked) for row in connection.execute(sa.select(device.c.id, device.c.revoked))}
    seen = {row.device: standing_of(row) for row in connection.execute(sa.select(presence))}
    return {name: (seen.get(name, Standing()), gone) for name, gone in revoked.items()}


def _presence(seen: Mapping[str, tuple[Standing, bool]], now: int) -> Mapping[PresenceState, int]:
    return Counter(
        state_of(
            standing.connection,
            last_seen=standing.last_seen,
            now=now,
            interval=standing.report_interval,
            revoked=revoked,
        )
        for standing, revoked in seen.values()
    )


def _missing(connection: Connection) -> Mapping[str, int]:
    position = tables.position
    query = (
        sa.select(position.c.stream, sa.func.sum(position.c.missing))
        .where(position.c.missing > 0)
        .group_by(position.c.stream)
    )
    found = {stream: int(n) for stream, n in connection.execute(query)}
    return {**dict.fromkeys(STREAMS, 0), **found}


def _in_order(stored: Iterable[StoredEvent]) -> list[Event]:
    """Order a device's steps as they happened: by number within a spool; another spool came before or after."""
    arrived = list(stored)
    spools = list(dict.fromkeys(item.event.spool for item in arrived))
    return sorted((item.event for item in arrived), key=lambda event: (spools.index(event.spool), event.sequence))
