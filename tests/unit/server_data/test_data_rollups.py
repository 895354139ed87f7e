"""Sums, slices and retention, on both databases: exact at any moment, and cheap to forget."""

import pytest
import sqlalchemy as sa
from data_world import DIGEST, MINUTE, NOW, bundle, enrol, is_sqlite, report, rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, partitions, sums, tables
from fleet_server.adapters.database.queries import Queries
from fleet_server.adapters.database.registry import DatabaseReleases
from fleet_server.adapters.database.retention import Retention
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.core.rollups import DAY, QUARTER, Kept, add_up, bucket_of, resolution_for
from fleet_server.ports import Batch
from protocol.messages import Report
from protocol.metrics import proportion
from protocol.statistics import ModelStatistics

TODAY = NOW - NOW % DAY


@pytest.fixture
def engine(opened: Engine) -> Engine:
    enrol(opened, "cam-1", "cam-2")
    DatabaseReleases(opened).add_bundles([bundle(1, sha256=DIGEST)])
    return opened


def store(engine: Engine, *reports: Report, at: int = NOW, device: str = "cam-1") -> None:
    DatabaseTelemetry(engine).store(Batch(reports=[(device, r) for r in reports], received_at=at))


def series(
    engine: Engine, *, now: int, span: int, most: int, device: str = "cam-1"
) -> tuple[int, int, int, int, int]:
    """Return what a series adds up to: requests, errors, dropped, right and judged predictions."""
    points = Queries(engine, clock=lambda: now).series(device, "digits", span=span, most=most)
    judged = [p.accuracy for p in points if p.accuracy is not None]
    return (
        sum(p.requests for p in points),
        sum(p.errors for p in points),
        sum(p.dropped for p in points),
        sum(round(a.value * a.n) for a in judged),
        sum(a.n for a in judged),
    )


# ---------------------------------------------------------------- the decisions
RESOLUTIONS = {
    "an hour in 120 points: minutes": (3_600_000, 120, 0),
    "a day in 120 points: still what was reported": (DAY, 120, 0),
    "two days in 120 points: quarters are fine enough": (2 * DAY, 120, QUARTER),
    "two days in very many points: what was reported": (2 * DAY, 1000, 0),
    "longer than reports are kept": (31 * DAY, 100_000, QUARTER),
    "a year in 120 points: days": (365 * DAY, 120, DAY),
    "longer than quarters are kept": (91 * DAY, 100_000, DAY),
}


@pytest.mark.parametrize(("span", "most", "width"), RESOLUTIONS.values(), ids=RESOLUTIONS.keys())
def test_the_finest_that_is_kept_unless_a_coarser_one_is_fine_enough(span: int, most: int, width: int) -> None:
    assert resolution_for(span, most=most, kept=Kept()) == width


@pytest.mark.parametrize("kept", [(0, 90, 900), (91, 90, 900), (30, 90, 89)])
def test_a_coarser_resolution_is_not_kept_for_less_long(kept: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must not shrink"):
        Kept(raw=kept[0], quarters=kept[1], days=kept[2])


def test_adding_up_keeps_versions_apart_and_takes_truth_alone() -> None:
    model = ModelStatistics(digest="a", requests=3)
    added = add_up([model, model], [("a", ((0, 0, 2),)), ("b", ((1, 0, 1),)), ("a", ((0, 0, 1), (0, 1, 4)))])
    assert {name: (s.statistics.requests, s.correct, s.total) for name, s in added.items()} == {
        "a": (6, 3, 7),
        "b": (0, 0, 1),
    }


# ---------------------------------------------------------------- exact at any moment
WINDOWS = st.lists(
    st.tuples(
        st.integers(0, 3 * 24 * 60),  # minutes before now, by the device's clock
        st.integers(0, 2),  # days until it arrives
        st.integers(0, 20),  # requests
        st.booleans(),  # sums are made after it
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WINDOWS)
def test_every_resolution_tells_the_same_whenever_sums_are_made(
    engine: Engine, windows: list[tuple[int, int, int, bool]]
) -> None:
    empty(engine)
    now = TODAY + 3 * DAY
    retention = Retention(engine, kept=Kept())
    for number, (age, late, requests, summed) in enumerate(sorted(windows, key=lambda w: w[1]), 1):
        start = now - age * MINUTE
        truth = ((0, 0, requests), (0, 1, 1))
        store(engine, report(number, start=start, requests=requests, truth=truth), at=now + late * DAY)
        if summed:
            retention.sum_up(QUARTER if number % 2 else DAY)
    expected = (sum(w[2] for w in windows), 0, 0, sum(w[2] for w in windows), sum(w[2] + 1 for w in windows))
    for most in (10_000, 120, 2):  # what was reported, quarters, days
        assert series(engine, now=now, span=4 * DAY, most=most) == expected
    (version,) = Queries(engine, clock=lambda: now).model_versions()
    assert version.accuracy == proportion(expected[3], expected[4])


def empty(engine: Engine) -> None:
    with dialect.writing(engine) as connection:
        for table in (*partitions.WIDTHS, tables.dirty, tables.position, tables.presence):
            connection.execute(table.delete())


def test_truth_and_windows_that_come_weeks_late_count_in_the_day_that_they_are_about(engine: Engine) -> None:
    retention = Retention(engine, kept=Kept(raw=7))
    store(engine, report(1, start=TODAY, truth=((0, 0, 5),)), at=TODAY + MINUTE)
    retention.forget(TODAY + 9 * DAY)
    assert rows_of(engine, "statistics", "truth") == {"statistics": [], "truth": []}
    later = TODAY + 20 * DAY
    store(engine, report(2, start=TODAY + MINUTE, truth=((0, 1, 3),)), at=later)
    for _ in range(2):
        assert series(engine, now=later, span=31 * DAY, most=30) == (20, 0, 0, 5, 8)
        retention.forget(later)


def test_making_sums_again_changes_nothing_and_only_what_changed_is_made(engine: Engine) -> None:
    retention = Retention(engine, kept=Kept())
    store(engine, report(1), report(2, start=NOW + QUARTER))
    assert retention.sum_up() == 3  # two quarters and their day
    made = rows_of(engine, "quarter", "day")
    assert retention.sum_up() == 0
    store(engine, report(1), report(2))  # repeats
    assert (retention.sum_up(), rows_of(engine, "quarter", "day")) == (0, made)
    store(engine, report(3))
    assert retention.sum_up() == 2


def test_more_buckets_than_one_transaction_takes_are_all_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "CHUNK", 3)
    store(engine, *(report(n, start=TODAY + n * QUARTER) for n in range(1, 11)))
    assert Retention(engine, kept=Kept()).sum_up() == 11
    assert rows_of(engine, "dirty")["dirty"] == []
    assert len(rows_of(engine, "quarter")["quarter"]) == 10


# ---------------------------------------------------------------- slices
def slices(engine: Engine, name: str) -> int:
    query = sa.text("SELECT count(*) FROM pg_inherits WHERE inhparent = to_regclass(:name)")
    with engine.connect() as connection:
        return int(connection.scalar(query, {"name": name}) or 0)


def test_what_is_old_goes_in_whole_slices_and_what_is_not_summed_stays(engine: Engine) -> None:
    retention = Retention(engine, kept=Kept(raw=2, quarters=7, days=30))
    for number in range(6):
        store(engine, report(number + 1, start=TODAY), at=TODAY + number * DAY)
    retention.sum_up()
    store(engine, report(20, start=TODAY), at=TODAY + DAY)  # a clock that went back: not summed
    assert partitions.drop_before(engine, tables.report, TODAY + 3 * DAY) == (4 if is_sqlite(engine) else 3)
    assert {row[0] for row in rows_of(engine, "report")["report"]} == {TODAY + n * DAY for n in (3, 4, 5)}
    retention.forget(TODAY + 6 * DAY)
    assert {row[0] for row in rows_of(engine, "statistics")["statistics"]} == {TODAY + n * DAY for n in (4, 5)}
    if not is_sqlite(engine):
        assert slices(engine, "statistics") == 2 + 4  # kept, and made ahead from today on


def test_sums_go_when_their_time_is_over_and_the_coarser_stay(engine: Engine) -> None:
    retention = Retention(engine, kept=Kept(raw=1, quarters=10, days=100))
    store(engine, report(1, start=TODAY), at=TODAY)
    retention.forget(TODAY + 30 * DAY)
    left = {name: len(rows) for name, rows in rows_of(engine, "report", "quarter", "day").items()}
    assert left == {"report": 0, "quarter": 0, "day": 1}
    retention.forget(TODAY + 200 * DAY)
    assert rows_of(engine, "day") == {"day": []}


def test_sqlite_forgets_in_steps_that_let_others_write(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "STEP", 4)
    store(engine, *(report(n) for n in range(1, 11)))
    transactions: list[object] = []
    sa.event.listen(engine, "commit", transactions.append)
    partitions.drop_before(engine, tables.report, bucket_of(NOW, DAY) + DAY)
    assert rows_of(engine, "report") == {"report": []}
    assert len(transactions) == (3 if is_sqlite(engine) else 2)  # 4 + 4 + 2 rows; a look and one slice


def test_a_batch_makes_the_slice_that_nobody_made_ahead(engine: Engine) -> None:
    telemetry = DatabaseTelemetry(engine)
    for number in (1, 2, 3):
        telemetry.store(Batch(reports=[("cam-1", report(number))], received_at=NOW + number * 400 * DAY))
    assert len(rows_of(engine, "report")["report"]) == 3
