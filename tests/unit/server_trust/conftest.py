from pathlib import Path

import pytest
from trust_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A server without trust roots yet."""
    return World(tmp_path)


@pytest.fixture
def ready(world: World) -> World:
    """A server with both trust roots."""
    return world.ready()
