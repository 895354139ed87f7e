"""A PostgreSQL that goes away in the middle of a batch: nothing of it is there, and the next try counts it once."""

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from data_world import NOW, enrol, event, report, rows_of
from postgres_cluster import Cluster
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import telemetry as module
from fleet_server.adapters.database.opening import open_database
from fleet_server.adapters.database.retention import Retention
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.core.rollups import Kept
from fleet_server.ingest import StoreUnavailable
from fleet_server.ports import Batch

BATCH = Batch(
    reports=[("cam-1", report(n, truth=((0, 0, 2),))) for n in range(1, 6)],
    events=[("cam-1", event(n)) for n in range(1, 4)],
    received_at=NOW,
)
EVERYTHING = ("report", "statistics", "truth", "event", "position", "presence", "dirty")
NOTHING: dict[str, list[object]] = {name: [] for name in EVERYTHING}


@pytest.fixture
def engine(postgres: Cluster, migrated: str) -> Iterator[Engine]:
    url = postgres.database(migrated)
    opened = open_database(url.render_as_string(hide_password=False))
    enrol(opened, "cam-1")
    yield opened
    opened.dispose()
    postgres.drop(url)


def once(monkeypatch: pytest.MonkeyPatch, name: str, blow: Callable[[Connection], None]) -> None:
    """Strike when the batch comes to a step, the first time."""
    step = getattr(module, name)
    left = [blow]

    def struck(connection: Connection, *rest: object) -> object:
        if left:
            left.pop()(connection)
        return step(connection, *rest)

    monkeypatch.setattr(module, name, struck)


def kill_backend(connection: Connection) -> None:
    pid = connection.scalar(sa.func.pg_backend_pid())
    another = sa.create_engine(connection.engine.url)
    with another.connect() as other:
        assert other.scalar(sa.select(sa.func.pg_terminate_backend(pid, 10_000)))
    another.dispose()


STEPS = ("_write_windows", "_write_truth", "_write_events", "_save")


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_connection_leaves_nothing_half(engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    once(monkeypatch, step, kill_backend)
    telemetry = DatabaseTelemetry(engine)
    with pytest.raises(StoreUnavailable):
        telemetry.store(BATCH)
    assert rows_of(engine, *EVERYTHING) == NOTHING
    assert_counted_once(engine, telemetry)


def test_a_server_that_crashes_in_the_middle_of_a_batch_leaves_nothing_half(
    engine: Engine, postgres: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    once(monkeypatch, "_write_events", lambda _: postgres.stop())
    telemetry = DatabaseTelemetry(engine)
    try:
        with pytest.raises(StoreUnavailable):
            telemetry.store(BATCH)
        with pytest.raises(StoreUnavailable):
            telemetry.store(BATCH)
    finally:
        postgres.start()
    assert rows_of(engine, *EVERYTHING) == NOTHING
    assert_counted_once(engine, telemetry)


def assert_counted_once(engine: Engine, telemetry: DatabaseTelemetry) -> None:
    for _ in range(2):
        ((_, acknowledgement),) = telemetry.store(BATCH)
        assert (acknowledgement.telemetry, acknowledgement.events) == (5, 3)
    assert {name: len(rows) for name, rows in rows_of(engine, "report", "statistics", "truth", "event").items()} == {
        "report": 5,
        "statistics": 5,
        "truth": 5,
        "event": 3,
    }
    Retention(engine, kept=Kept()).sum_up()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT SUM(requests), SUM(total) FROM day")).one() == (50, 10)


def test_a_batch_takes_a_fixed_number_of_statements_however_large(engine: Engine) -> None:
    telemetry = DatabaseTelemetry(engine)
    telemetry.store(Batch(received_at=NOW))  # the day's slices
    sent: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    counts = []
    for size in (5, 200):
        sent.clear()
        batch = [("cam-1", report(size * 10 + n, truth=((0, 0, 1),))) for n in range(size)]
        telemetry.store(Batch(reports=batch, received_at=NOW))
        counts.append(len(sent))
    assert counts[0] == counts[1] < 20
