"""The schema: every migration up and down with data in it, on both databases, and who must not touch it."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import alembic.autogenerate
import alembic.command
import alembic.config
import alembic.migration
import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory
from data_world import NOW, Databases, birth, desire, enrol, event, report, rows_of
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.adapters.database.dialect import BadDatabase
from fleet_server.adapters.database.opening import MIGRATIONS, DatabaseTooNew, newest_revision, open_database
from fleet_server.adapters.database.partitions import is_slice
from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseRegistry
from fleet_server.adapters.database.retention import Retention
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.core.rollups import DAY, Kept
from fleet_server.ports import Batch
from protocol.messages import Resources

REVISIONS = [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]  # newest first


def move(engine: Engine, command: Any, revision: str) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with dialect.writing(engine) as connection:
        config.attributes["connection"] = connection
        command(config, revision)


def differences(engine: Engine) -> object:
    with engine.connect() as connection:
        context = alembic.migration.MigrationContext.configure(
            connection, opts={"include_name": lambda name, kind, _: kind != "table" or not is_slice(name)}
        )
        return alembic.autogenerate.compare_metadata(context, tables.metadata)


def fill(engine: Engine) -> None:
    """Put something into everything that a migration moves; arrivals on two days."""
    enrol(engine, "cam-1", "cam-2")
    telemetry = DatabaseTelemetry(engine)
    first = report(1, turned_away=(9, 4, 3), truth=((0, 0, 5), (1, 0, 1)), resources=Resources(cpu=100))
    second = report(2, truth=((0, 0, 2), (2, 2, 1)))
    telemetry.store(Batch(reports=[("cam-1", first)], received_at=NOW))
    batch = Batch(
        reports=[("cam-1", second), ("cam-2", report(1))],
        events=[("cam-2", event(1))],
        states=[("cam-1", birth())],
        received_at=NOW + DAY,
    )
    telemetry.store(batch)
    DatabaseDesiredStates(engine).save_desired(desire("cam-1", 3))


def judged(engine: Engine) -> list[tuple[int, ...]]:
    query = sa.text("SELECT minute, SUM(correct), SUM(total) FROM truth GROUP BY minute")
    with engine.connect() as connection:
        return sorted(tuple(map(int, row)) for row in connection.execute(query))


def test_the_migrations_give_exactly_the_tables(opened: Engine) -> None:
    fill(opened)  # with slices
    assert differences(opened) == []


def test_everything_survives_the_way_down_and_up_again_step_by_step(opened: Engine) -> None:
    fill(opened)
    kept = ("device", "event", "presence", "position", "desired", "report", "resources", "statistics", "dirty")
    before, truth = rows_of(opened, *kept), judged(opened)
    for revision in REVISIONS[1:]:
        move(opened, alembic.command.downgrade, revision)
    for revision in reversed(REVISIONS):
        move(opened, alembic.command.upgrade, revision)
    assert differences(opened) == []
    after = rows_of(opened, *kept)
    # What the first schema could not tell is gone: why requests were turned away.
    unknown = {"statistics": [row[:11] for row in before["statistics"]]}
    assert after | {"statistics": [row[:11] for row in after["statistics"]]} == before | unknown
    assert judged(opened) == truth
    assert Retention(opened, kept=Kept()).sum_up() > 0
    with opened.connect() as connection:
        assert connection.scalar(sa.select(sa.func.sum(tables.day.c.requests))) == 30
        assert connection.scalar(sa.select(sa.func.sum(tables.day.c.total))) == 9


def test_reports_of_the_first_schema_are_kept_and_their_refusals_are_not_told_apart(opened: Engine) -> None:
    fill(opened)
    move(opened, alembic.command.downgrade, "0001")
    move(opened, alembic.command.upgrade, "head")
    with opened.connect() as connection:
        first = sa.select(tables.statistics).order_by("received_at", "device", "sequence")
        row = connection.execute(first).first()
    assert row is not None
    assert (row.requests, row.dropped, row.late, row.shed) == (10, 9, 0, 0)


def test_several_servers_may_open_the_same_new_database_at_once(databases: Databases) -> None:
    url = databases.url(migrated=False)
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(open_database, [url] * 4))
    for engine in engines:
        assert DatabaseRegistry(engine, clock=lambda: NOW).devices() == []
        engine.dispose()


def test_a_database_of_a_newer_server_is_refused_and_left_as_it_is(opened: Engine) -> None:
    fill(opened)
    before = rows_of(opened, "report", "device")
    with dialect.writing(opened) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9000'"))
    url = opened.url.render_as_string(hide_password=False)
    with pytest.raises(DatabaseTooNew, match=f"has schema 9000, .* up to {newest_revision()}: a newer"):
        open_database(url)
    assert rows_of(opened, "report", "device") == before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://u:secret@h/d", "mysql is not known; use sqlite or postgresql"),
        ("not a url, secret", "not a URL like"),
    ],
)
def test_a_database_that_nobody_knows_is_named_without_its_password(url: str, words: str) -> None:
    with pytest.raises(BadDatabase, match=words) as refusal:
        open_database(url)
    assert "secret" not in str(refusal.value)


def test_without_its_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_spec("psycopg")
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(BadDatabase, match=r"pip install 'edgewarden\[server,postgresql\]'"):
        open_database("postgresql://nobody@localhost/none")
