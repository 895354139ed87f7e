"""Performs the effects of the update machine and tells it what happened. Chooses nothing: see `core/deployment.py`.

All methods run on the main thread. Blocking work goes to `Background`, which hands results back on the main thread;
a result whose ticket is no longer the model's own belongs to work that was superseded, and is dropped. One model at a
time is on its way; the others wait for their turn. Waiting goes by a clock that never jumps.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timezone, tzinfo
from functools import partial

import msgspec

from agent.channel import CANDIDATE, Refused, Serving, Withdrawn
from agent.core import deployment, rungs
from agent.core.admission import object_to, object_to_trial
from agent.core.deployment import IN_FLIGHT, Deployment, Effect, Event, Happened
from agent.core.facts import DeviceFacts, Objection, Target, VerifiedDesire
from agent.core.holding import Hours, must_wait
from agent.core.retry import BackOff
from agent.ports import (
    Background,
    DataPlane,
    Deployments,
    Downloads,
    EventLog,
    ModelStore,
    Postponed,
    Refusal,
    Trials,
    Trouble,
    Weather,
)
from agent.verdicts import Verdicts
from protocol.states import DeploymentState, EventKind, RejectReason

log = logging.getLogger(__name__)

DOWNLOAD_BACK_OFF = BackOff(first=2.0, ceiling=900.0)  # seconds, after a download that the weather stopped
LOOK_AGAIN_SECONDS = 60.0  # while an update is held; a hold may end early, a clock may jump
DISK_SECONDS = 5.0  # after the disk refused a step; nothing goes on before the step is on it


@dataclass(frozen=True, kw_only=True)
class Calm:
    """When this device may be disturbed by an update."""

    hours: Sequence[Hours] = ()  # empty: any time
    zone: tzinfo = timezone.utc
    hold: Callable[[], int] = lambda: 0  # until when (UTC ms) an application wants no update


@dataclass(kw_only=True)
class _Due:
    """Something to be done at a time (monotonic seconds)."""

    at: float
    action: Callable[[int], None] = field(repr=False)


class Updater:
    """The update machines of all models of this device."""

    def __init__(
        self,
        *,
        facts: DeviceFacts,
        deployments: Deployments,
        store: ModelStore,
        downloads: Downloads,
        trials: Trials,
        plane: DataPlane,
        background: Background,
        events: EventLog,
        changed: Callable[[], None],
        random: Callable[[], float],
        monotonic: Callable[[], float],
        verdicts: Verdicts,
        calm: Calm,
        troubled: Callable[[Trouble], None] = lambda _: None,
    ) -> None:
        """``changed`` is called after each transition; ``random`` gives numbers in [0, 1); ``monotonic`` seconds.

        ``troubled`` hears of a disk that refuses a step, each time that it is tried.
        """
        self._facts = facts
        self._deployments = deployments
        self._store = store
        self._downloads = downloads
        self._trials = trials
        self._plane = plane
        self._background = background
        self._events = events
        self._changed = changed
        self._random = random
        self._monotonic = monotonic
        self._verdicts = verdicts
        self._calm = calm
        self._troubled = troubled
        self._records: dict[str, Deployment] = {}
        self._on_disk: dict[str, Deployment] = {}
        self._wanted: dict[str, Target] | None = None
        self._ticket = 0
        self._tickets: dict[str, int] = {}
        self._due: dict[str, _Due] = {}
        self._held: dict[str, str] = {}  # why a model's update waits
        self._candidates: set[str] = set()  # models with a candidate in the data plane

    # ------------------------------------------------------------ what the daemon tells
    def start(self, now: int) -> None:
        """Serve what served before, then go on where each model stood."""
        self._on_disk = dict(self._deployments.load())
        self._records = dict(self._on_disk)
        self._adopt_active()
        for model, digest in {**self._served_before(), **self._store.active()}.items():
            if stored := self._store.find(digest):
                self._plane.serve(0, stored)
            else:
                self._lost_from_store(model, digest)
        for model in sorted(self._records):
            self._insist(model, partial(self._resume, model), now)

    def _resume(self, model: str, now: int) -> None:
        before = self._records[model]
        record, effect = deployment.resume(before, self._store.active().get(model), now)
        self._enter(record, effect, now, announce=before.state is not record.state)

    def want(self, desire: VerifiedDesire, now: int) -> None:
        """Pursue a verified desired state."""
        self._wanted = {target.release.model: target for target in desire.targets}
        self._pursue(now)

    def tick(self, now: int) -> None:
        """Run what is due: verdicts, downloads to try again, updates that were held, models whose turn has come."""
        while due := [model for model, one in self._due.items() if one.at <= self._monotonic()]:
            self._insist(due[0], self._due.pop(due[0]).action, now)
        for record in self.records():
            if happened := self._verdicts.judge(record):
                self._insist(record.model, partial(self._feed, record.model, happened), now)
        self._pursue(now)

    def plane_serves(self, answer: Serving, now: int) -> None:
        """The data plane flipped a model. Answers to orders that are not the newest mean nothing here."""
        if self._tickets.get(answer.model) != answer.ticket:
            return
        if answer.alias == CANDIDATE:
            self._verdicts.candidate_serves(answer, self._records[answer.model])
            return
        self._insist(answer.model, partial(self._point_to, answer), now)

    def _point_to(self, answer: Serving, now: int) -> None:
        if self._tickets.get(answer.model) != answer.ticket:
            return
        self._store.activate(answer.model, answer.digest)
        reverting = self._records[answer.model].state is DeploymentState.ROLLING_BACK
        happened = Happened(
            event=Event.REVERTED if reverting else Event.SERVING,
            serving=deployment.Serving(version=answer.version, digest=answer.digest),
            detail=f"{answer.runtime.value}, swapped in {answer.took_us / 1000:.0f} ms",
        )
        self._feed(answer.model, happened, now)

    def plane_refuses(self, answer: Refused, now: int) -> None:
        """The data plane could not take a model up; what served before serves on."""
        if self._tickets.get(answer.model) != answer.ticket:
            detail = f"{answer.model} could not be loaded again and does not serve: {answer.reason}"
            self._events.record(kind=EventKind.DATA_PLANE, model=answer.model, detail=detail)
            return
        if answer.alias == CANDIDATE:
            self._verdicts.candidate_refused(answer.model, answer.reason)
            return
        reverting = self._records[answer.model].state is DeploymentState.ROLLING_BACK
        event = Event.REVERT_FAILED if reverting else Event.SWAP_REFUSED
        happened = Happened(event=event, reason=RejectReason.SWAP_FAILED, detail=answer.reason)
        self._insist(answer.model, partial(self._feed, answer.model, happened), now)

    def plane_withdrew(self, answer: Withdrawn, now: int) -> None:
        """The data plane serves a model no more."""
        del now
        log.info("model %s is withdrawn", answer.model)

    def plane_died(self, now: int) -> None:
        """The data plane ended unasked; the supervisor starts it again."""
        touched = (
            DeploymentState.SHADOW,
            DeploymentState.SWAPPING,
            DeploymentState.PROBATION,
            DeploymentState.ROLLING_BACK,
        )
        for model, record in list(self._records.items()):
            if record.state in touched:
                self._insist(model, partial(self._feed, model, Happened(event=Event.PLANE_DIED)), now)

    def take_back(self, model: str, now: int) -> str:
        """Go back to an earlier version, as a person at this device wants; return what will serve.

        Raises `Refusal` where there is nothing to go back to, or not now.
        """
        record = self._records.get(model)
        if record is None:
            raise Refusal(RejectReason.NOT_RELEASED, f"model {model!r} is not known here")
        if (record.state, Event.TAKEN_BACK) not in deployment.TABLE:
            raise Refusal(RejectReason.TAKEN_BACK, f"{model} is {record.state.value}; nothing is taken back now")
        earlier = deployment.fall_back(record, self._is_intact)
        if earlier is None:
            raise Refusal(RejectReason.TAKEN_BACK, f"no earlier version of {model} is on this device, or may run")
        reason = RejectReason.TAKEN_BACK
        self._feed(model, Happened(event=Event.TAKEN_BACK, reason=reason, detail="by hand, on the device"), now)
        return f"{model} {earlier.version}"

    def records(self) -> tuple[Deployment, ...]:
        """Return what is known of every model, by name."""
        return tuple(self._records[model] for model in sorted(self._records))

    # ------------------------------------------------------------ the machine
    def _pursue(self, now: int) -> None:
        if self._wanted is None:
            return
        for model in sorted({*self._wanted, *self._records}):
            record = self._records.get(model, Deployment(model=model))
            target = self._wanted.get(model)
            try:
                if target is None:
                    self._withdraw(record, now)
                elif self._is_news(record, target, now) and self._may_start(record):
                    self._feed(model, Happened(event=Event.ASSIGNED, target=target), now)
            except Trouble as trouble:  # it is news again at the next tick
                self._troubled(trouble)

    def _is_news(self, record: Deployment, target: Target, now: int) -> bool:
        if deployment.waits_for_room(record, target, now):
            return self._downloads.has_room(target)
        return deployment.should_pursue(record, target, now)

    def _withdraw(self, record: Deployment, now: int) -> None:
        if record.state is not DeploymentState.IDLE and record.state not in deployment.UNDIVIDED:
            self._feed(record.model, Happened(event=Event.WITHDRAWN), now)

    def _may_start(self, record: Deployment) -> bool:
        """One model at a time; one that is already on its way may be superseded, and those that wait do not count."""
        others = (other for other in self._records.values() if other.model != record.model)
        busy = (other for other in others if other.model not in self._held)
        return not any(other.state in IN_FLIGHT and other.state is not DeploymentState.SHADOW for other in busy)

    def _feed(self, model: str, happened: Happened, now: int) -> None:
        before = self._records.get(model, Deployment(model=model))
        record, effect = deployment.advance(before, happened, now)
        self._enter(record, effect, now, announce=before.state is not record.state)

    def _insist(self, model: str, act: Callable[[int], None], now: int) -> None:
        """Do what the disk may refuse, again until it is done: a step that is not on the disk has not happened."""
        try:
            act(now)
        except Trouble as trouble:
            self._troubled(trouble)
            again = _Due(at=self._monotonic() + DISK_SECONDS, action=act)
            self._due.setdefault(model, again)

    def _enter(self, record: Deployment, effect: Effect, now: int, *, announce: bool = False) -> None:
        if record != self._on_disk.get(record.model):  # a start that changes nothing writes nothing
            self._deployments.save(record)
        self._on_disk[record.model] = self._records[record.model] = record
        if announce:
            self._tell(record)
        self._ticket += 1
        self._tickets[record.model] = self._ticket
        self._due.pop(record.model, None)
        self._held.pop(record.model, None)
        self._forget_what_ended(record)
        self._insist(record.model, partial(self._perform, record, effect, self._ticket), now)
        self._changed()

    def _perform(self, record: Deployment, effect: Effect, ticket: int, now: int) -> None:
        if self._tickets[record.model] == ticket:
            self._effects[effect](self, record, ticket, now)

    def _forget_what_ended(self, record: Deployment) -> None:
        """A candidate that will not serve is withdrawn; one that serves was promoted by the swap."""
        if record.state not in (DeploymentState.SHADOW, DeploymentState.PROBATION):
            self._verdicts.forget(record.model)
        is_candidate = record.state in (DeploymentState.SHADOW, DeploymentState.SWAPPING)
        if record.model in self._candidates and not is_candidate:
            self._candidates.discard(record.model)
            self._plane.withdraw(self._ticket, record.model, CANDIDATE)

    def _tell(self, record: Deployment) -> None:
        release = record.target.release if record.target else None
        log.info("%s %s: %s %s", record.model, release.version if release else "-", record.state.value, record.detail)
        self._events.record(
            kind=EventKind.DEPLOYMENT,
            model=record.model,
            version=release.version if release else None,
            digest=record.target.sha256 if record.target else None,
            state=record.state,
            reason=record.reason,
            attempt=record.target.assignment.attempt if record.target else None,
            detail=record.detail,
        )

    def _run(self, record: Deployment, ticket: int, work: Callable[[], Happened]) -> None:
        def done(happened: Happened) -> None:
            if self._tickets.get(record.model) == ticket:
                self._later(record.model, happened)

        self._background.submit(f"{record.state.value} {record.model}", partial(_catch, work), done)

    def _later(self, model: str, happened: Happened) -> None:
        """Feed an event that came about without a time of its own; the next tick, which follows at once, has one."""
        self._due[model] = _Due(at=0.0, action=lambda now: self._feed(model, happened, now))

    # ------------------------------------------------------------ the effects
    def _admit(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        target = _target_of(record)

        def admit() -> Happened:
            if objection := object_to(target, self._facts):
                return _refused(objection)
            return Happened(event=Event.STORED if self._store.find(target.sha256) else Event.FITS)

        self._run(record, ticket, admit)

    def _download(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        target = _target_of(record)

        def fetch() -> Happened:
            self._downloads.fetch(target, lambda _: None, lambda: self._tickets.get(record.model) != ticket)
            return Happened(event=Event.DOWNLOADED)

        self._run(record, ticket, fetch)

    def _download_later(self, record: Deployment, ticket: int, now: int) -> None:
        pause = DOWNLOAD_BACK_OFF.delay(record.download_tries, self._random())
        asked = max(0, record.retry_at - now) / 1000  # whoever stopped it asked for patience
        self._due[record.model] = _Due(
            at=self._monotonic() + asked + pause, action=lambda at: self._download(record, ticket, at)
        )

    def _check_room(self, record: Deployment, ticket: int, now: int) -> None:
        """What passed its trial here before needs no room for another; everything waits for its hour."""
        target = _target_of(record)
        is_stored = self._store.find(target.sha256) is not None
        objection = None if is_stored else object_to_trial(target, self._facts)
        if objection:
            self._later(record.model, _refused(objection))
        elif not self._waits(record, ticket, now):
            passed = Happened(event=Event.PASSED, detail="it passed its trial here before")
            self._later(record.model, passed if is_stored else Happened(event=Event.CLEARED))

    def _waits(self, record: Deployment, ticket: int, now: int) -> bool:
        calm, forced = self._calm, _target_of(record).assignment.forced
        wait = must_wait(now, hold=calm.hold(), hours=calm.hours, zone=calm.zone, forced=forced)
        if wait is None:
            return False
        if self._held.get(record.model) != wait.why:
            self._held[record.model] = wait.why
            self._tell(msgspec.structs.replace(record, detail=f"waits: {wait.why}"))
        pause = min(LOOK_AGAIN_SECONDS, (wait.until - now) / 1000)
        self._due[record.model] = _Due(
            at=self._monotonic() + pause, action=lambda at: self._check_room(record, ticket, at)
        )
        return True

    def held(self, model: str) -> str:
        """Return why a model's update waits; empty when it does not."""
        return self._held.get(model, "")

    def look_again(self) -> None:
        """A hold began or ended: updates that wait are looked at with the next tick."""
        for model in self._held:
            if model in self._due:
                self._due[model].at = 0.0

    def _try(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        target = _target_of(record)

        def try_it() -> Happened:
            bundle = self._downloads.fetch(
                target, lambda _: None, lambda: False
            )  # on disk already; the hash is checked
            verdict = self._trials.run(bundle, self._store.stage(target.sha256), target)
            if not verdict.passed:
                reason = RejectReason(verdict.reason) if verdict.reason else RejectReason.SELFTEST_FAILED
                return Happened(event=Event.REFUSED, reason=reason, detail=verdict.detail)
            self._store.admit(target.sha256)
            runtime = verdict.runtime.value if verdict.runtime else "?"
            detail = f"{verdict.golden} golden samples agree on {runtime}"
            if verdict.ladder:
                self._store.note_rungs(target.sha256, verdict.ladder)
            if best := rungs.choose(verdict.ladder):
                detail += f"; runs as {rungs.name(best)}; measured: {rungs.summary(verdict.ladder)}"
            return Happened(event=Event.PASSED, detail=detail)

        self._run(record, ticket, try_it)

    def _swap(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        if stored := self._store.find(_target_of(record).sha256):
            self._plane.serve(ticket, stored)
        else:
            detail = "the verified bundle is no longer in the store"
            self._later(
                record.model, Happened(event=Event.SWAP_REFUSED, reason=RejectReason.SWAP_FAILED, detail=detail)
            )

    def _compare(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        self._verdicts.compare(record, ticket)
        if stored := self._store.find(_target_of(record).sha256):
            self._candidates.add(record.model)
            self._plane.serve(ticket, stored, CANDIDATE)
        else:
            self._verdicts.candidate_refused(record.model, "the verified bundle is no longer in the store")

    def _watch(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        self._verdicts.watch(record, ticket)

    def _revert(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        earlier = deployment.fall_back(record, self._is_intact)
        stored = self._store.find(earlier.digest) if earlier else None
        if stored:
            self._plane.serve(ticket, stored)
        else:
            detail = "no earlier version is in the store and may run"
            self._later(record.model, Happened(event=Event.REVERT_FAILED, reason=record.reason, detail=detail))

    def _tidy(self, record: Deployment, ticket: int, now: int) -> None:
        del ticket, now
        if record.target:
            self._downloads.discard(record.target.sha256)
        if not any(other.state in IN_FLIGHT for other in self._records.values()):
            keep = self._worth_keeping()
            self._store.collect(sorted(keep))
            self._downloads.collect(sorted(self._worth_resuming()))
            self._verdicts.keep_only(keep)

    def _start_over(self, record: Deployment, ticket: int, now: int) -> None:
        """The new ticket makes running work stop and its result void; the next tick pursues what is wanted now."""
        del ticket, now
        log.info("%s is superseded", record.model)

    def _remove(self, record: Deployment, ticket: int, now: int) -> None:
        self._store.activate(record.model, None)
        self._plane.withdraw(ticket, record.model)
        self._tidy(record, ticket, now)

    _effects = {  # noqa: RUF012 - the one table from the machine's effects to the methods above; never changed
        Effect.ADMIT: _admit,
        Effect.DOWNLOAD: _download,
        Effect.DOWNLOAD_LATER: _download_later,
        Effect.CHECK_ROOM: _check_room,
        Effect.TRY: _try,
        Effect.COMPARE: _compare,
        Effect.SWAP: _swap,
        Effect.WATCH: _watch,
        Effect.REVERT: _revert,
        Effect.TIDY: _tidy,
        Effect.START_OVER: _start_over,
        Effect.REMOVE: _remove,
    }

    # ------------------------------------------------------------ the store
    def _worth_keeping(self) -> set[str]:
        """What serves, what was committed, and each model's target: a rollback must not need the network."""
        keep = set(self._store.active().values())
        for record in self._records.values():
            versions = (record.serving, record.committed, record.previous, record.factory)
            keep |= {version.digest for version in versions if version}
            keep |= {record.target.sha256} if record.target else set()
        return keep

    def _worth_resuming(self) -> set[str]:
        """What a download may bring yet. Of a target that was superseded nothing is left but this."""
        wanted = (self._wanted or {}).values()
        targets = (record.target for record in self._records.values())
        return {target.sha256 for target in (*wanted, *targets) if target}

    def _adopt_active(self) -> None:
        """A pointer without a record (its file was lost) still names a verified model: it counts as committed."""
        for model, digest in self._store.active().items():
            stored = self._store.find(digest)
            if model not in self._records and stored:
                version = deployment.Serving(version=stored.manifest.version, digest=digest)
                self._records[model] = Deployment(
                    model=model,
                    state=DeploymentState.COMMITTED,
                    serving=version,
                    committed=version,
                    factory=version,
                )

    def _served_before(self) -> dict[str, str]:
        """A record without a pointer (its file was lost) still names what served, and the pointer is made again."""
        pointed = self._store.active()
        served = {
            model: record.serving.digest
            for model, record in self._records.items()
            if record.serving and model not in pointed and self._store.find(record.serving.digest)
        }
        for model, digest in served.items():
            self._keep_pointer(model, digest)
        return served

    def _keep_pointer(self, model: str, digest: str | None) -> None:
        """What serves does not wait for the disk; the next start finds out anew."""
        try:
            self._store.activate(model, digest)
        except Trouble as trouble:
            self._troubled(trouble)

    def _is_intact(self, digest: str) -> bool:
        return self._store.find(digest) is not None

    def _lost_from_store(self, model: str, digest: str) -> None:
        """The active bundle is damaged: never load it. Fall back to an earlier one, else wait for the fleet."""
        record = self._records.get(model, Deployment(model=model))
        earlier = deployment.fall_back(record, self._is_intact)
        stored = self._store.find(earlier.digest) if earlier else None
        self._keep_pointer(model, stored.digest if stored else None)
        if stored:
            self._plane.serve(0, stored)
        self._records[model] = Deployment(
            model=model, serving=earlier, committed=earlier, factory=earlier and record.factory
        )
        remedy = (
            f"version {earlier.version} serves instead"
            if earlier
            else "nothing serves until the fleet sends it again"
        )
        self._events.record(
            kind=EventKind.AGENT,
            model=model,
            reason=RejectReason.HASH_MISMATCH,
            detail=f"bundle {digest[:16]} in the store is damaged; {remedy}",
        )


def _target_of(record: Deployment) -> Target:
    assert record.target is not None  # the table enters these states with a target only
    return record.target


def _refused(objection: Objection) -> Happened:
    return Happened(event=Event.REFUSED, reason=objection.reason, detail=objection.detail)


def _catch(work: Callable[[], Happened]) -> Happened:
    """Turn what adapters raise into events: a refusal is final, everything else may pass."""
    try:
        return work()
    except Refusal as refusal:
        return Happened(event=Event.REFUSED, reason=refusal.reason, detail=refusal.detail)
    except Weather as weather:
        patience = int((weather.retry_after or 0) * 1000)
        postponed = isinstance(weather, Postponed)
        return Happened(event=Event.INTERRUPTED, detail=str(weather), patience_ms=patience, is_a_try=not postponed)
    except (Trouble, OSError) as error:
        return Happened(event=Event.INTERRUPTED, detail=str(error))
    except Exception as error:  # the machine must hear of every end, of a bug too
        log.exception("background work failed")
        return Happened(event=Event.INTERRUPTED, detail=f"internal error: {error!r}")
