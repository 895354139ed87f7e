"""Facts and real databases for the tests of this folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from postgres_cluster import Cluster
from sqlalchemy import create_engine
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import tables
from fleet_server.adapters.database.dialect import WRITER_LOCK
from fleet_server.adapters.database.opening import newest_revision, open_database, revision_of
from fleet_server.adapters.database.partitions import is_slice
from fleet_server.adapters.database.registry import DatabaseRegistry
from fleet_server.ports import Assigned, Device, PublishedBundle, SignedDesire
from protocol.manifest import Needs
from protocol.messages import Birth, Event, Report, RunningModel, Window
from protocol.release import Assignment, DeviceConfig, Release
from protocol.states import DeploymentState, EventKind, RejectReason
from protocol.statistics import (
    ConfusionCell,
    ModelStatistics,
    TruthStatistics,
    bucket_index,
    histogram_from,
)

NOW = 1_790_000_000_000 - 1_790_000_000_000 % 60_000  # a whole minute
MINUTE = 60_000
DIGEST = "a" * 64


@contextmanager
def database(folder: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{folder / 'test.db'}")
    try:
        yield engine
    finally:
        engine.dispose()


@dataclass(kw_only=True)
class Databases:
    """New databases of one kind: SQLite files in a folder, or databases of a cluster."""

    folder: Path
    cluster: Cluster | None  # None: SQLite
    template: str | None
    ending: ExitStack
    idle: list[sa.URL]  # migrated and empty
    made: int = 0

    def url(self, *, migrated: bool = True) -> str:
        """Make a database and return its URL; a SQLite file gets its schema when it is opened."""
        self.made += 1
        if self.cluster is None:
            return f"sqlite:///{self.folder / f'test-{self.made}.db'}"
        if not migrated:
            url = self.cluster.database()
            self.ending.callback(self.cluster.drop, url)
        else:
            url = self.idle.pop() if self.idle else self.cluster.database(self.template or "template0")
            self.ending.callback(self._clean, url)
        return url.render_as_string(hide_password=False)

    def _clean(self, url: sa.URL) -> None:
        """Keep a database for the next test: emptying one is ten times faster than making one."""
        engine = create_engine(url)
        try:
            with engine.begin() as connection:
                slices = [name for name in sa.inspect(connection).get_table_names() if is_slice(name)]
                if slices:
                    connection.exec_driver_sql(f"DROP TABLE {', '.join(slices)}")
                names = ", ".join(f'"{table.name}"' for table in tables.metadata.sorted_tables)
                connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY CASCADE")
                as_before = revision_of(connection) == newest_revision()
        finally:
            engine.dispose()
        if as_before:
            self.idle.append(url)

    def open(self) -> Engine:
        """Make a database and return an engine on it."""
        engine = open_database(self.url())
        self.ending.callback(engine.dispose)
        return engine

    @contextmanager
    def blocked(self, engine: Engine) -> Iterator[None]:
        """Hold the database's only pen meanwhile, as another server in the middle of a batch does."""
        with _another(engine) as other:
            if self.cluster is None:
                other.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                other.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITER_LOCK)))
            yield
            other.rollback()


@contextmanager
def _another(engine: Engine) -> Iterator[Connection]:
    other = create_engine(engine.url)
    try:
        with other.connect() as connection:
            yield connection
    finally:
        other.dispose()


def is_sqlite(engine: Engine) -> bool:
    return engine.dialect.name == "sqlite"


def impatient(engine: Engine) -> None:
    """Let writers wait for their turn for a moment only."""
    if is_sqlite(engine):
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout=50")
    else:
        sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("SET LOCAL lock_timeout = '50ms'"))


def enrol(engine: Engine, *names: str, labels: dict[str, str] | None = None, certificate: str = "PEM") -> None:
    registry = DatabaseRegistry(engine, clock=lambda: NOW)
    for name in names:
        registry.add_device(Device(id=name, labels=labels or {}, certificate=certificate, enrolled_at=NOW))


def report(
    sequence: int,
    *,
    spool: str = "s1",
    covers: int = 1,
    digest: str = DIGEST[:16],
    start: int = NOW,
    span: int = MINUTE,
    requests: int = 10,
    errors: int = 0,
    latency: int = 1500,
    turned_away: tuple[int, int, int] = (0, 0, 0),
    truth: tuple[ConfusionCell, ...] = (),
    **fields: object,
) -> Report:
    n = requests - errors
    histogram = histogram_from({bucket_index(latency): n}, zero=0, sum_=latency * n, max_=latency)
    dropped, late, shed = turned_away
    model = ModelStatistics(
        digest=digest,
        requests=requests,
        errors=errors,
        dropped=dropped,
        late=late,
        shed=shed,
        latency=histogram,
    )
    return Report(
        spool=spool,
        sequence=sequence,
        covers=covers,
        windows=(Window(start=start, span=span, models=(model,), **fields),),  # type: ignore[arg-type]  # resources
        truth=(TruthStatistics(digest=digest, minute=start, confusion=truth),) if truth else (),
    )


def event(
    sequence: int,
    *,
    spool: str = "s1",
    at: int = NOW,
    kind: EventKind = EventKind.DEPLOYMENT,
    model: str | None = "digits",
    version: int | None = 1,
    state: DeploymentState | None = DeploymentState.COMMITTED,
    reason: RejectReason | None = None,
    digest: str | None = None,
    detail: str = "",
) -> Event:
    return Event(
        spool=spool,
        sequence=sequence,
        at=at,
        kind=kind,
        model=model,
        version=version,
        state=state,
        reason=reason,
        digest=digest,
        detail=detail,
    )


def birth(connection: int = 1, *, models: tuple[RunningModel, ...] = (), **fields: object) -> Birth:
    said: dict[str, object] = {"at": NOW, "spool": "s1", "boot": "b1", "agent": "0.1.0", "device_class": "x86_64"}
    return Birth(connection=connection, models=models, **(said | fields))  # type: ignore[arg-type]  # any field


def bundle(version: int, *, model: str = "digits", sha256: str | None = None, title: str = "") -> PublishedBundle:
    release = Release(
        model=model,
        version=version,
        variant="int8",
        title=title,
        inputs=(),
        outputs=(),
        needs=Needs(memory=1_000_000),
    )
    digest = sha256 or f"{version:x}".rjust(1, "0") * 64
    return PublishedBundle(
        release=release,
        path=f"models/main/{model}-{version}-int8.ewb",
        sha256=digest[:64],
        length=1000 * version,
        published_at=NOW,
    )


def desire(device: str, version: int, *bundles: PublishedBundle, attempt: int = 1) -> SignedDesire:
    return SignedDesire(
        device=device,
        version=version,
        assigned=tuple(Assigned(bundle=b, assignment=Assignment(rollout="r", attempt=attempt)) for b in bundles),
        config=DeviceConfig(window_seconds=60),
        timestamp=b"ts",
        snapshot=b"sn",
        targets=b"tg",
        issued_at=NOW,
        expires_at=NOW + version,
    )


def rows_of(engine: Engine, *names: str) -> dict[str, list[tuple[object, ...]]]:
    """Everything in some tables, in an order of its own."""
    with engine.connect() as connection:
        return {
            name: sorted(tuple(row) for row in connection.execute(sa.select(tables.metadata.tables[name])))
            for name in names
        }
