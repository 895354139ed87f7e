"""The supervisor and the governor's orders, on data planes in memory: who is told, and when."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_world import World, running

from agent.channel import Drain, Govern, Open, Serving
from agent.core.governor import TABLE, Level
from agent.ports import DataPlaneExit


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with running(World(tmp_path)) as one:
        one.supervisor.serve(1, one.model("v1", 1))
        one.wait_for(Serving, ticket=1)
        yield one


def govern(level: Level) -> Govern:
    return Govern(level=level, measures=TABLE[level])


def levels(world: World, plane: int) -> list[str]:
    return [order.level.value for order in world.planes[plane].orders if isinstance(order, Govern)]


def test_a_data_plane_that_serves_is_told_at_once_and_in_order(world: World) -> None:
    for level in Level:
        world.supervisor.govern(govern(level))
    world.eventually(lambda: len(levels(world, 0)) == 4)
    assert ["normal", "eased", "strained", "distress"] == levels(world, 0)


def test_a_restarted_data_plane_is_told_the_last_order_before_it_loads_anything(world: World) -> None:
    for level in (Level.EASED, Level.STRAINED):
        world.supervisor.govern(govern(level))
    world.eventually(lambda: len(levels(world, 0)) == 2)
    world.planes[0].die(-9)
    world.wait_for(DataPlaneExit, pid=100)
    world.settle(1, Open)
    assert ["Govern", "Serve", "Open"] == world.kinds(1)
    assert ["strained"] == levels(world, 1)


def test_a_successor_is_told_too_and_so_is_what_serves_until_then(world: World) -> None:
    world.supervisor.govern(govern(Level.EASED))
    world.eventually(lambda: levels(world, 0) == ["eased"])
    world.mute = lambda order: type(order).__name__ == "Serve"  # it takes its time
    world.supervisor.restart_planned()
    world.eventually(lambda: len(world.planes) == 2 and world.kinds(1) == ["Govern", "Serve"])
    world.supervisor.govern(govern(Level.NORMAL))
    world.eventually(lambda: levels(world, 0) == ["eased", "normal"] == levels(world, 1))
    assert not any(isinstance(order, Drain) for order in world.planes[0].orders)


def test_where_nobody_governs_nothing_is_said_of_it(world: World) -> None:
    world.planes[0].die(-9)
    world.settle(1, Open)
    assert ["Serve", "Open"] == world.kinds(1)
