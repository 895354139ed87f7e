"""The update machine as a table of named cases."""

from dataclasses import dataclass

import msgspec
import pytest

from agent.core.deployment import (
    AT_REST,
    IN_FLIGHT,
    MAX_DOWNLOAD_TRIES,
    MAX_PROBATION_CRASHES,
    MAX_PROBATION_INTERRUPTIONS,
    MAX_SWAP_TRIES,
    RESUME,
    TABLE,
    Deployment,
    Effect,
    Event,
    Happened,
    IllegalTransition,
    Serving,
    advance,
    resume,
    should_pursue,
)
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
        (assigned(1), Event.STORED, Event.SERVING, Event.SURVIVED),
        (
            (S.VERIFIED, Effect.ADMIT),
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
            Event.SERVING,
            *[Event.PLANE_DIED] * MAX_PROBATION_CRASHES,
            Event.REVERTED,
        ),
        (
            (S.VERIFIED, Effect.ADMIT),
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
        (assigned(3), Event.STORED, Event.SWAP_REFUSED),
        ((S.VERIFIED, Effect.ADMIT), (S.SWAPPING, Effect.SWAP), (S.FAILED, Effect.TIDY)),
        V2,
        V2,
    ),
    Case(
        "a swap that kills the data plane is given up",
        ON_V2,
        (assigned(3), Event.STORED, *[Event.PLANE_DIED] * MAX_SWAP_TRIES),
        (
            (S.VERIFIED, Effect.ADMIT),
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
        (end := after(ON_V2, assigned(3), Event.STORED, Event.SERVING, Event.SURVIVED)).committed,
        end.previous,
    )


def test_the_reason_of_a_rollback_outlives_it() -> None:
    end = after(
        ON_V2, assigned(3), Event.STORED, Event.SERVING, *[Event.PLANE_DIED] * MAX_PROBATION_CRASHES, Event.REVERTED
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


def test_too_many_power_losses_in_probation_take_the_model_back() -> None:
    record = after(ON_V2, assigned(3), Event.STORED, Event.SERVING)
    for _ in range(MAX_PROBATION_INTERRUPTIONS):
        record, effect = resume(record, V3.digest, NOW)
        assert Effect.WATCH is effect
    record, effect = resume(record, V3.digest, NOW)
    assert (S.ROLLING_BACK, Effect.REVERT, RejectReason.INTERRUPTED) == (record.state, effect, record.reason)


FAILED_V3 = msgspec.structs.replace(ON_V2, state=S.FAILED, target=example_target("digits", 3))
PURSUITS = [
    ("nothing was ever asked", IDLE, example_target("digits", 1), True),
    ("it serves already", ON_V2, example_target("digits", 2), False),
    ("it serves already, a higher attempt changes nothing", ON_V2, example_target("digits", 2, attempt=2), False),
    ("another version", ON_V2, example_target("digits", 3), True),
    ("this attempt failed: final", FAILED_V3, example_target("digits", 3), False),
    ("a higher attempt tries again", FAILED_V3, example_target("digits", 3, attempt=2), True),
    ("back to what serves, after a failure", FAILED_V3, example_target("digits", 2), True),
    (
        "nothing is taken up during a flip",
        msgspec.structs.replace(FAILED_V3, state=S.SWAPPING),
        example_target("digits", 2),
        False,
    ),
    ("on its way already", msgspec.structs.replace(FAILED_V3, state=S.STAGED), example_target("digits", 3), False),
    (
        "superseded, wanted again",
        msgspec.structs.replace(FAILED_V3, state=S.SUPERSEDED),
        example_target("digits", 3),
        True,
    ),
]


@pytest.mark.parametrize(("name", "record", "target", "expected"), PURSUITS, ids=[row[0] for row in PURSUITS])
def test_should_pursue(name: str, record: Deployment, target: object, expected: bool) -> None:
    assert expected is should_pursue(record, target)  # type: ignore[arg-type]  # parametrised
