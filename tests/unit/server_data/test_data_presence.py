"""Presence as a table of stories: what was heard, in order, and what to believe then."""

from itertools import permutations

import pytest

from fleet_server.core.presence import Connection, hear, interval_of, state_of
from protocol.messages import Birth, DeviceState, Farewell, Report, Will, Window
from protocol.states import PresenceState as P

MINUTE = 60_000


def birth(connection: int, boot: str = "b1", spool: str = "s1") -> Birth:
    return Birth(boot=boot, connection=connection, at=0, agent="1", device_class="x", spool=spool)


def bye(connection: int, boot: str = "b1") -> Farewell:
    return Farewell(boot=boot, connection=connection, at=0)


def will(connection: int, boot: str = "b1") -> Will:
    return Will(boot=boot, connection=connection)


def told(*messages: DeviceState) -> Connection:
    connection = Connection()
    for at, message in enumerate(messages, 1):
        connection = hear(connection, message, at * 1000)
    return connection


STORIES = [
    ("never heard", [], None, 0, P.NEW),
    ("born and fresh", [birth(1)], 1000, 2000, P.ONLINE),
    ("silent for just three intervals", [birth(1)], 1000, 1000 + 3 * MINUTE, P.ONLINE),
    ("silent for more than three intervals", [birth(1)], 1000, 1001 + 3 * MINUTE, P.STALE),
    ("said good-bye", [birth(1), bye(1)], 2000, 3000, P.OFFLINE),
    ("good-bye long ago", [birth(1), bye(1)], 2000, 10 * MINUTE, P.OFFLINE),
    ("will of this connection", [birth(1), will(1)], 1000, 3000, P.LOST),
    ("will of an older connection is ignored", [birth(2), will(1)], 1000, 3000, P.ONLINE),
    ("farewell of an older connection is ignored", [birth(2), bye(1)], 1000, 3000, P.ONLINE),
    ("will of another boot under the same number is ignored", [birth(2), will(2, "b0")], 1000, 3000, P.ONLINE),
    ("back after a will", [birth(1), will(1), birth(2)], 3000, 4000, P.ONLINE),
    ("late will after coming back", [birth(1), birth(2), will(1)], 3000, 4000, P.ONLINE),
    ("an old birth delivered again after a will", [birth(2), will(2), birth(1)], 1000, 4000, P.LOST),
    ("the same birth again after its will", [birth(2), will(2), birth(2)], 1000, 4000, P.LOST),
    ("will before its birth arrives", [birth(1), will(2), birth(2)], 1000, 4000, P.LOST),
    ("heard since the will", [birth(1), will(1)], 2500, 3000, P.ONLINE),
    ("heard since the will, but silent now", [birth(1), will(1)], 2500, 10 * MINUTE, P.LOST),
    ("good-bye and then the broker's will", [birth(1), bye(1), will(1)], 2000, 3000, P.OFFLINE),
    ("installed anew, numbers start over", [birth(9), birth(1, "b2", "s2")], 2000, 3000, P.ONLINE),
    ("heard, but its birth has not arrived", [], 1000, 2000, P.ONLINE),
    ("heard long ago, and its birth never arrived", [], 1000, 10 * MINUTE, P.STALE),
    ("will of a device never born", [will(3)], None, 3000, P.NEW),
]


@pytest.mark.parametrize(
    ("messages", "last_seen", "now", "expected"), [s[1:] for s in STORIES], ids=[s[0] for s in STORIES]
)
def test_presence_follows_the_story(
    messages: list[DeviceState], last_seen: int | None, now: int, expected: P
) -> None:
    actual = state_of(told(*messages), last_seen=last_seen, now=now, interval=MINUTE)
    assert actual == expected


def test_a_revoked_device_is_revoked_whatever_it_says() -> None:
    assert state_of(told(birth(1)), last_seen=1, now=2, interval=MINUTE, revoked=True) == P.REVOKED


def test_the_order_of_arrival_does_not_matter_for_one_installation() -> None:
    messages = [birth(1), will(1), birth(2), bye(2), birth(3)]
    for order in permutations(messages):
        known = told(*order)
        assert (known.connected, known.birth) == (True, birth(3))


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (Report(spool="s", sequence=1, windows=(Window(start=0, span=60_000),)), 60_000),
        (Report(spool="s", sequence=1, windows=tuple(Window(start=i, span=60_000) for i in range(5))), 300_000),
        (Report(spool="s", sequence=1, windows=(Window(start=0, span=2_000),)), 5_000),
        (Report(spool="s", sequence=1, windows=(Window(start=0, span=10**12),)), 900_000),
        (Report(spool="s", sequence=9, covers=3, windows=(Window(start=0, span=60_000),)), None),
        (Report(spool="s", sequence=1), None),
    ],
    ids=["one window", "a batch of five", "never below five seconds", "never above", "a backlog", "empty"],
)
def test_the_rhythm_of_a_device_is_judged_by_its_reports(report: Report, expected: int | None) -> None:
    assert interval_of(report) == expected
