"""The governor's driver: what it orders and records."""

from agent.channel import Govern
from agent.core.governor import TABLE, Governor, GovernorPolicy, Level, Measures, Readings
from agent.governing import Governing
from protocol.states import EventKind

HOT, COOL = Readings(temperature=85.0, memory=50.0), Readings(temperature=50.0, memory=50.0)


class World:
    """Sensors, a data plane and an event log in memory."""

    def __init__(self) -> None:
        self.readings = COOL
        self.orders: list[Govern] = []
        self.events: list[tuple[EventKind, str]] = []
        governor = Governor(GovernorPolicy(step_seconds=1, back_seconds=2), interpreters=2)
        self.governing = Governing(sensors=self, governor=governor, plane=self, events=self)
        self._second = 0.0

    def read(self) -> Readings:
        return self.readings

    def govern(self, order: Govern) -> None:
        self.orders.append(order)

    def record(self, *, kind: EventKind, detail: str = "", **_: object) -> None:
        self.events.append((kind, detail))

    def pass_seconds(self, seconds: int, readings: Readings) -> None:
        self.readings = readings
        for _ in range(seconds):
            self.governing.decide(self.governing.feel(self._second))
            self._second += 1


def test_the_first_order_says_that_all_is_normal_and_is_no_event() -> None:
    world = World()
    world.pass_seconds(5, COOL)
    assert [Govern(level=Level.NORMAL, measures=TABLE[Level.NORMAL])] == world.orders
    assert [] == world.events


def test_every_step_is_an_order_and_an_event_and_nothing_else_is() -> None:
    world = World()
    world.pass_seconds(3, HOT)
    world.pass_seconds(10, COOL)
    levels = [order.level.value for order in world.orders]
    assert ["normal", "eased", "strained", "eased", "normal"] == levels
    assert [EventKind.GOVERNOR] * 4 == [kind for kind, _ in world.events]
    assert world.events[0][1].startswith("heat: 85.0 °C for 1 s, limit 80.0 °C: shadow paused, 1 of 2 interpreters")


def test_measures_that_change_within_a_level_are_ordered_without_an_event() -> None:
    """Memory becomes short at a level that has fewer threads: nothing may be loaded again until it is not."""
    world = World()
    world.pass_seconds(3, HOT)
    told = len(world.events)
    world.pass_seconds(1, Readings(temperature=78.0, memory=4.0))
    assert world.orders[-1].measures == Measures(shadow=False, interpreters=2, threads=2, lowest=10, reload=False)
    assert told == len(world.events)
