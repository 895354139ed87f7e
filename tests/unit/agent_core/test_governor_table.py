"""When a device is eased, and when no more. A story is a list of (seconds, readings), told once a second."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.governor import (
    LEVELS,
    LOST_SECONDS,
    TABLE,
    WORST,
    BadPolicy,
    Governor,
    GovernorPolicy,
    Level,
    Readings,
    Step,
    Trigger,
    check_policy,
    part,
)
from agent.inference.pool import DEFAULT_PRIORITY, LOWEST

POLICY = GovernorPolicy(step_seconds=10, back_seconds=60)
NORMAL, EASED, STRAINED, DISTRESS = Level
NOTHING = Readings()
COOL, WARM, HOT = (Readings(temperature=degrees) for degrees in (70.0, 78.0, 83.0))
ROOMY, SHORT = Readings(memory=50.0, stall=0.0), Readings(memory=4.0, stall=0.0)
FULL, LOW = Readings(battery=90.0, discharging=True), Readings(battery=15.0, discharging=True)

Story = Sequence[tuple[int, Readings]]


def tell(story: Story, governor: Governor | None = None, start: float = 1000.0) -> list[tuple[int, Step]]:
    """Return the steps, each with the second in which it came."""
    governor = governor or Governor(POLICY)
    steps, second = [], 0
    for seconds, readings in story:
        for _ in range(seconds):
            if step := governor.take(readings, start + second):
                steps.append((second, step))
            second += 1
    return steps


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        pytest.param([(500, NOTHING)], [], id="a-machine-without-sensors-is-never-eased"),
        pytest.param([(500, COOL)], [], id="cool"),
        pytest.param([(500, WARM)], [], id="between-the-limits-nothing-begins"),
        pytest.param([(10, HOT), (300, COOL)], [], id="shorter-than-the-dwell"),
        pytest.param([(9, HOT), (1, WARM), (9, HOT), (9, COOL)], [], id="an-interruption-begins-anew"),
        pytest.param([(11, HOT), (9, COOL)], [(10, EASED)], id="one-step"),
        pytest.param([(300, HOT)], [(10, EASED), (20, STRAINED), (30, DISTRESS)], id="step-by-step-to-the-worst"),
        pytest.param([(11, HOT), (500, WARM)], [(10, EASED)], id="between-the-limits-nothing-ends"),
        pytest.param([(11, HOT), (70, COOL)], [(10, EASED), (71, NORMAL)], id="back-after-the-longer-wait"),
        pytest.param(
            [(31, HOT), (300, COOL)],
            [(10, EASED), (20, STRAINED), (30, DISTRESS), (91, STRAINED), (151, EASED), (211, NORMAL)],
            id="back-one-step-at-a-time",
        ),
        pytest.param(
            [(11, HOT), (59, COOL), (1, WARM), (20, COOL)], [(10, EASED), (71, NORMAL)], id="warm-again-does-not-hold"
        ),
        pytest.param(
            [(11, HOT), (59, COOL), (1, HOT), (80, COOL)], [(10, EASED), (131, NORMAL)], id="hot-again-begins-anew"
        ),
        pytest.param([(11, HOT), (300, NOTHING)], [(10, EASED)], id="a-sensor-that-vanishes-while-hot-holds"),
        pytest.param(
            [(11, HOT), (30, COOL), (200, NOTHING), (2, COOL)],
            [(10, EASED), (241, NORMAL)],
            id="a-sensor-that-vanishes-while-cool-holds-until-it-is-back",
        ),
        pytest.param(
            [(11, HOT), (700, NOTHING)],
            [(10, EASED), (10 + int(LOST_SECONDS) + 61, NORMAL)],
            id="a-sensor-that-is-gone-for-good-is-forgotten",
        ),
        pytest.param([(5, HOT), (100, NOTHING), (1, HOT)], [(105, EASED)], id="a-gap-is-no-reading-below-the-limit"),
        pytest.param([(5, HOT), (100, NOTHING), (1, COOL), (20, NOTHING)], [], id="nor-one-above-it"),
        pytest.param([(50, Readings(throttled=True))], [(10, EASED), (20, STRAINED)], id="throttled"),
        pytest.param(
            [(1, Readings(frequency=100)), (50, Readings(frequency=60))],
            [(11, EASED), (21, STRAINED)],
            id="the-frequency-is-capped",
        ),
        pytest.param([(50, Readings(frequency=60))], [], id="a-cap-from-before-is-an-operators"),
        pytest.param([(50, SHORT)], [(10, EASED), (20, STRAINED), (30, DISTRESS)], id="memory-is-short"),
        pytest.param([(11, Readings(memory=50.0, stall=30.0))], [(10, EASED)], id="tasks-wait-for-memory"),
        pytest.param([(50, LOW)], [(10, EASED), (20, STRAINED)], id="the-battery-is-low"),
        pytest.param([(50, replace(LOW, discharging=False))], [], id="low-but-charging"),
        pytest.param([(50, replace(LOW, discharging=None))], [], id="low-but-nobody-knows-whether-it-charges"),
        pytest.param(
            [(21, LOW), (200, replace(LOW, discharging=False))],
            [(10, EASED), (20, STRAINED), (81, EASED), (141, NORMAL)],
            id="plugged-in",
        ),
        pytest.param([(31, Readings(under_voltage=True))], [(10, EASED), (20, STRAINED), (30, DISTRESS)], id="volts"),
        pytest.param(
            [(31, replace(LOW, temperature=83.0)), (300, replace(LOW, temperature=70.0))],
            [(10, EASED), (20, STRAINED), (30, DISTRESS), (91, STRAINED)],
            id="back-to-the-worst-that-the-rest-may-lead-to",
        ),
        pytest.param(
            [(15, replace(HOT, memory=50.0)), (30, replace(COOL, memory=4.0))],
            [(10, EASED), (25, STRAINED), (35, DISTRESS)],
            id="another-trigger-goes-on-where-one-ends",
        ),
        pytest.param([(11, Readings(temperature=math.nan))], [], id="no-number"),
    ],
)
def test_the_level_follows_the_readings(story: Story, expected: list[tuple[int, Level]]) -> None:
    assert expected == [(second, step.after) for second, step in tell(story)]


@pytest.mark.parametrize(
    ("story", "said"),
    [
        pytest.param(
            [(11, HOT)],
            ["heat: 83.0 °C for 10 s, limit 80.0 °C: shadow paused, 1 of 2 interpreters (normal → eased)"],
            id="heat",
        ),
        pytest.param(
            [(11, HOT), (61, replace(COOL, memory=41.0))],
            ["", "better for 60 s (heat 70.0 °C, memory 41.0 % available): everything as it is set (eased → normal)"],
            id="back",
        ),
        pytest.param(
            [(11, Readings(throttled=True, memory=4.0))],
            [
                (
                    "throttling: the CPU is slowed down for 10 s; memory: 4.0 % available for 10 s, limit 5.0 %: "
                    "shadow paused, 1 of 2 interpreters (normal → eased)"
                )
            ],
            id="two-causes",
        ),
        pytest.param(
            [(31, HOT)],
            [
                "",
                (
                    "heat: 83.0 °C for 20 s, limit 80.0 °C: "
                    "shadow paused, 1 of 2 interpreters, 2 of 4 threads each (eased → strained)"
                ),
                (
                    "heat: 83.0 °C for 30 s, limit 80.0 °C: shadow paused, 1 of 2 interpreters, 1 of 4 threads each, "
                    "only priorities 1 to 5 are answered (strained → distress)"
                ),
            ],
            id="the-worst",
        ),
        pytest.param(
            [(21, LOW)],
            [
                (
                    "battery: 15 % and discharging for 10 s, limit 20 %: "
                    "shadow paused, 1 of 2 interpreters (normal → eased)"
                ),
                "",
            ],
            id="battery",
        ),
        pytest.param(
            [(21, SHORT)],
            [
                "",
                (
                    "memory: 4.0 % available for 20 s, limit 5.0 %: shadow paused, 1 of 2 interpreters, "
                    "threads as they are, for memory is short (eased → strained)"
                ),
            ],
            id="no-reload-while-memory-is-short",
        ),
    ],
)
def test_a_step_says_why_with_its_numbers_and_what_is_done(story: Story, said: list[str]) -> None:
    steps = tell(story, Governor(POLICY, interpreters=2, threads=4))
    assert len(said) == len(steps)
    assert [expected or step.said for expected, (_, step) in zip(said, steps, strict=True)] == [
        step.said for _, step in steps
    ]


def test_what_cannot_be_taken_away_is_not_named() -> None:
    (_, step), *_ = tell([(21, HOT)], Governor(POLICY))
    assert step.said.endswith("limit 80.0 °C: shadow paused (normal → eased)")
    measured = tell([(21, HOT)], Governor(POLICY, threads=None))
    assert "1 in 2 of each model's threads" in measured[1][1].said


def test_nothing_is_loaded_again_while_memory_is_short_and_it_is_afterwards() -> None:
    governor = Governor(POLICY)
    tell([(21, replace(HOT, memory=50.0))], governor)
    assert governor.measures == TABLE[STRAINED]
    tell([(1, replace(HOT, memory=4.0))], governor, 1100)
    assert not governor.measures.reload
    tell([(1, replace(HOT, memory=7.0))], governor, 1101)
    assert not governor.measures.reload
    tell([(1, replace(HOT, memory=8.0))], governor, 1102)
    assert governor.measures == TABLE[governor.level]


def test_every_level_has_its_measures_and_none_is_milder_than_the_one_before() -> None:
    assert list(TABLE) == list(LEVELS)
    assert list(WORST) == list(Trigger)
    hardness = [(not m.shadow, m.interpreters, m.threads, -m.lowest) for m in TABLE.values()]
    assert all(a <= b for one, other in itertools.pairwise(hardness) for a, b in zip(one, other, strict=True))
    assert TABLE[NORMAL].lowest == LOWEST
    assert TABLE[DISTRESS].lowest == DEFAULT_PRIORITY  # who says nothing of a priority is answered


@pytest.mark.parametrize(
    ("count", "one_in", "left"), [(1, 4, 1), (2, 2, 1), (3, 2, 2), (4, 4, 1), (5, 4, 2), (7, 1, 7)]
)
def test_at_least_one_is_left(count: int, one_in: int, left: int) -> None:
    assert left == part(count, one_in)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"temperature_leave": 80.0}, "temperature_leave is 80; it must be below", id="heat"),
        pytest.param({"memory_leave": 5.0}, "memory_leave is 5; it must be above", id="memory"),
        pytest.param({"stall_leave": 25.0}, "stall_leave is 25; it must be below", id="stall"),
        pytest.param({"battery": 40.0}, "battery_leave is 30; it must be above", id="battery"),
        pytest.param({"frequency": 95.0}, "frequency_leave is 95; it must be above", id="frequency"),
        pytest.param({"step_seconds": 61}, "back_seconds is 60; it must not be below", id="back-sooner-than-step"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: dict[str, float], said: str) -> None:
    with pytest.raises(BadPolicy, match=said):
        check_policy(GovernorPolicy(**changes))


def test_a_limit_of_zero_is_not_looked_at() -> None:
    off = GovernorPolicy(temperature=0, throttling=False, frequency=0, memory=0, stall=0, battery=0)
    check_policy(off)
    everything = Readings(temperature=140, throttled=True, memory=0, stall=100, battery=0, discharging=True)
    assert [] == tell([(100, everything)], Governor(off))


# ---------------------------------------------------------------- whatever the readings are
def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


percents = st.floats(0, 100)
any_readings = st.builds(
    Readings,
    temperature=maybe(st.floats(-50, 150)),
    throttled=maybe(st.booleans()),
    frequency=maybe(percents),
    memory=maybe(percents),
    stall=maybe(percents),
    under_voltage=maybe(st.booleans()),
    battery=maybe(percents),
    discharging=maybe(st.booleans()),
)
stories = st.lists(st.tuples(st.integers(1, 40), any_readings), max_size=12)
FINE = Readings(
    temperature=40,
    throttled=False,
    frequency=100,
    memory=60,
    stall=0,
    under_voltage=False,
    battery=90,
    discharging=False,
)


@given(stories)
@settings(max_examples=60, deadline=None)
def test_it_never_flaps_and_never_skips_a_level(story: Story) -> None:
    steps, last, before = tell(story), -math.inf, NORMAL
    for second, step in steps:
        assert step.before is before
        assert abs(step.after.rank - step.before.rank) == 1
        wait = POLICY.step_seconds if step.after.rank > step.before.rank else POLICY.back_seconds
        assert second - last >= wait
        last, before = second, step.after


@given(stories, any_readings)
@settings(max_examples=40, deadline=None)
def test_no_step_comes_while_the_sensors_are_silent(story: Story, last: Readings) -> None:
    governor = Governor(POLICY)
    tell([*story, (1, replace(last, temperature=70.0))], governor)
    end = 1000.0 + sum(seconds for seconds, _ in story)
    assert [None] * 18 == [governor.take(NOTHING, end + after) for after in range(1, int(LOST_SECONDS), 34)]


@given(stories)
@settings(max_examples=40, deadline=None)
def test_it_returns_to_normal_when_everything_is_fine_for_long_enough(story: Story) -> None:
    governor = Governor(POLICY)
    tell(story, governor)
    start = 1000.0 + sum(seconds for seconds, _ in story)
    tell([(3 * POLICY.back_seconds + 1, FINE)], governor, start)
    assert governor.level is NORMAL
    assert governor.measures == TABLE[NORMAL]


@given(stories)
@settings(max_examples=20, deadline=None)
def test_only_differences_of_time_matter(story: Story) -> None:
    early, late = tell(story, start=0.0), tell(story, start=1e6)
    assert [(second, step.after) for second, step in early] == [(second, step.after) for second, step in late]
