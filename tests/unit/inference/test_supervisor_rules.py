"""The supervisor on data planes in memory: what it orders, restarts and answers. Time is the test's."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_world import FakePlane, World, running

from agent.channel import (
    Drain,
    Open,
    Order,
    Ready,
    Refused,
    Serve,
    Serving,
    StatisticsDelta,
    Withdraw,
    Withdrawn,
)
from agent.ports import DataPlaneExit


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with running(World(tmp_path)) as one:
        yield one


def test_a_new_data_plane_is_opened_when_there_is_nothing_to_serve(world: World) -> None:
    world.wait_for(Ready)
    world.settle(0, Open)
    assert world.supervisor.pid == 100


def test_orders_are_answered_with_their_ticket(world: World) -> None:
    world.supervisor.serve(7, world.model("v1", 1))
    world.wait_for(Serving, ticket=7, version=1)
    world.supervisor.withdraw(8, "digits")
    world.wait_for(Withdrawn, ticket=8)
    world.supervisor.serve(9, world.model("v1", 13))
    world.wait_for(Refused, ticket=9, reason="unlucky")


def test_after_a_death_what_served_is_served_again_before_clients_and_new_orders(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.supervisor.serve(2, world.model("v1", 2))
    world.supervisor.serve(3, world.model("v2", 5, "faces"))
    world.supervisor.serve(4, world.model("v2", 13))  # refused: not among what served
    world.wait_for(Refused, ticket=4)
    world.planes[0].die(-9)
    world.wait_for(DataPlaneExit, pid=100, returncode=-9, planned=False)  # an order before this could die with it
    world.supervisor.serve(5, world.model("v1", 3))
    world.wait_for(Serving, ticket=5)
    assert world.served(1) == [(0, "digits", 2), (0, "faces", 5), (5, "digits", 3)]
    kinds = [type(order) for order in world.planes[1].orders]
    assert kinds == [Serve, Serve, Open, Serve]


def test_a_withdrawn_model_does_not_come_back(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.supervisor.withdraw(2, "digits")
    world.wait_for(Withdrawn, ticket=2)
    world.planes[0].die(-9)
    world.settle(1, Open)
    assert world.served(1) == []


def test_an_order_whose_data_plane_dies_is_answered_by_the_exit_and_the_old_one_comes_back(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.wait_for(Serving, ticket=1)
    world.dies_on = lambda order: isinstance(order, Serve) and order.version == 2
    world.supervisor.serve(2, world.model("v2", 2))
    world.wait_for(DataPlaneExit, planned=False)
    world.settle(1, Open)
    assert world.served(1) == [(0, "digits", 1)]
    assert not [event for event in world.unclaimed if isinstance(event, Refused)]


def test_what_served_before_the_start_is_loaded_before_clients_and_after_every_death(world: World) -> None:
    world.supervisor.serve(0, world.model("v1", 1))
    world.wait_for(Serving, ticket=0, version=1)
    world.planes[0].die(-9)
    world.settle(1, Open)
    assert world.served(1) == [(0, "digits", 1)]


def test_a_withdrawal_whose_data_plane_dies_has_happened(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.wait_for(Serving, ticket=1)
    world.dies_on = lambda order: isinstance(order, Withdraw)
    world.supervisor.withdraw(2, "digits")
    world.wait_for(Withdrawn, ticket=2)
    world.settle(1, Open)
    assert world.served(1) == []


def test_restarts_come_at_once_then_ever_later_until_one_lives_long(world: World) -> None:
    for k, wait in enumerate([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]):
        world.settle(k, Open)
        world.planes[k].die(1)
        world.wait_for(DataPlaneExit, pid=100 + k)
        died = world.now
        world.let_time_pass(k + 2)
        assert wait <= world.launched[-1] - died + 1e-6 <= wait + 0.5
    world.settle(10, Open)
    world.now += 60
    world.planes[10].die(1)
    world.wait_for(DataPlaneExit, pid=110)
    world.settle(11, Open)
    assert world.launched[-1] == world.now


def test_a_start_that_fails_is_tried_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.failing_launches.extend([OSError("no memory"), OSError("no memory")])
    world.supervisor.start()
    world.let_time_pass(3)
    world.settle(0, Open)
    world.supervisor.stop()
    assert len(world.launched) == 3


def test_a_bundle_that_kills_each_data_plane_that_reloads_it_is_left_out(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.supervisor.serve(2, world.model("v2", 5, "faces"))
    world.wait_for(Serving, ticket=2)
    world.dies_on = lambda order: isinstance(order, Serve) and order.model == "digits"
    world.planes[0].die(-9)
    for k in range(1, 4):
        world.wait_for(DataPlaneExit, pid=99 + k)
        world.let_time_pass(k + 1)
    world.wait_for(Refused, ticket=0, model="digits", reason="3 data planes died while they loaded it")
    world.let_time_pass(5)
    world.settle(4, Open)
    assert world.served(4) == [(0, "faces", 5)]


def test_what_cannot_be_loaded_again_is_dropped_and_the_rest_serves(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.supervisor.serve(2, world.model("v2", 5, "faces"))
    world.wait_for(Serving, ticket=2)
    real, broken = FakePlane._answer, []

    def answer(plane: FakePlane, order: Order) -> None:
        if isinstance(order, Serve) and order.model == "digits":
            broken.append(order)
            plane._answers.put(Refused(ticket=order.ticket, model=order.model, reason="damaged"))
        else:
            real(plane, order)

    FakePlane._answer = answer
    try:
        world.planes[0].die(-9)
        world.wait_for(Refused, ticket=0, model="digits", reason="damaged")
        world.settle(1, Open)
        world.planes[1].die(-9)
        world.let_time_pass(3)
        world.settle(2, Open)
    finally:
        FakePlane._answer = real
    assert (len(broken), world.served(2)) == (1, [(0, "faces", 5)])


def test_a_planned_restart_serves_everything_before_the_old_one_drains(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.wait_for(Serving, ticket=1)
    world.supervisor.restart_planned()
    world.supervisor.serve(2, world.model("v2", 2))
    world.wait_for(DataPlaneExit, pid=100, returncode=0, planned=True)
    world.wait_for(Serving, ticket=2)
    assert [type(order) for order in world.planes[0].orders] == [Open, Serve, Drain]
    assert [type(order) for order in world.planes[1].orders] == [Serve, Open, Serve]
    assert world.supervisor.pid == 101
    assert any(isinstance(event, StatisticsDelta) for event in world.seen)  # the old one's last


def test_a_planned_restart_waits_for_the_answer_to_what_was_asked(world: World) -> None:
    model = world.model("v1", 1)
    world.mute = lambda order: isinstance(order, Serve)
    world.supervisor.serve(1, model)
    world.settle(0, Serve)
    world.supervisor.restart_planned()
    world.supervisor.withdraw(2, "nothing")  # comes after the restart was asked for, so it is held
    threading.Event().wait(0.05)
    assert len(world.planes) == 1
    world.mute = lambda _: False
    world.planes[0]._answer(world.planes[0].orders[-1])
    world.wait_for(DataPlaneExit, pid=100, planned=True)
    assert world.served(1) == [(0, "digits", 1)]
    world.wait_for(Withdrawn, ticket=2)


def test_a_successor_that_dies_leaves_the_old_one_serving(world: World) -> None:
    world.supervisor.serve(1, world.model("v1", 1))
    world.wait_for(Serving, ticket=1)
    world.dies_on = lambda order: isinstance(order, Serve) and order.ticket == 0
    world.supervisor.restart_planned()
    world.wait_for(DataPlaneExit, pid=101, planned=False)
    assert world.supervisor.pid == 100
    world.dies_on = lambda _: False
    world.supervisor.serve(2, world.model("v2", 2))
    world.wait_for(Serving, ticket=2)
    assert world.served(0)[-1] == (2, "digits", 2)


def test_stopping_drains_and_posts_the_last_statistics(world: World) -> None:
    world.settle(0, Open)
    world.supervisor.stop()
    world.wait_for(StatisticsDelta)
    world.wait_for(DataPlaneExit, pid=100, returncode=0, planned=True)
    assert world.supervisor.pid is None
    assert not world.planes[0].killed


def test_a_data_plane_that_does_not_drain_is_killed(world: World) -> None:
    world.mute = lambda order: isinstance(order, Drain)
    world.settle(0, Open)
    stopping = threading.Thread(target=world.supervisor.stop)
    stopping.start()
    world.settle(0, Drain)
    while stopping.is_alive():
        world.now += 0.1
        stopping.join(0.05)
    assert world.planes[0].killed
    world.wait_for(DataPlaneExit, pid=100, returncode=-9, planned=False)


def test_stopping_what_never_started_is_fine(tmp_path: Path) -> None:
    World(tmp_path).supervisor.stop()
