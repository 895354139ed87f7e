"""The supervisor's spare, on data planes in memory: when one is had, what it is told, and how it steps in."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from supervisor_world import World, running

from agent.channel import Configure, Drain, Govern, Open, Prepare, Ready, Refused, Serve, Serving, Withdrawn
from agent.core.governor import TABLE, Level
from agent.core.sparing import ROOM_TO_START, ROOM_TO_STAY
from agent.ports import DataPlaneExit
from protocol.states import RuntimeName


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with running(World(tmp_path, spare=True)) as one:
        one.supervisor.serve(1, one.model("v1", 1))
        one.wait_for(Serving, ticket=1)
        yield one


@pytest.fixture
def spared(world: World) -> World:
    """A world in which plane 0 serves and plane 1 is a spare."""
    world.let_time_pass(2, step=0.25)
    world.settle(1, Prepare)
    return world


def govern(level: Level, *, reload: bool = True) -> Govern:
    return Govern(level=level, measures=msgspec.structs.replace(TABLE[level], reload=reload))


def test_when_things_are_calm_a_spare_is_started_and_told_what_to_import_and_nothing_more(world: World) -> None:
    started = world.now
    world.let_time_pass(2, step=0.25)
    world.settle(1, Prepare)
    assert world.launched[1] - started >= 5
    assert world.planes[1].orders == [Prepare(runtimes=(RuntimeName.LITERT,), configuration=Configure())]
    assert (world.supervisor.pid, world.supervisor.spare_pid) == (100, 101)


def test_nobody_hears_of_a_spare(spared: World) -> None:
    spared.pass_seconds(2)
    spared.planes[1].die(1)
    spared.let_time_pass(3, step=0.25)
    spared.settle(2, Prepare)
    spared.supervisor.serve(2, spared.model("v1", 2))
    spared.wait_for(Serving, ticket=2)
    assert [event.pid for event in spared.seen if isinstance(event, Ready)] == [100]
    assert not [event for event in spared.seen if isinstance(event, DataPlaneExit)]


@pytest.mark.parametrize("spare", [True, False])
def test_without_a_model_or_without_the_setting_there_is_none(tmp_path: Path, spare: bool) -> None:
    with running(World(tmp_path, spare=spare)) as world:
        world.settle(0, Open)
        if not spare:
            world.supervisor.serve(1, world.model("v1", 1))
            world.wait_for(Serving, ticket=1)
        world.pass_seconds(20)
        assert len(world.launched) == 1


def test_at_a_death_the_spare_steps_in_at_once_with_what_served_last(spared: World) -> None:
    spared.supervisor.serve(2, spared.model("v2", 5, "faces"))
    spared.wait_for(Serving, ticket=2)
    spared.planes[0].die(-9)
    spared.wait_for(DataPlaneExit, pid=100, returncode=-9, planned=False)
    spared.wait_for(Ready, pid=101)
    spared.settle(1, Open)
    assert spared.kinds(1) == ["Prepare", "Serve", "Serve", "Open"]
    assert spared.served(1) == [(0, "digits", 1), (0, "faces", 5)]
    assert spared.supervisor.pid == 101
    assert len(spared.launched) == 2  # the next spare has time


def test_orders_reach_a_spare_that_stepped_in(spared: World) -> None:
    spared.planes[0].die(-9)
    spared.wait_for(DataPlaneExit, pid=100)
    spared.supervisor.serve(2, spared.model("v1", 2))
    spared.wait_for(Serving, ticket=2)
    assert spared.served(1) == [(0, "digits", 1), (2, "digits", 2)]


def test_after_it_stepped_in_another_spare_follows_when_things_are_calm_again(spared: World) -> None:
    spared.planes[0].die(-9)
    spared.settle(1, Open)
    stepped_in = spared.now
    spared.let_time_pass(3, step=0.25)
    spared.settle(2, Prepare)
    assert spared.launched[2] - stepped_in >= 5
    assert spared.supervisor.pid == 101


def test_a_spare_that_is_not_ready_when_it_is_needed_steps_in_as_soon_as_it_is(world: World) -> None:
    world.sleepy = True
    world.let_time_pass(2, step=0.25)
    assert world.supervisor.spare_pid is None
    world.planes[0].die(-9)
    world.wait_for(DataPlaneExit, pid=100)
    world.eventually(lambda: world.supervisor.pid == 101)
    world.planes[1].wake()
    world.settle(1, Open)
    assert world.kinds(1) == ["Serve", "Open"]
    assert len(world.launched) == 2


def test_a_spare_that_never_became_ready_is_not_waited_for(world: World) -> None:
    world.sleepy = True
    world.let_time_pass(2, step=0.25)
    world.pass_seconds(31)
    world.sleepy = False
    world.planes[0].die(-9)
    world.settle(2, Open)
    assert world.planes[1].killed
    assert world.supervisor.pid == 102


def test_a_spare_that_steps_in_works_as_hard_as_the_governor_said_last(spared: World) -> None:
    spared.supervisor.govern(govern(Level.EASED))
    spared.settle(0, Govern)
    spared.planes[0].die(-9)
    spared.settle(1, Open)
    assert spared.kinds(1) == ["Prepare", "Govern", "Serve", "Open"]


def test_a_spare_that_dies_is_replaced_ever_later(spared: World) -> None:
    for k, wait in enumerate([5, 10, 20, 40]):
        spared.settle(1 + k, Prepare)
        spared.planes[1 + k].die(1)
        died = spared.now
        spared.let_time_pass(3 + k, step=0.25)
        assert wait <= spared.launched[2 + k] - died + 1e-6 <= wait + 3
    assert spared.supervisor.pid == 100
    assert spared.kinds(0) == ["Open", "Serve"]


def test_a_spare_that_died_with_the_data_plane_is_no_reason_to_wait_or_to_blame_a_model(spared: World) -> None:
    for k in range(4):  # as often as it would take to have the bundle left out
        current, spare = spared.planes[-2], spared.planes[-1]
        spare._returncode = -9
        spare._ended.set()  # dead, but the supervisor has not heard of it
        current.die(-9)
        spared.wait_for(DataPlaneExit, pid=current.pid)
        spared.let_time_pass(3 + 2 * k, step=0.25)
        fresh = len(spared.planes) - 1
        spared.settle(fresh, Open)
        assert spared.served(fresh) == [(0, "digits", 1)]
        spare._answers.put(None)
        spared.pass_seconds(70)
        spared.settle(fresh + 1, Prepare)
    assert not [event for event in spared.seen if isinstance(event, Refused)]


def test_a_spare_that_dies_while_it_steps_in_counts_as_a_death_but_blames_no_model(spared: World) -> None:
    spared.dies_on = lambda order: isinstance(order, Serve)
    spared.planes[0].die(-9)
    spared.wait_for(DataPlaneExit, pid=101, planned=False)
    for k in range(2, 5):
        spared.let_time_pass(k + 1, step=0.25)
        spared.wait_for(DataPlaneExit, pid=100 + k)
    spared.wait_for(Refused, ticket=0, reason="3 data planes died while they loaded it")


def test_where_data_planes_die_one_after_the_other_a_spare_waits_for_one_that_lives(spared: World) -> None:
    spared.planes[0].die(-9)  # plane 1 steps in
    spared.let_time_pass(3, step=0.25)  # plane 2 is a spare
    spared.settle(2, Prepare)
    spared.planes[1].die(-9)
    spared.wait_for(DataPlaneExit, pid=101)
    spared.pass_seconds(1)  # the second restart is not immediate
    spared.eventually(lambda: spared.supervisor.pid == 102)
    spared.settle(2, Open)
    opened = spared.now
    spared.let_time_pass(4, step=0.25)
    assert spared.launched[3] - opened >= 59


def test_a_planned_restart_takes_a_new_process_and_renews_the_spare(spared: World) -> None:
    spared.supervisor.restart_planned()
    spared.wait_for(DataPlaneExit, pid=100, returncode=0, planned=True)
    assert spared.supervisor.pid == 102
    spared.eventually(lambda: spared.kinds(1) == ["Prepare", "Drain"])
    spared.let_time_pass(4, step=0.25)
    spared.settle(3, Prepare)
    spared.eventually(lambda: spared.supervisor.spare_pid == 103)
    assert [event.pid for event in spared.seen if isinstance(event, DataPlaneExit)] == [100]


def test_stopping_ends_the_spare_too(spared: World) -> None:
    spared.supervisor.stop()
    assert [spared.kinds(k)[-1] for k in (0, 1)] == ["Drain", "Drain"]
    assert spared.supervisor.spare_pid is None


def test_a_spare_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with running(World(tmp_path, spare=True)) as world:
        world.supervisor.serve(1, world.model("v1", 1))
        world.wait_for(Serving, ticket=1)
        world.let_time_pass(2, step=0.25)
        world.settle(1, Prepare)
        world.mute = lambda order: isinstance(order, Drain)
    assert world.planes[1].killed


def test_while_memory_is_short_no_spare_is_started(world: World) -> None:
    world.available = ROOM_TO_START - 1
    world.pass_seconds(40)
    assert len(world.launched) == 1
    world.available = ROOM_TO_START
    world.let_time_pass(2, step=0.25)
    world.settle(1, Prepare)


def test_when_memory_becomes_short_the_spare_is_let_go(spared: World) -> None:
    spared.available = ROOM_TO_STAY
    spared.pass_seconds(40)
    assert spared.kinds(1) == ["Prepare"]
    spared.available = ROOM_TO_STAY - 1
    spared.pass_seconds(40)
    spared.eventually(lambda: spared.kinds(1) == ["Prepare", "Drain"])
    spared.eventually(lambda: spared.supervisor.spare_pid is None)


def test_while_the_governor_eases_the_device_no_spare_is_started(world: World) -> None:
    world.supervisor.govern(govern(Level.EASED))
    world.pass_seconds(40)
    assert len(world.launched) == 1
    world.supervisor.govern(govern(Level.NORMAL))
    world.let_time_pass(2, step=0.25)


def test_a_spare_is_let_go_at_once_when_the_governor_says_that_memory_is_short(spared: World) -> None:
    spared.supervisor.govern(govern(Level.EASED))
    spared.pass_seconds(2)
    assert spared.kinds(1) == ["Prepare"]
    spared.supervisor.govern(govern(Level.EASED, reload=False))
    spared.pass_seconds(2)
    spared.eventually(lambda: spared.kinds(1) == ["Prepare", "Drain"])


def test_a_spare_is_let_go_when_nothing_serves_any_more(spared: World) -> None:
    spared.supervisor.withdraw(2, "digits")
    spared.wait_for(Withdrawn, ticket=2)
    spared.pass_seconds(40)
    spared.eventually(lambda: spared.kinds(1) == ["Prepare", "Drain"])


def test_a_spare_is_told_when_models_run_on_something_it_has_not_imported(spared: World) -> None:
    spared.runtime = RuntimeName.TFLITE_RUNTIME
    spared.supervisor.serve(2, spared.model("v2", 5, "faces"))
    spared.wait_for(Serving, ticket=2)
    spared.eventually(lambda: len(spared.planes[1].orders) == 2)
    assert spared.planes[1].orders[1].runtimes == (RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME)
