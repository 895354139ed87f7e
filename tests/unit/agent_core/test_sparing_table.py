"""When a spare is had: a table of cases."""

import pytest

from agent.core.sparing import (
    AUTO_MEMORY,
    LOOK_SECONDS,
    MIB,
    ROOM_TO_START,
    ROOM_TO_STAY,
    Decision,
    SpareFacts,
    Step,
    decide,
    is_wanted,
)

NOW = 1000.0
LATER = NOW + LOOK_SECONDS
NOTHING, START, LET_GO = Decision(), Decision(step=Step.START, again=LATER), Decision(step=Step.LET_GO, again=LATER)


def facts(**different: object) -> SpareFacts:
    """Return the facts of a device where a spare is due, but for what is different."""
    return SpareFacts(**{"now": NOW, "serves": True, "waits": False, "calm_since": NOW - 5, **different})


@pytest.mark.parametrize(
    ("setting", "memory", "wanted"),
    [
        ("on", 0, True),
        ("off", 64 * 1024 * MIB, False),
        ("auto", AUTO_MEMORY, True),
        ("auto", AUTO_MEMORY - 1, False),
        ("auto", 0, False),  # the machine does not tell
    ],
)
def test_the_setting_and_the_machine_say_whether_there_is_one_at_all(setting: str, memory: int, wanted: bool) -> None:
    assert is_wanted(setting, memory) is wanted


CASES = {
    "calm for long enough": (facts(), START),
    "calm for not so long": (facts(calm_since=NOW - 2), Decision(again=NOW + 3)),
    "calm for as long as is asked for": (facts(calm_since=NOW - 2, calm=1.0), START),
    "things are going on": (facts(calm_since=None), NOTHING),
    "nothing serves": (facts(serves=False), NOTHING),
    "one death before": (facts(restarts=1), START),
    "two deaths before: one must live first": (facts(restarts=2), Decision(again=NOW + 55)),
    "two deaths before, and one has lived": (facts(restarts=2, calm_since=NOW - 60), START),
    "a spare died just now": (facts(failures=1, failed_at=NOW), Decision(again=NOW + 5)),
    "the third one in a row": (facts(failures=3, failed_at=NOW), Decision(again=NOW + 20)),
    "so many that the wait has its longest": (facts(failures=5000, failed_at=NOW), Decision(again=NOW + 600)),
    "memory is unknown": (facts(available=None), START),
    "just enough memory": (facts(available=ROOM_TO_START), START),
    "too little memory": (facts(available=ROOM_TO_START - 1), Decision(again=LATER)),
    "the governor says memory is short": (facts(short=True), Decision(again=LATER)),
    "the governor eases the device": (facts(eased=True), NOTHING),
    "there is one": (facts(waits=True), Decision(again=LATER)),
    "there is one, and things are going on": (facts(waits=True, calm_since=None), Decision(again=LATER)),
    "there is one, and the device is eased": (facts(waits=True, eased=True), Decision(again=LATER)),
    "there is one, memory is less than to start": (
        facts(waits=True, available=ROOM_TO_STAY),
        Decision(again=LATER),
    ),
    "there is one, memory is short": (facts(waits=True, available=ROOM_TO_STAY - 1), LET_GO),
    "there is one, the governor says memory is short": (facts(waits=True, short=True), LET_GO),
    "there is one, and nothing serves": (facts(waits=True, serves=False), LET_GO),
}


@pytest.mark.parametrize(("known", "decision"), CASES.values(), ids=CASES)
def test_decide(known: SpareFacts, decision: Decision) -> None:
    assert decide(known) == decision
