"""Databases for the tests of this folder: every test that asks for one runs on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from data_world import Databases
from postgres_cluster import Cluster
from sqlalchemy.engine import Engine

from fleet_server.adapters.database.opening import open_database


@pytest.fixture(scope="session")
def migrated(postgres: Cluster) -> str:
    """The name of a database with the newest schema, to copy."""
    url = postgres.database()
    open_database(url.render_as_string(hide_password=False)).dispose()
    assert url.database
    return url.database


@pytest.fixture(scope="session")
def idle() -> list[sa.URL]:
    """Databases that earlier tests have left empty."""
    return []


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path, idle: list[sa.URL]) -> Iterator[Databases]:
    """New databases of one kind, gone after the test."""
    with ExitStack() as stack:
        cluster = template = None
        if request.param == "postgresql":
            cluster, template = request.getfixturevalue("postgres"), request.getfixturevalue("migrated")
        yield Databases(folder=tmp_path, cluster=cluster, template=template, ending=stack, idle=idle)


@pytest.fixture
def opened(databases: Databases) -> Engine:
    """An engine on a database with the newest schema and nothing in it."""
    return databases.open()
