"""Data planes in memory for the supervisor: they answer as they should, unless a test wants otherwise."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from inference_parts import servable

from agent.channel import (
    Answer,
    ChannelClosed,
    Drain,
    Open,
    Opened,
    Order,
    Ready,
    Refused,
    Serve,
    Serving,
    StatisticsDelta,
    Withdraw,
    Withdrawn,
)
from agent.ports import StoredModel
from agent.supervisor import Event, Supervisor
from protocol.states import RuntimeName

PATIENCE = 20.0


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
        if not world.sleepy:
            self.wake()

    @property
    def pid(self) -> int:
        return self._pid

    def wake(self) -> None:
        self._answers.put(Ready(pid=self._pid, runtimes=(RuntimeName.LITERT,)))

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
                        runtime=self._world.runtime,
                        took_us=1,
                    )
                )
            case Open():
                self._answers.put(Opened())
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

    def __init__(self, root: Path, *, spare: bool = False) -> None:
        self.root = root
        self.planes: list[FakePlane] = []
        self.failing_launches: deque[OSError] = deque()
        self.launched: list[float] = []
        self.now = 1000.0
        self.available: int | None = None  # bytes of memory
        self.runtime = RuntimeName.LITERT  # that models run on
        self.sleepy = False  # planes take their time until they are ready
        self.dies_on: Callable[[Order], bool] = lambda _: False
        self.mute: Callable[[Order], bool] = lambda _: False
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.seen: list[Event] = []
        self.unclaimed: list[Event] = []
        self.supervisor = Supervisor(
            self,
            self.events.put,
            clock=lambda: self.now,
            first_backoff=0.1,
            max_backoff=10,
            stop_seconds=0.2,
            spare=spare,
            memory_available=lambda: self.available,
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

    def let_time_pass(self, launches: int, step: float = 0.05) -> None:
        """Move the clock in small steps until the supervisor has launched this often."""
        for _ in range(2000):
            if len(self.launched) >= launches:
                return
            self.now += step
            self.supervisor.withdraw(10_000, "nothing")  # wakes the thread, as any message does
            threading.Event().wait(0.002)
        raise AssertionError(f"launched {len(self.launched)} times, not {launches}")

    def pass_seconds(self, seconds: float) -> None:
        """Let time pass, step by step, and give the supervisor the chance to act in each."""
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.supervisor.withdraw(10_000, "nothing")
            threading.Event().wait(0.004)

    def eventually(self, happened: Callable[[], bool]) -> None:
        """Wait until something is so; time passes only by itself."""
        for _ in range(int(PATIENCE / 0.005)):
            if happened():
                return
            threading.Event().wait(0.005)
        raise AssertionError(f"it did not happen: {[self.kinds(k) for k in range(len(self.planes))]}")

    def kinds(self, plane: int) -> list[str]:
        """Return what a plane was ordered, without what `let_time_pass` orders."""
        return [
            type(order).__name__
            for order in self.planes[plane].orders
            if not (isinstance(order, Withdraw) and order.ticket == 10_000)
        ]

    def served(self, plane: int) -> list[tuple[int, str, int]]:
        return [(o.ticket, o.model, o.version) for o in self.planes[plane].orders if isinstance(o, Serve)]


@contextmanager
def running(world: World) -> Iterator[World]:
    """Start the supervisor, and stop it at the end."""
    world.supervisor.start()
    try:
        yield world
    finally:
        stopping = threading.Thread(target=world.supervisor.stop)
        stopping.start()
        while stopping.is_alive():
            world.now += 0.1  # time passes, so that a plane that does not end is killed
            stopping.join(0.05)
