"""The update machine as a table of named cases."""

import dataclasses
from dataclasses import dataclass

import msgspec
import pytest

from agent.core.deployment import (
    AT_REST,
    IN_FLIGHT,
    LOOP_MS,
    MAX_DOWNLOAD_TRIES,
    MAX_PROBATION_CRASHES,
    MAX_PROBATION_INTERRUPTIONS,
    MAX_SHADOW_TRIES,
    MAX_SWAP_TRIES,
    MAX_TAKE_UPS,
    RESUME,
    TABLE,
    Deployment,
    Effect,
    Event,
    Happened,
    IllegalTransition,
    Serving,
    advance,
    fall_back,
    resume,
    should_pursue,
)
from agent.core.facts import Objection, Target
from protocol.release import ShadowTerms
from protocol.states import DeploymentState as S
from protocol.states import RejectReason
from simulator.memory import example_digest, example_target

V1, V2, V3 = (Serving(version=n, digest=example_digest("digits", n)) for n in (1, 2, 3))
NOW = 1_750_000_000_000


def story(record: Deployment, *events: Event | Happened) -> list[tuple[S, Effect]]:
    """Feed events one after the other; return where each led."""
    steps = []
    for event in events:
        happened = event if isinstance(event, Happened) else Happened(event=event)
        record, effect = advance(record, happened, NOW)
        steps.append((record.state, effect))
    return steps


def after(record: Deployment, *events: Event | Happened) -> Deployment:
    for event in events:
        happened = event if isinstance(event, Happened) else Happened(event=event)
        record, _ = advance(record, happened, NOW)
    return record


def assigned(version: int, attempt: int = 1) -> Happened:
    return Happened(event=Event.ASSIGNED, target=example_target("digits", version, attempt=attempt))


def shadowed(version: int) -> Happened:
    return Happened(event=Event.ASSIGNED, target=example_target("digits", version, shadow=ShadowTerms()))


MANY = (NOW - 1,) * MAX_TAKE_UPS


REVERTED_TO_V2 = Happened(event=Event.REVERTED, serving=V2)
IDLE = Deployment(model="digits")
ON_V2 = Deployment(
    model="digits", state=S.COMMITTED, target=example_target("digits", 2), serving=V2, committed=V2, previous=V1
)
FRESH = (assigned(1), Event.FITS, Event.DOWNLOADED, Event.CLEARED, Event.PASSED, Event.SERVING, Event.SURVIVED)


@dataclass(frozen=True)
class Case:
    name: str
    start: Deployment
    events: tuple[Event | Happened, ...]
    chain: tuple[tuple[S, Effect], ...]
    serving: Serving | None
    committed: Serving | None


CASES = [
    Case(
        "a first model goes all the way",
        IDLE,
        FRESH,
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.DOWNLOADING, Effect.DOWNLOAD),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SELFTEST, Effect.TRY),
            (S.SWAPPING, Effect.SWAP),
            (S.PROBATION, Effect.WATCH),
            (S.COMMITTED, Effect.TIDY),
        ),
        V1,
        V1,
    ),
    Case(
        "a rollback to a stored version fetches and tries nothing",
        ON_V2,
        (assigned(1), Event.STORED, Event.PASSED, Event.SERVING, Event.SURVIVED),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SWAPPING, Effect.SWAP),
            (S.PROBATION, Effect.WATCH),
            (S.COMMITTED, Effect.TIDY),
        ),
        V1,
        V1,
    ),
    Case(
        "a refused release leaves what serves",
        ON_V2,
        (assigned(3), Happened(event=Event.REFUSED, reason=RejectReason.DOES_NOT_FIT)),
        ((S.VERIFIED, Effect.ADMIT), (S.REJECTED, Effect.TIDY)),
        V2,
        V2,
    ),
    Case(
        "a failed trial leaves what serves",
        ON_V2,
        (
            assigned(3),
            Event.FITS,
            Event.DOWNLOADED,
            Event.CLEARED,
            Happened(event=Event.REFUSED, reason=RejectReason.SELFTEST_FAILED),
        ),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.DOWNLOADING, Effect.DOWNLOAD),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SELFTEST, Effect.TRY),
            (S.REJECTED, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a second crash in probation takes the model back",
        ON_V2,
        (
            assigned(3),
            Event.STORED,
            Event.PASSED,
            Event.SERVING,
            *[Event.PLANE_DIED] * MAX_PROBATION_CRASHES,
            REVERTED_TO_V2,
        ),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SWAPPING, Effect.SWAP),
            (S.PROBATION, Effect.WATCH),
            *[(S.PROBATION, Effect.WATCH)] * (MAX_PROBATION_CRASHES - 1),
            (S.ROLLING_BACK, Effect.REVERT),
            (S.ROLLED_BACK, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a swap the data plane refuses leaves what serves",
        ON_V2,
        (assigned(3), Event.STORED, Event.PASSED, Event.SWAP_REFUSED),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SWAPPING, Effect.SWAP),
            (S.FAILED, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a swap that kills the data plane is given up",
        ON_V2,
        (assigned(3), Event.STORED, Event.PASSED, *[Event.PLANE_DIED] * MAX_SWAP_TRIES),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SWAPPING, Effect.SWAP),
            *[(S.SWAPPING, Effect.SWAP)] * (MAX_SWAP_TRIES - 1),
            (S.FAILED, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "bad weather is waited out, but not for ever",
        ON_V2,
        (assigned(3), Event.FITS, *[Event.INTERRUPTED] * MAX_DOWNLOAD_TRIES),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.DOWNLOADING, Effect.DOWNLOAD),
            *[(S.DOWNLOADING, Effect.DOWNLOAD_LATER)] * (MAX_DOWNLOAD_TRIES - 1),
            (S.FAILED, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a newer assignment supersedes a download",
        ON_V2,
        (assigned(3), Event.FITS, assigned(1), assigned(1)),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.DOWNLOADING, Effect.DOWNLOAD),
            (S.SUPERSEDED, Effect.START_OVER),
            (S.VERIFIED, Effect.ADMIT),
        ),
        V2,
        V2,
    ),
    Case(
        "a withdrawn model is removed",
        ON_V2,
        (Event.WITHDRAWN,),
        ((S.IDLE, Effect.REMOVE),),
        None,
        None,
    ),
    Case(
        "a candidate is compared where the assignment asks for it",
        ON_V2,
        (shadowed(3), Event.FITS, Event.DOWNLOADED, Event.CLEARED, Event.PASSED, Event.AGREED, Event.SERVING),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.DOWNLOADING, Effect.DOWNLOAD),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SELFTEST, Effect.TRY),
            (S.SHADOW, Effect.COMPARE),
            (S.SWAPPING, Effect.SWAP),
            (S.PROBATION, Effect.WATCH),
        ),
        V3,
        V2,
    ),
    Case(
        "a first model has nothing to be compared with",
        IDLE,
        (shadowed(1), Event.STORED, Event.PASSED),
        ((S.VERIFIED, Effect.ADMIT), (S.STAGED, Effect.CHECK_ROOM), (S.SWAPPING, Effect.SWAP)),
        None,
        None,
    ),
    Case(
        "a candidate that differs never serves",
        ON_V2,
        (shadowed(3), Event.STORED, Event.PASSED, Event.DIFFERS),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SHADOW, Effect.COMPARE),
            (S.REJECTED, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a candidate that takes the data plane down while compared never serves",
        ON_V2,
        (shadowed(3), Event.STORED, Event.PASSED, *[Event.PLANE_DIED] * MAX_SHADOW_TRIES),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SHADOW, Effect.COMPARE),
            *[(S.SHADOW, Effect.COMPARE)] * (MAX_SHADOW_TRIES - 1),
            (S.REJECTED, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a model that sickens in probation is taken back",
        ON_V2,
        (assigned(3), Event.STORED, Event.PASSED, Event.SERVING, Event.SICKENED, REVERTED_TO_V2),
        (
            (S.VERIFIED, Effect.ADMIT),
            (S.STAGED, Effect.CHECK_ROOM),
            (S.SWAPPING, Effect.SWAP),
            (S.PROBATION, Effect.WATCH),
            (S.ROLLING_BACK, Effect.REVERT),
            (S.ROLLED_BACK, Effect.TIDY),
        ),
        V2,
        V2,
    ),
    Case(
        "a person takes a committed model back",
        ON_V2,
        (Event.TAKEN_BACK, Happened(event=Event.REVERTED, serving=V1)),
        ((S.ROLLING_BACK, Effect.REVERT), (S.ROLLED_BACK, Effect.TIDY)),
        V1,
        V1,
    ),
    Case(
        "a fleet that cannot make up its mind is left alone at the last committed version",
        msgspec.structs.replace(after(ON_V2, assigned(3), Event.STORED, Event.PASSED, Event.SERVING), taken_up=MANY),
        (assigned(1), REVERTED_TO_V2),
        ((S.ROLLING_BACK, Effect.REVERT), (S.ROLLED_BACK, Effect.TIDY)),
        V2,
        V2,
    ),
    Case(
        "a loop that changed nothing ends where it is",
        msgspec.structs.replace(ON_V2, taken_up=MANY),
        (assigned(3),),
        ((S.FAILED, Effect.TIDY),),
        V2,
        V2,
    ),
    Case(
        "what a person forces is no loop",
        msgspec.structs.replace(ON_V2, taken_up=MANY),
        (Happened(event=Event.ASSIGNED, target=example_target("digits", 1, forced=True)),),
        ((S.VERIFIED, Effect.ADMIT),),
        V2,
        V2,
    ),
    Case(
        "there is nothing to go back to from a first model",
        after(IDLE, *FRESH[:-1]),
        (*[Event.PLANE_DIED] * MAX_PROBATION_CRASHES, Event.REVERT_FAILED),
        (
            *[(S.PROBATION, Effect.WATCH)] * (MAX_PROBATION_CRASHES - 1),
            (S.ROLLING_BACK, Effect.REVERT),
            (S.FAILED, Effect.TIDY),
        ),
        V1,
        None,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_story(case: Case) -> None:
    assert list(case.chain) == story(case.start, *case.events)
    end = after(case.start, *case.events)
    assert (case.serving, case.committed) == (end.serving, end.committed)


def test_every_pair_outside_the_table_is_refused_and_changes_nothing() -> None:
    for state in S:
        for event in Event:
            if (state, event) in TABLE:
                continue
            record = msgspec.structs.replace(ON_V2, state=state)
            with pytest.raises(IllegalTransition, match=state.value):
                advance(record, Happened(event=event), NOW)


def test_every_state_can_be_reached_left_and_resumed() -> None:
    reached = {state for state, _ in TABLE.values()} | {S.IDLE}
    left = {state for state, _ in TABLE}
    assert set(S) == reached == left == set(RESUME)
    assert not AT_REST & IN_FLIGHT


def test_the_version_before_the_committed_one_is_remembered_for_a_rollback() -> None:
    assert (V3, V2) == (
        (end := after(ON_V2, assigned(3), Event.STORED, Event.PASSED, Event.SERVING, Event.SURVIVED)).committed,
        end.previous,
    )


def test_the_reason_of_a_rollback_outlives_it() -> None:
    end = after(
        ON_V2,
        assigned(3),
        Event.STORED,
        Event.PASSED,
        Event.SERVING,
        *[Event.PLANE_DIED] * MAX_PROBATION_CRASHES,
        REVERTED_TO_V2,
    )
    assert RejectReason.CRASHED_IN_PROBATION is end.reason


RESUMED = [
    ("killed while downloading: goes on", S.DOWNLOADING, V2.digest, (S.DOWNLOADING, Effect.DOWNLOAD)),
    ("killed in the trial: tries again", S.SELFTEST, V2.digest, (S.SELFTEST, Effect.TRY)),
    ("killed before the pointer moved: swaps again", S.SWAPPING, V2.digest, (S.SWAPPING, Effect.SWAP)),
    ("killed after the pointer moved: it serves", S.SWAPPING, V3.digest, (S.PROBATION, Effect.WATCH)),
    ("killed in probation once: watches anew", S.PROBATION, V3.digest, (S.PROBATION, Effect.WATCH)),
    ("killed while rolling back: rolls back", S.ROLLING_BACK, V3.digest, (S.ROLLING_BACK, Effect.REVERT)),
]


@pytest.mark.parametrize(("name", "state", "active", "expected"), RESUMED, ids=[row[0] for row in RESUMED])
def test_resume_after_power_loss(name: str, state: S, active: str, expected: tuple[S, Effect]) -> None:
    record = msgspec.structs.replace(ON_V2, state=state, target=example_target("digits", 3))
    resumed, effect = resume(record, active, NOW)
    assert expected == (resumed.state, effect)


def test_a_model_that_was_withdrawn_as_the_power_went_does_not_come_back() -> None:
    withdrawn, _ = advance(ON_V2, Happened(event=Event.WITHDRAWN), NOW)
    assert (withdrawn, Effect.REMOVE) == resume(withdrawn, V2.digest, NOW)
    assert (withdrawn, Effect.TIDY) == resume(withdrawn, None, NOW)


def test_too_many_power_losses_in_probation_take_the_model_back() -> None:
    record = after(ON_V2, assigned(3), Event.STORED, Event.PASSED, Event.SERVING)
    for _ in range(MAX_PROBATION_INTERRUPTIONS):
        record, effect = resume(record, V3.digest, NOW)
        assert Effect.WATCH is effect
    record, effect = resume(record, V3.digest, NOW)
    assert (S.ROLLING_BACK, Effect.REVERT, RejectReason.INTERRUPTED) == (record.state, effect, record.reason)


def objected(version: int, attempt: int = 1, reason: RejectReason = RejectReason.BELOW_FLOOR) -> Target:
    target = example_target("digits", version, attempt=attempt)
    return dataclasses.replace(target, objection=Objection(reason=reason, detail="the repositories say no"))


LOOPED = msgspec.structs.replace(ON_V2, state=S.FAILED, reason=RejectReason.LOOPING, since=NOW - 1)
FAILED_V3 = msgspec.structs.replace(ON_V2, state=S.FAILED, target=example_target("digits", 3))
STAGED_V3 = msgspec.structs.replace(FAILED_V3, state=S.STAGED)
REJECTED_V2 = msgspec.structs.replace(ON_V2, state=S.REJECTED, target=objected(2))
PURSUITS = [
    ("nothing was ever asked", IDLE, example_target("digits", 1), True),
    ("it serves already", ON_V2, example_target("digits", 2), False),
    ("it serves already, a higher attempt changes nothing", ON_V2, example_target("digits", 2, attempt=2), False),
    ("another version", ON_V2, example_target("digits", 3), True),
    ("this attempt failed: final", FAILED_V3, example_target("digits", 3), False),
    ("a higher attempt tries again", FAILED_V3, example_target("digits", 3, attempt=2), True),
    ("back to what serves, after a failure", FAILED_V3, example_target("digits", 2), True),
    ("after a loop nothing is taken up", LOOPED, example_target("digits", 3, attempt=9), False),
    ("after a loop a person may force it", LOOPED, example_target("digits", 3, forced=True), True),
    (
        "an hour after a loop it goes on",
        msgspec.structs.replace(LOOPED, since=NOW - LOOP_MS),
        example_target("digits", 3),
        True,
    ),
    (
        "nothing is taken up during a flip",
        msgspec.structs.replace(FAILED_V3, state=S.SWAPPING),
        example_target("digits", 2),
        False,
    ),
    ("on its way already", msgspec.structs.replace(FAILED_V3, state=S.STAGED), example_target("digits", 3), False),
    ("the same order again while it waits", STAGED_V3, example_target("digits", 3, attempt=2), False),
    ("forced while it waits", STAGED_V3, example_target("digits", 3, attempt=2, forced=True), True),
    ("a shadow while it waits", STAGED_V3, example_target("digits", 3, attempt=2, shadow=ShadowTerms()), True),
    ("other terms for the same attempt mean nothing", STAGED_V3, example_target("digits", 3, forced=True), False),
    (
        "other terms once it serves change nothing",
        msgspec.structs.replace(STAGED_V3, state=S.PROBATION),
        example_target("digits", 3, attempt=2, forced=True),
        False,
    ),
    (
        "superseded, wanted again",
        msgspec.structs.replace(FAILED_V3, state=S.SUPERSEDED),
        example_target("digits", 3),
        True,
    ),
    ("an objection to what serves is told", ON_V2, objected(2), True),
    ("and told once", REJECTED_V2, objected(2), False),
    ("to a higher attempt again", REJECTED_V2, objected(2, attempt=2), True),
    ("an objection to another version is told", ON_V2, objected(3), True),
    ("an objection taken back lets the same attempt go on", REJECTED_V2, example_target("digits", 2), True),
    (
        "an objection stops what is on its way",
        msgspec.structs.replace(FAILED_V3, state=S.DOWNLOADING),
        objected(3),
        True,
    ),
    (
        "one that is being told is not told again",
        msgspec.structs.replace(FAILED_V3, state=S.VERIFIED, target=objected(3)),
        objected(3),
        False,
    ),
    ("what failed needs no objection", FAILED_V3, objected(3), False),
    (
        "an objection waits for the end of a probation",
        msgspec.structs.replace(FAILED_V3, state=S.PROBATION),
        objected(3),
        False,
    ),
    ("and for the end of a flip", msgspec.structs.replace(FAILED_V3, state=S.SWAPPING), objected(3), False),
]


@pytest.mark.parametrize(("name", "record", "target", "expected"), PURSUITS, ids=[row[0] for row in PURSUITS])
def test_should_pursue(name: str, record: Deployment, target: object, expected: bool) -> None:
    assert expected is should_pursue(record, target, NOW)  # type: ignore[arg-type]  # parametrised


@dataclass(frozen=True)
class Fallen:
    name: str
    versions: tuple[Serving | None, ...]  # serving, committed, previous, factory
    intact: tuple[int, ...]
    expected: Serving | None
    floor: int = 0


FALLEN = [
    Fallen("in probation: the last committed", (V3, V2, V1, None), (1, 2, 3), V2),
    Fallen("committed: the one before", (V2, V2, V1, None), (1, 2), V1),
    Fallen("the one before is damaged: the factory's", (V3, V3, V2, V1), (1, 3), V1),
    Fallen("nothing else is whole", (V3, V3, V2, V1), (3,), None),
    Fallen("a floor binds once its version is committed", (V3, V3, V2, V1), (1, 2, 3), None, floor=3),
    Fallen("a floor does not bind before", (V3, V2, V1, None), (1, 2, 3), V2, floor=3),
]


@pytest.mark.parametrize("case", FALLEN, ids=lambda case: case.name)
def test_fall_back(case: Fallen) -> None:
    serving, committed, previous, factory = case.versions
    record = Deployment(
        model="digits",
        target=example_target("digits", 3, floor=case.floor),
        serving=serving,
        committed=committed,
        previous=previous,
        factory=factory,
    )
    whole = {example_digest("digits", number) for number in case.intact}
    assert case.expected == fall_back(record, whole.__contains__)


def test_the_first_committed_version_is_remembered_for_ever() -> None:
    record = after(IDLE, *FRESH)
    for version in (2, 3):
        record = after(record, assigned(version), *FRESH[1:])
    assert (V3, V2, V1) == (record.committed, record.previous, record.factory)


def test_only_what_was_taken_up_within_the_hour_counts_as_a_loop() -> None:
    old = msgspec.structs.replace(ON_V2, taken_up=(NOW - LOOP_MS, NOW + 1, NOW - 1))
    assert (NOW - 1, NOW) == after(old, assigned(3)).taken_up
