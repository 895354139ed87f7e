"""Which fault concerns one target and which the whole desired state, as a table of named cases."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from agent.core.admission import object_to
from agent.core.agreement import Condemned, Said, Word, agree, is_doubtful, path_of_floor, read_wanted
from agent.core.facts import DeviceFacts, Objection, Target
from protocol.release import bundle_path, to_custom
from protocol.states import RejectReason as R
from protocol.states import RuntimeName
from simulator.memory import example_target

TARGET = example_target("digits", 3)
PATH = bundle_path(TARGET.release)
GENUINE = Said(length=TARGET.length, hashes={"sha256": TARGET.sha256}, custom={"release": to_custom(TARGET.release)})
LISTED = replace(GENUINE, custom={**GENUINE.custom, "assignment": {"rollout": "r-1"}})
WORD = Word(released=GENUINE, floor=None, delegated=False)


def saying(**changes: Any) -> Word:
    return replace(WORD, released=replace(GENUINE, **changes))


def floor(value: object) -> Said:
    return Said(length=0, hashes={}, custom={"floor": value})


@dataclass(frozen=True)
class Case:
    name: str
    word: Word
    reason: R | None
    condemns: bool = True  # when no family's key and no earlier agreement can explain it
    known_floor: int = 0


OTHER = example_target("digits", 4).release
CASES = [
    Case("both agree", WORD, None),
    Case("at the floor", replace(WORD, floor=floor(3)), None),
    Case("not named", replace(WORD, released=None), R.NOT_RELEASED),
    Case("another length", saying(length=7), R.DISAGREEMENT),
    Case("another hash", saying(hashes={"sha256": "0" * 64}), R.DISAGREEMENT),
    Case("an unknown hash", saying(hashes={"md5": "0" * 32}), R.MALFORMED),
    Case("another release", saying(custom={"release": to_custom(OTHER)}), R.DISAGREEMENT),
    Case("no release", saying(custom={}), R.MALFORMED),
    Case("a floor that is no number", replace(WORD, floor=floor("high")), R.MALFORMED),
    Case("below the floor", replace(WORD, floor=floor(4)), R.BELOW_FLOOR, condemns=False),
    Case("below a floor seen before", replace(WORD, floor=floor(1)), R.BELOW_FLOOR, condemns=False, known_floor=4),
]
NAMED = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@NAMED
def test_a_fault_that_only_the_director_can_explain_condemns_everything(case: Case) -> None:
    if case.reason and case.condemns:
        with pytest.raises(Condemned) as condemned:
            agree(TARGET, case.word, known_floor=case.known_floor, held=False)
        assert condemned.value.objection.reason is case.reason
    else:
        assert said(agree(TARGET, case.word, known_floor=case.known_floor, held=False)) is case.reason


@NAMED
@pytest.mark.parametrize("why", ["a family speaks for it", "it was agreed on before"])
def test_the_same_fault_concerns_one_target_when_it_can_have_another_cause(case: Case, why: str) -> None:
    word = replace(case.word, delegated=why.startswith("a family"))
    held = not word.delegated

    agreed = agree(TARGET, word, known_floor=case.known_floor, held=held)

    assert said(agreed) is case.reason
    assert agreed.floor >= case.known_floor


@pytest.mark.parametrize(("held", "reason"), [(False, R.YANKED), (True, None)])
def test_a_yank_stops_new_installs_only(held: bool, reason: R | None) -> None:
    word = saying(custom={**GENUINE.custom, "yanked": "it confuses 3 and 8"})
    assert is_doubtful(TARGET, word)
    assert said(agree(TARGET, word, known_floor=0, held=held)) is reason


def test_the_store_is_looked_into_only_where_it_matters() -> None:
    assert [case.name for case in CASES if not is_doubtful(TARGET, case.word)] == [
        "both agree",
        "at the floor",
        "below the floor",
        "below a floor seen before",
    ]


LISTS: list[tuple[str, dict[str, Said], R]] = [
    ("no bundle's path", {"models/main/digits.floor": LISTED}, R.MALFORMED),
    ("an unknown hash", {PATH: replace(LISTED, hashes={"md5": "0" * 32})}, R.MALFORMED),
    ("no release", {PATH: replace(LISTED, custom={"assignment": {"rollout": "r"}})}, R.MALFORMED),
    ("no assignment", {PATH: GENUINE}, R.MALFORMED),
    ("a release under a foreign path", {"models/other/digits-3-int8.ewb": LISTED}, R.DISAGREEMENT),
]


@pytest.mark.parametrize(("name", "listed", "reason"), LISTS, ids=[row[0] for row in LISTS])
def test_a_list_that_no_sound_server_signs_is_condemned(name: str, listed: dict[str, Said], reason: R) -> None:
    with pytest.raises(Condemned) as condemned:
        read_wanted(listed)
    assert condemned.value.objection.reason is reason


def test_what_the_list_says_is_the_target() -> None:
    wanted = read_wanted({PATH: LISTED})
    assert wanted == {PATH: TARGET}
    assert path_of_floor(TARGET) == "models/main/digits.floor"


def test_what_the_repositories_say_against_a_target_is_what_admission_says() -> None:
    facts = DeviceFacts(device_class="x86_64", runtimes=(RuntimeName.LITERT,), memory_total=10**9)
    objection = Objection(reason=R.YANKED, detail="taken back")
    assert object_to(TARGET, facts) is None
    assert object_to(replace(TARGET, objection=objection), facts) is objection


def said(target: Target) -> R | None:
    return target.objection.reason if target.objection else None
