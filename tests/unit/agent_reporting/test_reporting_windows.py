from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.windows import LONGEST, SHORTEST, Windows
from protocol.messages import Window
from protocol.statistics import ModelStatistics, TruthStatistics

MINUTE = 60_000
NOON = 1_750_000_020_000 // MINUTE * MINUTE  # some whole UTC minute


def test_what_was_turned_away_adds_up_in_a_window() -> None:
    windows = Windows(NOON, MINUTE)
    for late in (1, 2):
        windows.add([ModelStatistics(digest="d1", dropped=5, late=late, shed=1)])
    window = windows.close(NOON + MINUTE)
    assert window is not None
    assert window.models == (ModelStatistics(digest="d1", dropped=10, late=3, shed=2),)


def served(requests: int, digest: str = "d1") -> ModelStatistics:
    return ModelStatistics(digest=digest, requests=requests)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What `close` returns when it is asked at these times (ms after NOON), one request having come before each."""

    name: str
    begin: int
    asked: Sequence[int]
    windows: Sequence[tuple[int, int, int]]  # start after NOON, span, requests


CASES = [
    Case(name="nothing is due", begin=0, asked=[1000, 30_000, 59_999], windows=[]),
    Case(name="a whole minute", begin=0, asked=[30_000, 60_000], windows=[(0, MINUTE, 2)]),
    Case(
        name="the first window begins when the agent does",
        begin=45_000,
        asked=[60_000, 120_000],
        windows=[(45_000, 15_000, 1), (60_000, MINUTE, 1)],
    ),
    Case(name="a late tick still ends on the minute", begin=0, asked=[61_500], windows=[(0, MINUTE, 1)]),
    Case(
        name="a missed minute makes a longer window", begin=0, asked=[50_000, 125_000], windows=[(0, 2 * MINUTE, 2)]
    ),
    Case(
        name="a jump forward closes at the last known time",
        begin=0,
        asked=[20_000, 9_000_000, 9_060_000],
        windows=[(0, 20_000, 2), (9_000_000, MINUTE, 1)],
    ),
    Case(
        name="a jump backward closes at the last known time",
        begin=0,
        asked=[20_000, -9_000_000, -8_940_000],
        windows=[(0, 20_000, 2), (-9_000_000, MINUTE, 1)],
    ),
    Case(
        name="a jump backward before the window's start",
        begin=0,
        asked=[20_000, -500, 1000],
        windows=[(0, 20_000, 2), (-500, 500, 1)],
    ),
    Case(name="a small step back inside a window", begin=0, asked=[20_000, 19_000, 60_000], windows=[(0, MINUTE, 3)]),
    Case(name="a jump at once", begin=0, asked=[9_000_000], windows=[(0, 1, 1)]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_windows_close_on_utc_multiples(case: Case) -> None:
    windows = Windows(NOON + case.begin)
    closed: list[Window] = []
    for at in case.asked:
        windows.add([served(1)])
        window = windows.close(NOON + at)
        if window is not None:
            closed.append(window)
    found = [(w.start - NOON, w.span, sum(m.requests for m in w.models)) for w in closed]
    assert list(case.windows) == found


def test_an_idle_window_is_a_sign_of_life() -> None:
    windows = Windows(NOON)
    assert Window(start=NOON, span=MINUTE) == windows.close(NOON + MINUTE)


def test_models_are_added_up_by_digest() -> None:
    windows = Windows(NOON)
    windows.add([served(1), served(10, "d2")])
    windows.add([served(2)])
    window = windows.close(NOON + MINUTE)
    assert window is not None
    assert (served(3), served(10, "d2")) == window.models


def test_truth_is_taken_once_and_is_not_bound_to_the_window() -> None:
    windows = Windows(NOON)
    early, late = [TruthStatistics(digest="d1", minute=NOON, confusion=((k, 1, 1),)) for k in (0, 1)]
    windows.add([], [early])
    windows.add([], [late])
    merged = TruthStatistics(digest="d1", minute=NOON, confusion=((0, 1, 1), (1, 1, 1)))
    assert (merged,) == windows.take_truth()
    assert () == windows.take_truth()


def test_a_new_length_holds_at_once_and_spans_stay_true() -> None:
    windows = Windows(NOON)
    windows.close(NOON + 10_500)
    windows.set_length(2000)
    assert Window(start=NOON, span=10_000) == windows.close(NOON + 11_000)
    assert Window(start=NOON + 10_000, span=2000) == windows.close(NOON + 12_100)
    windows.set_length(MINUTE)
    assert windows.close(NOON + 30_000) is None
    assert Window(start=NOON + 12_000, span=48_000) == windows.close(NOON + MINUTE)


@pytest.mark.parametrize(("asked", "given_"), [(0, SHORTEST), (-5, SHORTEST), (10**12, LONGEST), (5000, 5000)])
def test_the_length_is_bounded(asked: int, given_: int) -> None:
    assert given_ == Windows(NOON, asked).length


def test_flush_ends_the_window_early() -> None:
    windows = Windows(NOON)
    windows.add([served(3)])
    assert Window(start=NOON, span=1500, models=(served(3),)) == windows.flush(NOON + 1500)
    assert windows.flush(NOON + 1500) is None


@given(st.lists(st.tuples(st.integers(-10_000_000, 10_000_000), st.integers(0, 5)), max_size=50))
def test_no_count_is_lost_and_no_span_is_negative_however_the_clock_jumps(steps: list[tuple[int, int]]) -> None:
    now = NOON
    windows = Windows(now)
    closed: list[Window | None] = []
    for step, requests in steps:
        now += step
        windows.add([served(requests)])
        closed.append(windows.close(now))
    closed.append(windows.flush(now))
    found = [window for window in closed if window is not None]
    assert sum(n for _, n in steps) == sum(m.requests for window in found for m in window.models)
    assert all(window.span >= 1 for window in found)
