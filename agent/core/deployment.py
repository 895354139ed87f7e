"""THE update machine of one model on one device: states, events, effects, and where power loss resumes.

Rule 1: everything that decides what happens next to a model stands in this file; the driver (``agent/updater.py``)
performs effects and reports events, and chooses nothing.
Rule 2: a record is persisted *before* its effect runs, so an effect may run twice and must be repeatable.
Rule 3: an event that a state does not expect changes nothing and is an error (`IllegalTransition`).

The states' meanings are in ``protocol/states.py``. `TABLE` is the whole machine; `RESUME` says which effect runs
again after the agent was killed in a state. Counters bend the table, each with a named maximum: downloads that the
weather stopped, deaths of the data plane, power losses in probation, and targets taken up within an hour (a fleet
that cannot make up its mind must not wear a device out). `SHADOW` is passed over unless the assignment asks for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import msgspec

from agent.core.facts import Target
from protocol.messages import RunningModel
from protocol.states import DeploymentState, RejectReason

MAX_DOWNLOAD_TRIES = 50  # with back-off up to 15 min that is half a day of bad weather
MAX_SWAP_TRIES = 2  # the data plane died while taking the model up
MAX_PROBATION_CRASHES = 2  # one crash may be an accident; the second takes the model back
MAX_PROBATION_INTERRUPTIONS = 2  # power losses or agent restarts in probation
MAX_SHADOW_TRIES = 2  # the data plane died while the candidate was compared
MAX_TAKE_UPS = 30  # targets taken up within LOOP_MS; the next one is a loop: the last committed version serves
LOOP_MS = 3_600_000  # how far back is counted, and how long a loop is left alone
ROOM_PAUSE_MS = 300_000  # what the disk could not hold is looked at again after so long; rare enough to be no loop


class Event(str, Enum):
    """What happened to a model's update."""

    ASSIGNED = "assigned"  # a verified desired state names a target to pursue
    WITHDRAWN = "withdrawn"  # the desired state names this model no more
    FITS = "fits"  # the release fits this device; its bytes are not here
    STORED = "stored"  # it fits, and a copy that passed its trial is in the store
    REFUSED = "refused"  # the content is not acceptable; the reason says why
    DOWNLOADED = "downloaded"  # whole, and the hash is right
    INTERRUPTED = "interrupted"  # the weather stopped a download
    CLEARED = "cleared"  # nothing speaks against the trial now: memory, hold, maintenance hours
    PASSED = "passed"  # the trial child said yes, now or before, and the store has it
    AGREED = "agreed"  # as a shadow it answered as the stable version does, or there was nothing to compare
    DIFFERS = "differs"  # as a shadow it answered too differently
    SERVING = "serving"  # the data plane flipped to it, and the pointer says so
    SWAP_REFUSED = "swap-refused"  # the data plane could not take it up; the old one serves on
    PLANE_DIED = "plane-died"  # the data plane process ended unasked
    SURVIVED = "survived"  # probation is over
    SICKENED = "sickened"  # it does worse than it may: errors, latency, confidence, golden samples
    TAKEN_BACK = "taken-back"  # a person at this device wants the version before
    REVERTED = "reverted"  # the version before serves again
    REVERT_FAILED = "revert-failed"  # there is nothing to go back to


class Effect(str, Enum):
    """What the driver does on entering a state."""

    ADMIT = "admit"  # does it fit? is it here already?
    DOWNLOAD = "download"  # from the last byte on disk
    DOWNLOAD_LATER = "download-later"  # the same, after a back-off
    CHECK_ROOM = "check-room"  # may it go on now? memory for a trial, hold, maintenance hours
    TRY = "try"  # run the trial child, then admit to the store
    COMPARE = "compare"  # let it answer live requests silently beside what serves
    SWAP = "swap"  # let the data plane serve it
    WATCH = "watch"  # start the probation clock
    TIDY = "tidy"  # collect what is no longer needed
    REVERT = "revert"  # serve the newest earlier version that is intact
    START_OVER = "start-over"  # stop what runs, then assign anew
    REMOVE = "remove"  # stop serving the model


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """A version that serves, or did."""

    version: int
    digest: str


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that must survive power loss about one model's update."""

    model: str
    state: DeploymentState = DeploymentState.IDLE
    since: int = 0  # UTC ms of the last transition
    target: Target | None = None
    serving: Serving | None = None
    committed: Serving | None = None  # the newest version that passed probation
    previous: Serving | None = None  # the one committed before it; its bundle stays on disk for a rollback
    factory: Serving | None = None  # the first one ever committed here; its bundle stays too
    reason: RejectReason | None = None
    detail: str = ""
    download_tries: int = 0
    retry_at: int = 0  # UTC ms; whoever stopped the download asked for patience until then
    swap_tries: int = 0
    shadow_tries: int = 0
    crashes: int = 0
    interruptions: int = 0
    taken_up: tuple[int, ...] = ()  # UTC ms at which targets were taken up, within the last LOOP_MS


@dataclass(frozen=True, kw_only=True)
class Happened:
    """An event with what it carries."""

    event: Event
    target: Target | None = None  # of ASSIGNED
    serving: Serving | None = None  # of REVERTED: what serves again
    reason: RejectReason | None = None  # of REFUSED, SWAP_REFUSED, DIFFERS, SICKENED, TAKEN_BACK
    detail: str = ""
    patience_ms: int = 0  # of INTERRUPTED: not again before
    is_a_try: bool = True  # of INTERRUPTED: not where this device itself waits


class IllegalTransition(Exception):
    """A state met an event it does not expect: a bug in the driver. The record is unchanged."""

    def __init__(self, state: DeploymentState, event: Event) -> None:
        """Name both."""
        super().__init__(f"{state.value} does not expect {event.value}")
        self.state = state
        self.event = event


S, E, F = DeploymentState, Event, Effect

# fmt: off
TABLE: dict[tuple[DeploymentState, Event], tuple[DeploymentState, Effect]] = {
    # at rest: a target is taken up, or the model is withdrawn
    (S.IDLE,         E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),
    (S.COMMITTED,    E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),
    (S.ROLLED_BACK,  E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),
    (S.FAILED,       E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),
    (S.REJECTED,     E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),
    (S.SUPERSEDED,   E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),
    (S.COMMITTED,    E.WITHDRAWN):     (S.IDLE,         F.REMOVE),
    (S.ROLLED_BACK,  E.WITHDRAWN):     (S.IDLE,         F.REMOVE),
    (S.FAILED,       E.WITHDRAWN):     (S.IDLE,         F.REMOVE),
    (S.REJECTED,     E.WITHDRAWN):     (S.IDLE,         F.REMOVE),
    (S.SUPERSEDED,   E.WITHDRAWN):     (S.IDLE,         F.REMOVE),

    # on the way
    (S.VERIFIED,     E.FITS):          (S.DOWNLOADING,  F.DOWNLOAD),
    (S.VERIFIED,     E.STORED):        (S.STAGED,       F.CHECK_ROOM),  # e.g. a rollback: nothing to fetch
    (S.VERIFIED,     E.REFUSED):       (S.REJECTED,     F.TIDY),
    (S.VERIFIED,     E.INTERRUPTED):   (S.FAILED,       F.TIDY),
    (S.DOWNLOADING,  E.DOWNLOADED):    (S.STAGED,       F.CHECK_ROOM),
    (S.DOWNLOADING,  E.INTERRUPTED):   (S.DOWNLOADING,  F.DOWNLOAD_LATER),  # at most MAX_DOWNLOAD_TRIES
    (S.DOWNLOADING,  E.REFUSED):       (S.REJECTED,     F.TIDY),
    (S.STAGED,       E.CLEARED):       (S.SELFTEST,     F.TRY),
    (S.STAGED,       E.REFUSED):       (S.REJECTED,     F.TIDY),
    (S.STAGED,       E.PASSED):        (S.SHADOW,       F.COMPARE),   # tried here before
    (S.SELFTEST,     E.PASSED):        (S.SHADOW,       F.COMPARE),
    (S.SELFTEST,     E.REFUSED):       (S.REJECTED,     F.TIDY),
    (S.SELFTEST,     E.INTERRUPTED):   (S.DOWNLOADING,  F.DOWNLOAD_LATER),  # the staged file is gone
    (S.SHADOW,       E.AGREED):        (S.SWAPPING,     F.SWAP),
    (S.SHADOW,       E.DIFFERS):       (S.REJECTED,     F.TIDY),
    (S.SHADOW,       E.PLANE_DIED):    (S.SHADOW,       F.COMPARE),   # at most MAX_SHADOW_TRIES

    # another assignment, or none, before this one has changed what serves
    (S.VERIFIED,     E.ASSIGNED):      (S.SUPERSEDED,   F.START_OVER),
    (S.DOWNLOADING,  E.ASSIGNED):      (S.SUPERSEDED,   F.START_OVER),
    (S.STAGED,       E.ASSIGNED):      (S.SUPERSEDED,   F.START_OVER),
    (S.SELFTEST,     E.ASSIGNED):      (S.SUPERSEDED,   F.START_OVER),
    (S.SHADOW,       E.ASSIGNED):      (S.SUPERSEDED,   F.START_OVER),
    (S.VERIFIED,     E.WITHDRAWN):     (S.SUPERSEDED,   F.START_OVER),
    (S.DOWNLOADING,  E.WITHDRAWN):     (S.SUPERSEDED,   F.START_OVER),
    (S.STAGED,       E.WITHDRAWN):     (S.SUPERSEDED,   F.START_OVER),
    (S.SELFTEST,     E.WITHDRAWN):     (S.SUPERSEDED,   F.START_OVER),
    (S.SHADOW,       E.WITHDRAWN):     (S.SUPERSEDED,   F.START_OVER),

    # the flip, and the time after it; an assignment that comes during a flip waits for its end
    (S.SWAPPING,     E.SERVING):       (S.PROBATION,    F.WATCH),
    (S.SWAPPING,     E.SWAP_REFUSED):  (S.FAILED,       F.TIDY),
    (S.SWAPPING,     E.PLANE_DIED):    (S.SWAPPING,     F.SWAP),      # at most MAX_SWAP_TRIES
    (S.PROBATION,    E.SURVIVED):      (S.COMMITTED,    F.TIDY),
    (S.PROBATION,    E.PLANE_DIED):    (S.PROBATION,    F.WATCH),     # at most MAX_PROBATION_CRASHES
    (S.PROBATION,    E.SICKENED):      (S.ROLLING_BACK, F.REVERT),
    (S.PROBATION,    E.TAKEN_BACK):    (S.ROLLING_BACK, F.REVERT),
    (S.COMMITTED,    E.TAKEN_BACK):    (S.ROLLING_BACK, F.REVERT),
    (S.PROBATION,    E.ASSIGNED):      (S.VERIFIED,     F.ADMIT),     # e.g. a rollback while still on probation
    (S.PROBATION,    E.WITHDRAWN):     (S.IDLE,         F.REMOVE),
    (S.ROLLING_BACK, E.REVERTED):      (S.ROLLED_BACK,  F.TIDY),
    (S.ROLLING_BACK, E.REVERT_FAILED): (S.FAILED,       F.TIDY),
    (S.ROLLING_BACK, E.PLANE_DIED):    (S.ROLLING_BACK, F.REVERT),
}

# After the agent was killed in a state: the effect that runs again. IDLE, SWAPPING and PROBATION are decided in
# `resume`: the first two by the pointer on disk, the last by how often it was interrupted.
RESUME: dict[DeploymentState, Effect] = {
    S.IDLE:         F.TIDY,       # unless the pointer still names what was withdrawn
    S.VERIFIED:     F.ADMIT,
    S.DOWNLOADING:  F.DOWNLOAD,   # goes on from the last byte on disk
    S.STAGED:       F.CHECK_ROOM,
    S.SELFTEST:     F.TRY,        # in a fresh folder
    S.SHADOW:       F.COMPARE,    # from the start
    S.SWAPPING:     F.SWAP,       # unless the pointer already names the target
    S.PROBATION:    F.WATCH,      # from the start; at most MAX_PROBATION_INTERRUPTIONS
    S.COMMITTED:    F.TIDY,
    S.ROLLING_BACK: F.REVERT,
    S.ROLLED_BACK:  F.TIDY,
    S.FAILED:       F.TIDY,
    S.REJECTED:     F.TIDY,
    S.SUPERSEDED:   F.TIDY,
}
# fmt: on

AT_REST = frozenset({S.IDLE, S.COMMITTED, S.ROLLED_BACK, S.FAILED, S.REJECTED, S.SUPERSEDED})
IN_FLIGHT = frozenset({S.VERIFIED, S.DOWNLOADING, S.STAGED, S.SELFTEST, S.SHADOW, S.SWAPPING, S.ROLLING_BACK})
UNDIVIDED = frozenset({S.SWAPPING, S.ROLLING_BACK})  # nothing new is taken up before these end
ENDED_BADLY = frozenset({S.FAILED, S.REJECTED, S.ROLLED_BACK})  # only a higher attempt tries the same again


def advance(record: Deployment, happened: Happened, now: int) -> tuple[Deployment, Effect]:
    """Return the next record and the effect to run once it is persisted; raise `IllegalTransition`."""
    try:
        state, effect = TABLE[record.state, happened.event]
    except KeyError:
        raise IllegalTransition(record.state, happened.event) from None
    counted = _count(record, state, happened, now)
    if exhausted := _exhausted(counted, state, happened):
        return _enter(counted, *exhausted, now=now)
    if state is S.SHADOW and not _is_shadow_wanted(record):
        state, effect = TABLE[S.SHADOW, E.AGREED]
    return _enter(_take_up(counted, state, happened), state, effect, happened.reason, happened.detail, now=now)


def resume(record: Deployment, active_digest: str | None, now: int) -> tuple[Deployment, Effect]:
    """Return where a record goes on after the agent was started again.

    ``active_digest`` is what the pointer on disk names for this model: it alone decides a swap that was cut short.
    """
    if record.state is S.SWAPPING and record.target and record.target.sha256 == active_digest:
        return advance(record, Happened(event=E.SERVING), now)
    if record.state is S.PROBATION:
        counted = msgspec.structs.replace(record, interruptions=record.interruptions + 1)
        if counted.interruptions > MAX_PROBATION_INTERRUPTIONS:
            detail = f"the agent was stopped {counted.interruptions} times in probation"
            return _enter(counted, S.ROLLING_BACK, F.REVERT, RejectReason.INTERRUPTED, detail, now=now)
        return counted, F.WATCH
    if record.state is S.IDLE and record.serving is None and active_digest is not None:
        return record, F.REMOVE
    return record, RESUME[record.state]


def should_pursue(record: Deployment, target: Target, now: int) -> bool:
    """Tell whether a wanted target is news.

    It is not while an undivided step runs (ask again after it), nor when it is under way, serves, or is a (digest,
    attempt) that failed: only a higher attempt tries that again, or the repositories' taking back what they said
    against it. What is under way starts over for a higher attempt on other terms: forced, say, while it waits for its
    hour. After a loop nothing is news for a while, unless a person forces it.
    """
    if record.state in UNDIVIDED or (is_left_alone(record, now) and not target.assignment.forced):
        return False
    if target.objection:
        return _should_turn_down(record, target)
    if record.state is S.COMMITTED and record.serving and record.serving.digest == target.sha256:
        return False
    if record.target is None or record.target.sha256 != target.sha256:
        return True
    if record.state in (S.IDLE, S.SUPERSEDED):
        return True
    withdrawn = record.state is S.REJECTED and record.target.objection is not None
    return withdrawn or _tries_again(record, record.target, target) or _has_other_terms(record, record.target, target)


def _should_turn_down(record: Deployment, target: Target) -> bool:
    """Tell whether an objection is news, also against what serves: it serves on, and is reported.

    In probation it waits: what is on probation must be committed or taken back first.
    """
    if record.state is S.PROBATION:
        return False
    if record.target is None or record.target.sha256 != target.sha256:
        return True
    if record.state in ENDED_BADLY:
        return _tries_again(record, record.target, target)
    return record.target.objection is None or record.state is not S.VERIFIED


def _tries_again(record: Deployment, tried: Target, target: Target) -> bool:
    return record.state in ENDED_BADLY and target.assignment.attempt > tried.assignment.attempt


def _has_other_terms(record: Deployment, wanted: Target, target: Target) -> bool:
    """A person ordered the same again, to be done otherwise; once it serves there is nothing left to change."""
    before, now = wanted.assignment, target.assignment
    is_other = (before.forced, before.shadow) != (now.forced, now.shadow)
    return record.state in IN_FLIGHT and is_other and now.attempt > before.attempt


def waits_for_room(record: Deployment, target: Target, now: int) -> bool:
    """Tell whether a wanted target was turned down for want of room only, and may be looked at again now.

    A full disk is the device's fault and passes; it must not take a new order from the fleet to try again.
    """
    turned_down = record.state is S.REJECTED and record.reason is RejectReason.NO_SPACE
    same = record.target is not None and record.target.sha256 == target.sha256
    waited = not 0 <= now - record.since < ROOM_PAUSE_MS  # a clock that was set back counts as waited
    return turned_down and same and waited and target.objection is None


def is_left_alone(record: Deployment, now: int) -> bool:
    """Tell whether the loop breaker holds a model where it is."""
    ended = record.state in (S.FAILED, S.ROLLED_BACK) and record.reason is RejectReason.LOOPING
    return ended and 0 <= now - record.since < LOOP_MS


def fall_back(record: Deployment, is_intact: Callable[[str], bool]) -> Serving | None:
    """Return what could serve instead of what does: the last known good first, the factory's at the end.

    ``is_intact`` tells whether a bundle is in the store, whole. A floor binds from the moment a version at or above
    it was committed; until then the device may go back to what it ran before the floor rose.
    """
    floor = record.target.floor if record.target and record.committed == record.serving else 0
    known = (record.committed, record.previous, record.factory)
    earlier = (one for one in known if one and one != record.serving and one.version >= floor)
    return next((one for one in earlier if is_intact(one.digest)), None)


def running_model(record: Deployment) -> RunningModel:
    """Return what the birth says of a model: what serves, and where its update stands."""
    return RunningModel(
        model=record.model,
        state=record.state,
        version=record.serving.version if record.serving else None,
        digest=record.serving.digest if record.serving else None,
        attempt=record.target.assignment.attempt if record.target else 0,
        reason=record.reason,
    )


def _is_shadow_wanted(record: Deployment) -> bool:
    """A shadow needs an assignment that asks for it, and a version that serves to be compared with."""
    wanted = record.target is not None and record.target.assignment.shadow is not None
    return wanted and record.serving is not None


def _count(record: Deployment, state: DeploymentState, happened: Happened, now: int) -> Deployment:
    event = happened.event
    if event is E.ASSIGNED and state is S.VERIFIED:
        recent = tuple(at for at in record.taken_up if 0 <= now - at < LOOP_MS)
        return msgspec.structs.replace(record, taken_up=(*recent, now))
    if event is E.PLANE_DIED and record.state is S.SHADOW:
        return msgspec.structs.replace(record, shadow_tries=record.shadow_tries + 1)
    if event is E.INTERRUPTED:
        tries = record.download_tries + happened.is_a_try
        return msgspec.structs.replace(record, download_tries=tries, retry_at=now + happened.patience_ms)
    if event is E.PLANE_DIED and record.state is S.SWAPPING:
        return msgspec.structs.replace(record, swap_tries=record.swap_tries + 1)
    if event is E.PLANE_DIED and record.state is S.PROBATION:
        return msgspec.structs.replace(record, crashes=record.crashes + 1)
    return record


def _exhausted(
    record: Deployment, state: DeploymentState, happened: Happened
) -> tuple[DeploymentState, Effect, RejectReason, str] | None:
    """Return where a counter at its maximum leads instead of where the table does."""
    if state is S.VERIFIED and len(record.taken_up) > MAX_TAKE_UPS and not _is_forced(happened):
        detail = f"{len(record.taken_up)} targets within an hour are a loop; the next is taken up in an hour"
        uncommitted = record.committed is not None and record.serving != record.committed
        end = (S.ROLLING_BACK, F.REVERT) if uncommitted else (S.FAILED, F.TIDY)
        return *end, RejectReason.LOOPING, detail
    if happened.event is E.PLANE_DIED and record.state is S.SHADOW and record.shadow_tries >= MAX_SHADOW_TRIES:
        detail = f"the data plane died {record.shadow_tries} times while the candidate was compared"
        return S.REJECTED, F.TIDY, RejectReason.SHADOW_FAILED, detail
    if happened.event is E.INTERRUPTED and record.download_tries >= MAX_DOWNLOAD_TRIES:
        detail = f"gave up after {record.download_tries} downloads: {happened.detail}"
        return S.FAILED, F.TIDY, RejectReason.UNREACHABLE, detail
    if happened.event is E.PLANE_DIED and record.state is S.SWAPPING and record.swap_tries >= MAX_SWAP_TRIES:
        detail = f"the data plane died {record.swap_tries} times while taking it up"
        return S.FAILED, F.TIDY, RejectReason.SWAP_FAILED, detail
    if happened.event is E.PLANE_DIED and record.state is S.PROBATION and record.crashes >= MAX_PROBATION_CRASHES:
        detail = f"the data plane died {record.crashes} times in probation"
        return S.ROLLING_BACK, F.REVERT, RejectReason.CRASHED_IN_PROBATION, detail
    return None


def _is_forced(happened: Happened) -> bool:
    return happened.target is not None and happened.target.assignment.forced


def _take_up(record: Deployment, state: DeploymentState, happened: Happened) -> Deployment:
    """Return the record with what the event changes beside the state."""
    target = record.target
    if state is S.VERIFIED:
        return Deployment(
            model=record.model,
            serving=record.serving,
            committed=record.committed,
            previous=record.previous,
            factory=record.factory,
            target=happened.target,
            taken_up=record.taken_up,
        )
    if state is S.IDLE:
        return Deployment(model=record.model, taken_up=record.taken_up)
    if happened.event is E.SERVING and target:
        serving = Serving(version=target.release.version, digest=target.sha256)
        return msgspec.structs.replace(record, serving=serving)
    if state is S.COMMITTED:
        same = record.committed == record.serving
        return msgspec.structs.replace(
            record,
            committed=record.serving,
            previous=record.previous if same else record.committed,
            factory=record.factory or record.serving,
        )
    if happened.event is E.REVERTED:
        previous = None if record.previous == happened.serving else record.previous
        return msgspec.structs.replace(
            record, serving=happened.serving, committed=happened.serving, previous=previous
        )
    return record


def _enter(
    record: Deployment,
    state: DeploymentState,
    effect: Effect,
    reason: RejectReason | None,
    detail: str,
    *,
    now: int,
) -> tuple[Deployment, Effect]:
    keep = state is S.ROLLED_BACK  # the reason of the rollback outlives it
    return (
        msgspec.structs.replace(
            record,
            state=state,
            since=now,
            reason=record.reason if keep else reason,
            detail=record.detail if keep else detail,
        ),
        effect,
    )
