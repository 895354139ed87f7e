"""When a device renews or asks: a table of named situations."""

from math import inf
from typing import Any

import pytest

from agent.core.renewal import (
    ASK_EVERY,
    ASK_WHEN_CUT_OFF,
    PATIENCE,
    SPACING,
    Lease,
    Situation,
    Step,
    next_step,
    rest_after_failure,
    rest_after_refusal,
)

DAY = 24 * 3600 * 1000
NOON = 1_790_000_000_000
YEAR = Lease(start=NOON, end=NOON + 360 * DAY)
DUE = NOON + 240 * DAY
CALM: dict[str, Any] = {"lease": YEAR, "since_answer": 60.0}

CASES: list[tuple[str, dict[str, Any], int, Step]] = [
    ("fresh", {}, NOON, Step.WAIT),
    ("a second before two thirds", {}, DUE - 1000, Step.WAIT),
    ("at two thirds", {}, DUE, Step.RENEW),
    ("expired", {}, NOON + 400 * DAY, Step.RENEW),
    ("due, and rests after a failure", {"rested": 10.0, "rest": 60.0}, DUE, Step.WAIT),
    ("due, and has rested", {"rested": 60.0, "rest": 60.0}, DUE, Step.RENEW),
    ("ordered", {"wanted": True}, NOON, Step.RENEW),
    ("ordered, and renewed a moment ago", {"wanted": True, "since_renewal": 60.0}, NOON, Step.WAIT),
    ("the clock is ten years ahead", {}, NOON + 3650 * DAY, Step.RENEW),
    ("ten years ahead, just renewed", {"since_renewal": 60.0}, NOON + 3650 * DAY, Step.WAIT),
    ("ten years ahead, renewed long ago", {"since_renewal": SPACING}, NOON + 3650 * DAY, Step.RENEW),
    ("the clock is ten years behind", {}, NOON - 3650 * DAY, Step.WAIT),
    ("shut out and due", {"shut_out": True}, DUE, Step.ASK),
    ("shut out, and rests", {"shut_out": True, "rested": 1.0, "rest": 900.0}, DUE, Step.WAIT),
    ("started just now", {"since_answer": inf}, NOON, Step.ASK),
    ("asked yesterday", {"since_answer": ASK_EVERY}, NOON, Step.ASK),
    ("asked this morning", {"since_answer": ASK_EVERY / 2}, NOON, Step.WAIT),
    ("the broker was lost a moment ago", {"cut_off": PATIENCE / 2, "since_answer": ASK_EVERY / 2}, NOON, Step.WAIT),
    ("the broker stays away", {"cut_off": PATIENCE, "since_answer": ASK_WHEN_CUT_OFF}, NOON, Step.ASK),
    ("away, and the server has just answered", {"cut_off": inf, "since_answer": 30.0}, NOON, Step.WAIT),
]


@pytest.mark.parametrize(("changes", "now", "step"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_a_device_does_next(changes: dict[str, Any], now: int, step: Step) -> None:
    assert step is next_step(Situation(**{**CALM, **changes}), now)


def test_a_fleet_enrolled_in_one_day_does_not_renew_in_one_day() -> None:
    due = [Lease(start=NOON, end=NOON + 360 * DAY, chance=chance).due for chance in (0.0, 0.5, 0.999)]
    assert [0, 6, 11] == [(each - DUE) // DAY for each in due]


def test_failures_make_the_rest_longer_up_to_four_hours_and_the_server_may_ask_for_more() -> None:
    assert [60, 120, 240] == [rest_after_failure(n, 1.0) for n in (1, 2, 3)]
    assert rest_after_failure(50, 1.0) == 4 * 3600
    assert rest_after_failure(1, 0.5, retry_after=600.0) == 630
    assert rest_after_failure(1, 0.0) == 0
    assert (rest_after_refusal(0.0), rest_after_refusal(1.0)) == (900, 1800)
