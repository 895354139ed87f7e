"""Which requests are kept: the triggers and the budgets, as tables."""

import pytest

from agent.core.capturing import (
    DAY_MS,
    CapturePolicy,
    Day,
    Refusal,
    Seen,
    Trigger,
    charge,
    choose,
    refuse,
    state_of,
    today,
)

SURE = Seen(model="digits", label=3, margin=0.9, entropy=0.1, chance=0.5)
UNSURE = Seen(model="digits", label=3, margin=0.05, entropy=0.95, chance=0.5)
ON = {"enabled": True}

TRIGGERS = {
    "capture is off": (CapturePolicy(margin_below=1.0, random=1.0), UNSURE, None),
    "no trigger is set": (CapturePolicy(**ON), UNSURE, None),
    "the margin is low": (CapturePolicy(margin_below=0.1, **ON), UNSURE, Trigger.MARGIN),
    "the margin is high": (CapturePolicy(margin_below=0.1, **ON), SURE, None),
    "the margin is at the limit": (CapturePolicy(margin_below=0.05, **ON), UNSURE, None),
    "the entropy is high": (CapturePolicy(entropy_above=0.9, **ON), UNSURE, Trigger.ENTROPY),
    "the entropy is low": (CapturePolicy(entropy_above=0.9, **ON), SURE, None),
    "a regression has neither": (
        CapturePolicy(margin_below=1.0, entropy_above=0.0, class_quota=9, **ON),
        Seen(model="m"),
        None,
    ),
    "the dice say yes": (CapturePolicy(random=0.6, **ON), SURE, Trigger.RANDOM),
    "the dice say no": (CapturePolicy(random=0.5, **ON), SURE, None),
    "the dice are asked for a regression too": (
        CapturePolicy(random=0.1, **ON),
        Seen(model="m", chance=0.0),
        Trigger.RANDOM,
    ),
    "a shadow disagrees": (
        CapturePolicy(disagreement=True, **ON),
        Seen(model="m", disagrees=True),
        Trigger.DISAGREEMENT,
    ),
    "a shadow disagrees and nobody cares": (CapturePolicy(**ON), Seen(model="m", disagrees=True), None),
    "the class has room": (CapturePolicy(class_quota=2, **ON), SURE, Trigger.CLASS_QUOTA),
    "another model": (CapturePolicy(models=("faces",), random=1.0, **ON), SURE, None),
    "this model": (CapturePolicy(models=("digits",), random=1.0, **ON), SURE, Trigger.RANDOM),
    "several at once: the rarest cause": (
        CapturePolicy(margin_below=0.1, entropy_above=0.5, random=1.0, class_quota=5, **ON),
        UNSURE,
        Trigger.MARGIN,
    ),
}


@pytest.mark.parametrize("case", TRIGGERS)
def test_a_sample_is_chosen_by_the_first_trigger_that_asks(case: str) -> None:
    policy, seen, expected = TRIGGERS[case]
    assert expected == choose(policy, seen, Day(quotas={"digits/3": 1}))


def test_a_class_is_chosen_until_its_quota_is_full() -> None:
    policy = CapturePolicy(class_quota=2, **ON)
    assert choose(policy, SURE, Day(quotas={"digits/3": 2})) is None
    assert Trigger.CLASS_QUOTA == choose(policy, SURE, Day(quotas={"digits/4": 2}))


BUDGETS = {
    "room for both": (Day(samples=9, bytes=900), Trigger.MARGIN, None),
    "the last sample was taken": (Day(samples=10), Trigger.MARGIN, Refusal.SAMPLES),
    "the bytes just fit": (Day(bytes=900), Trigger.MARGIN, None),
    "one byte too many": (Day(bytes=901), Trigger.MARGIN, Refusal.BYTES),
    "the class filled up meanwhile": (Day(quotas={"digits/3": 2}), Trigger.CLASS_QUOTA, Refusal.QUOTA),
    "a full class does not hold up others": (Day(quotas={"digits/3": 2}), Trigger.RANDOM, None),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_a_day_takes_no_more_than_its_budget(case: str) -> None:
    day, trigger, expected = BUDGETS[case]
    policy = CapturePolicy(samples_per_day=10, bytes_per_day=1000, class_quota=2, **ON)
    assert expected == refuse(policy, day, SURE, trigger, size=100)


def test_a_sample_is_charged_to_its_day_and_class() -> None:
    once = charge(Day(number=5), SURE, 100)
    assert Day(number=5, samples=2, bytes=150, quotas={"digits/3": 2}) == charge(once, SURE, 50)


def test_a_new_day_has_a_new_budget_and_a_clock_set_back_has_none() -> None:
    spent = Day(number=10, samples=7, bytes=70)
    assert spent == today(spent, 10 * DAY_MS + 1)
    assert Day(number=11) == today(spent, 11 * DAY_MS)
    assert spent == today(spent, 3 * DAY_MS)


STATES = {
    "fresh": (CapturePolicy(keep_days=2), 0, "held"),
    "fresh, and the fleet may have it": (CapturePolicy(keep_days=2, consent=True), 0, "released"),
    "on its last day": (CapturePolicy(keep_days=2), 2 * DAY_MS - 1, "held"),
    "too old": (CapturePolicy(keep_days=2), 2 * DAY_MS, "expired"),
    "too old, consent or not": (CapturePolicy(keep_days=2, consent=True), 2 * DAY_MS, "expired"),
    "taken in the future: the clock was set back": (CapturePolicy(keep_days=2), -5 * DAY_MS, "held"),
}


@pytest.mark.parametrize("case", STATES)
def test_what_may_happen_with_a_sample_follows_from_its_age_and_the_consent(case: str) -> None:
    policy, age, expected = STATES[case]
    assert expected == state_of(policy, 100 * DAY_MS, 100 * DAY_MS + age)
