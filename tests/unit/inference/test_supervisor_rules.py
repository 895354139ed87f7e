"""The supervisor on data planes in memory: what it orders, restarts and answers. Time is the test's."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest
from inference_parts import servable

from agent.channel import (
    Answer,
    ChannelClosed,
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
from agent.ports import DataPlaneExit, StoredModel
from agent.supervisor import Event, Supervisor
from protocol.states import RuntimeName

PATIENCE = 5.0


class FakePlane:
    """A data plane that answers as it should, unless the test wants otherwise."""

    def __init__(self, world: "World", pid: int) -> None:
        self._world = world
        self._pid = pid
        self.orders: list[Order] = []
        self.killed = False
        self._answers: SimpleQueue[Answer | None] = SimpleQueue()
        self._returncode: int | None = None
        self._ended = threading.Event()
        self._answers.put(Ready(pid=pid, runtimes=(RuntimeName.LITERT,)))

    @property
    def pid(self) -> int:
        return self._pid

    def send(self, order: Order) -> None:
        if self._ended.is_set():
            raise ChannelClosed("gone")
        self.orders.append(order)
        if self._world.dies_on(order):
            self.die(-11)
        elif not self._world.mute(order):
            self._answer(order)

    def _answer(self, order: Order) -> None:
        match order:
            case Serve(version=13):
                self._answers.put(Refused(ticket=order.ticket, model=order.model, reason="unlucky"))
            case Serve():
                self._answers.put(
                    Serving(
                        ticket=order.ticket,
                        model=order.model,
                        version=order.version,
                        digest=order.digest,
                        runtime=RuntimeName.LITERT,
                        took_us=1,
                    )
                )
            case Withdraw():
                self._answers.put(Withdrawn(ticket=order.ticket, model=order.model))
            case Drain():
                self._answers.put(StatisticsDelta(unknown_truth=1))
                self.die(0)

    def die(self, returncode: int) -> None:
        self._returncode = returncode
        self._ended.set()
        self._answers.put(None)

    def receive(self) -> Answer:
        answer = self._answers.get(timeout=PATIENCE * 4)
        if answer is None:
            raise ChannelClosed("gone")
        return answer

    def wait(self, timeout: float | None = None) -> int | None:
        self._ended.wait(timeout)
        return self._returncode

    def kill(self) -> None:
        self.killed = True
        if not self._ended.is_set():
            self.die(-9)


class World:
    """The supervisor with everything around it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.planes: list[FakePlane] = []
        self.failing_launches: deque[OSError] = deque()
        self.launched: list[float] = []
        self.now = 1000.0
        self.dies_on: Callable[[Order], bool] = lambda _: False
        self.mute: Callable[[Order], bool] = lambda _: False
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.seen: list[Event] = []
        self.unclaimed: list[Event] = []
        self.supervisor = Supervisor(
            self, self.events.put, clock=lambda: self.now, first_backoff=0.1, max_backoff=10, stop_seconds=0.2
        )

    def launch(self) -> FakePlane:
        self.launched.append(self.now)
        if self.failing_launches:
            raise self.failing_launches.popleft()
        plane = FakePlane(self, 100 + len(self.planes))
        self.planes.append(plane)
        return plane

    def model(self, example: str, version: int, name: str = "digits") -> StoredModel:
        one = servable(self.root, example, version, model=name)
        assert one.manifest
        return StoredModel(digest=one.digest, folder=str(one.path.parent), manifest=one.manifest)

    def wait_for(self, kind: type, **fields: object) -> Event:
        def fits(event: Event) -> bool:
            return isinstance(event, kind) and all(getattr(event, name) == value for name, value in fields.items())

        while not (found := next(filter(fits, self.unclaimed), None)):
            try:
                event = self.events.get(timeout=PATIENCE)
            except Empty:
                raise AssertionError(f"no {kind.__name__} with {fields} came; unclaimed: {self.unclaimed}") from None
            self.seen.append(event)
            self.unclaimed.append(event)
        self.unclaimed.remove(found)  # the order in which different planes are heard is not fixed
        return found

    def settle(self, plane: int, order: type) -> None:
        """Wait until a plane got an order of a kind."""
        deadline = threading.Event()
        for _ in range(int(PATIENCE / 0.005)):
            if len(self.planes) > plane and any(isinstance(one, order) for one in self.planes[plane].orders):
                return
            deadline.wait(0.005)
        raise AssertionError(f"plane {plane} got no {order.__name__}: {[one.orders for one in self.planes]}")

    def let_time_pass(self, launches: int) -> None:
        """Move the clock in small steps until the supervisor has launched this often."""
        for _ in range(2000):
            if len(self.launched) >= launches:
                return
            self.now += 0.05
            self.supervisor.withdraw(10_000, "nothing")  # wakes the thread, as any message does
            threading.Event().wait(0.002)
        raise AssertionError(f"launched {len(self.launched)} times, not {launches}")

    def served(self, plane: int) -> list[tuple[int, str, int]]:
        return [(o.ticket, o.model, o.version) for o in self.planes[plane].orders if isinstance(o, Serve)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    one.supervisor.start()
    yield one
    stopping = threading.Thread(target=one.supervisor.stop)
    stopping.start()
    while stopping.is_alive():
        one.now += 0.1  # time passes, so that a plane that does not end is killed
        stopping.join(0.05)


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
