"""Storing telemetry, on both databases: once, whatever the order, and acknowledged exactly."""

from collections.abc import Iterator
from itertools import cycle

import pytest
import sqlalchemy as sa
from data_world import DIGEST, MINUTE, NOW, Databases, birth, bundle, enrol, event, impatient, report, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.adapters.database import telemetry as module
from fleet_server.adapters.database.queries import Queries
from fleet_server.adapters.database.registry import DatabaseReleases
from fleet_server.adapters.database.retention import Retention
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.core.rollups import DAY, Kept
from fleet_server.ingest import StoreUnavailable
from fleet_server.ports import Batch
from protocol.messages import Acknowledgement, Report, Resources
from protocol.metrics import proportion

FACTS = ("report", "statistics", "resources", "truth", "event", "position", "dirty")


@pytest.fixture
def engine(opened: Engine) -> Engine:
    enrol(opened, "cam-1", "cam-2")
    return opened


def store(engine: Engine, *reports: Report, device: str = "cam-1") -> dict[str, Acknowledgement]:
    batch = Batch(reports=[(device, r) for r in reports], received_at=NOW)
    return dict(DatabaseTelemetry(engine).store(batch))


# A fixed set: gaps are filled in the end, one report covers three numbers, truth falls on the same minutes.
SET = (
    report(1, truth=((0, 0, 5), (1, 0, 1))),
    report(2, start=NOW + MINUTE, resources=Resources(cpu=100)),
    report(5, covers=3, start=NOW + 2 * MINUTE, truth=((1, 1, 2),)),
    report(6, truth=((0, 0, 3), (2, 1, 1)), resources=Resources(cpu=200, memory=5)),
    report(7, requests=20, errors=4),
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(SET), max_size=6).flatmap(lambda again: st.permutations([*SET, *again])),
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
)
def test_any_order_and_repetition_gives_the_same_rows_and_acknowledges_all(
    engine: Engine, arrivals: list[Report], sizes: list[int]
) -> None:
    empty(engine)
    store(engine, *SET)
    expected = rows_of(engine, *FACTS)
    empty(engine)
    last = [store(engine, *chunk) for chunk in chunks_of(arrivals, sizes)][-1]["cam-1"]
    assert rows_of(engine, *FACTS) == expected
    assert (last.telemetry, last.missing_telemetry) == (7, ())


def empty(engine: Engine) -> None:
    """Hypothesis runs all its examples on one database."""
    with dialect.writing(engine) as connection:
        for name in (*FACTS, "presence"):
            connection.execute(tables.metadata.tables[name].delete())


def chunks_of(arrivals: list[Report], sizes: list[int]) -> Iterator[list[Report]]:
    rest, size = list(arrivals), cycle(sizes)
    while rest:
        n = next(size)
        yield rest[:n]
        rest = rest[n:]


def test_truth_of_one_minute_adds_up_over_reports(engine: Engine) -> None:
    store(engine, *SET)
    store(engine, *SET)
    with engine.connect() as connection:
        query = sa.text("select minute, sum(correct), sum(total) from truth group by minute order by minute")
        rows = [tuple(map(int, row)) for row in connection.execute(query)]
    assert rows == [(NOW, 8, 10), (NOW + 2 * MINUTE, 2, 2)]


def test_an_acknowledgement_names_what_is_missing(engine: Engine) -> None:
    ack = store(engine, report(1), report(2), report(6), report(9))["cam-1"]
    assert (ack.spool, ack.telemetry, ack.missing_telemetry) == ("s1", 9, ((3, 5), (7, 8)))


def test_spools_and_devices_are_counted_apart(engine: Engine) -> None:
    store(engine, report(1), report(2))
    batch = Batch(
        reports=[("cam-1", report(1, spool="s2")), ("cam-2", report(3))],
        events=[("cam-1", event(1))],
        received_at=NOW,
    )
    acks = [(d, a.spool, a.telemetry, a.events) for d, a in DatabaseTelemetry(engine).store(batch)]
    assert acks == [("cam-1", "s2", 1, 0), ("cam-2", "s1", 3, 0), ("cam-1", "s1", 2, 1)]


def test_a_birth_is_answered_with_what_is_already_stored(engine: Engine) -> None:
    store(engine, report(1), report(2))
    acks = DatabaseTelemetry(engine).store(Batch(states=[("cam-1", birth())], received_at=NOW))
    assert [(d, a.telemetry) for d, a in acks] == [("cam-1", 2)]
    fresh = DatabaseTelemetry(engine).store(Batch(states=[("cam-2", birth())], received_at=NOW))
    assert list(fresh) == []


def test_events_are_stored_once_and_rows_grow_with_arrival(engine: Engine) -> None:
    telemetry, queries = DatabaseTelemetry(engine), Queries(engine, clock=lambda: NOW)
    events = [("cam-1", event(2, version=2)), ("cam-1", event(1)), ("cam-1", event(2, version=2))]
    telemetry.store(Batch(events=events, received_at=NOW))
    telemetry.store(Batch(events=[*events, ("cam-2", event(1))], received_at=NOW + 5))
    found = queries.events()
    assert [(e.device, e.version) for e in found] == [("cam-2", 1), ("cam-1", 1), ("cam-1", 2)]
    newest = queries.events(after=found[1].row)
    assert [(e.device, e.received_at) for e in newest] == [("cam-2", NOW + 5)]


def test_dead_letters_are_kept_short_and_few(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DEAD_LETTERS", 5)
    letters = [(f"t/\x00{n}", b"x" * 10_000, "because \ud800") for n in range(9)]
    DatabaseTelemetry(engine).store(Batch(dead_letters=letters, received_at=NOW))
    (stored,) = rows_of(engine, "dead_letter").values()
    assert [(row[1], len(bytes(row[2])), row[3]) for row in stored] == [  # type: ignore[call-overload]  # bytes
        (f"t/\ufffd{n}", 4096, "because ?") for n in range(4, 9)
    ]


def test_while_another_writer_holds_the_database_nothing_is_written(databases: Databases, engine: Engine) -> None:
    impatient(engine)
    with databases.blocked(engine), pytest.raises(StoreUnavailable):
        store(engine, report(1))
    assert rows_of(engine, "report", "position") == {"report": [], "position": []}
    assert store(engine, report(1))["cam-1"].telemetry == 1


def test_old_reports_are_forgotten_but_never_stored_again(engine: Engine) -> None:
    store(engine, report(1, truth=((0, 0, 1),)), report(2))
    retention = Retention(engine, kept=Kept(raw=1))
    retention.forget(NOW + DAY - 1)
    assert len(rows_of(engine, "report")["report"]) == 2
    retention.forget(NOW + 2 * DAY)
    assert store(engine, report(1, truth=((0, 0, 1),)))["cam-1"].telemetry == 2
    empty = {"report": [], "statistics": [], "truth": []}
    assert rows_of(engine, *empty) == empty


def test_what_was_turned_away_is_kept_with_the_reasons_that_are_known(engine: Engine) -> None:
    DatabaseReleases(engine).add_bundles([bundle(1, sha256=DIGEST)])
    store(engine, report(1, turned_away=(9, 4, 3)), report(2, start=NOW + MINUTE, turned_away=(2, 0, 0)))
    queries = Queries(engine, clock=lambda: NOW + 2 * MINUTE)
    points = queries.series("cam-1", "digits", span=60 * MINUTE)
    assert [(p.dropped, p.late, p.shed) for p in points] == [(9, 4, 3), (2, 0, 0)]


def test_a_fleet_view_has_the_figures_of_the_running_version(engine: Engine) -> None:
    DatabaseReleases(engine).add_bundles([bundle(1, sha256=DIGEST)])
    store(engine, *SET)
    queries = Queries(engine, clock=lambda: NOW + 2 * MINUTE)
    (version,) = queries.model_versions()
    assert version.accuracy == proportion(10, 12)
    points = queries.series("cam-1", "digits", span=60 * MINUTE)
    assert [(p.start - NOW, p.requests, p.errors) for p in points] == [
        (0, 40, 4),
        (MINUTE, 10, 0),
        (2 * MINUTE, 10, 0),
    ]
    assert [p.accuracy for p in points] == [proportion(8, 10), None, proportion(2, 2)]
