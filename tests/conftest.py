"""What tests of every folder may ask for."""

from collections.abc import Iterator

import pytest
from postgres_cluster import Cluster


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A private PostgreSQL, started when the first test of the session needs it."""
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.remove()
