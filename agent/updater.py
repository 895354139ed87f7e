"""Performs the effects of the update machine and tells it what happened. Chooses nothing: see `core/deployment.py`.

All methods run on the main thread. Blocking work goes to `Background`, which hands results back on the main thread;
a result whose ticket is no longer the model's own belongs to work that was superseded, and is dropped. One model at a
time is on its way; the others wait for their turn.
"""

import logging
from collections.abc import Callable
from functools import partial

from agent.channel import Refused, Serving, Withdrawn
from agent.core import deployment, rungs
from agent.core.admission import Objection, object_to, object_to_trial
from agent.core.deployment import IN_FLIGHT, Deployment, Effect, Event, Happened
from agent.core.facts import DeviceFacts, Target, VerifiedDesire
from agent.core.retry import BackOff
from agent.ports import (
    Background,
    DataPlane,
    Deployments,
    Downloads,
    EventLog,
    ModelStore,
    Refusal,
    Trials,
    Trouble,
    Weather,
)
from protocol.states import DeploymentState, EventKind, RejectReason

log = logging.getLogger(__name__)

DOWNLOAD_BACK_OFF = BackOff(first=2.0, ceiling=900.0)  # seconds, after a download that the weather stopped


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
        probation_ms: int,
    ) -> None:
        """``changed`` is called after each transition; ``random`` gives numbers in [0, 1)."""
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
        self._probation_ms = probation_ms
        self._records: dict[str, Deployment] = {}
        self._wanted: dict[str, Target] | None = None
        self._ticket = 0
        self._tickets: dict[str, int] = {}
        self._due: dict[str, tuple[int, Callable[[int], None]]] = {}

    # ------------------------------------------------------------ what the daemon tells
    def start(self, now: int) -> None:
        """Serve what served before, then go on where each model stood."""
        self._records = dict(self._deployments.load())
        self._adopt_active()
        for model, digest in dict(self._store.active()).items():
            if stored := self._store.find(digest):
                self._plane.serve(0, stored)
            else:
                self._lost_from_store(model, digest)
        for model in sorted(self._records):
            before = self._records[model]
            record, effect = deployment.resume(before, self._store.active().get(model), now)
            self._enter(record, effect, now, announce=before.state is not record.state)

    def want(self, desire: VerifiedDesire, now: int) -> None:
        """Pursue a verified desired state."""
        self._wanted = {target.release.model: target for target in desire.targets}
        self._pursue(now)

    def tick(self, now: int) -> None:
        """Run what is due: the end of a probation, a download to try again, a model whose turn has come."""
        while due := [model for model, (at, _) in self._due.items() if at <= now]:
            _, action = self._due.pop(due[0])
            action(now)
        self._pursue(now)

    def plane_serves(self, answer: Serving, now: int) -> None:
        """The data plane flipped a model. Answers to orders that are not the newest mean nothing here."""
        if self._tickets.get(answer.model) != answer.ticket:
            return
        self._store.activate(answer.model, answer.digest)
        record = self._records[answer.model]
        reverting = record.state is DeploymentState.ROLLING_BACK
        detail = f"{answer.runtime.value}, swapped in {answer.took_us / 1000:.0f} ms"
        self._feed(answer.model, Happened(event=Event.REVERTED if reverting else Event.SERVING, detail=detail), now)

    def plane_refuses(self, answer: Refused, now: int) -> None:
        """The data plane could not take a model up; what served before serves on."""
        if self._tickets.get(answer.model) != answer.ticket:
            detail = f"{answer.model} could not be loaded again and does not serve: {answer.reason}"
            self._events.record(kind=EventKind.DATA_PLANE, model=answer.model, detail=detail)
            return
        reverting = self._records[answer.model].state is DeploymentState.ROLLING_BACK
        event = Event.REVERT_FAILED if reverting else Event.SWAP_REFUSED
        self._feed(answer.model, Happened(event=event, reason=RejectReason.SWAP_FAILED, detail=answer.reason), now)

    def plane_withdrew(self, answer: Withdrawn, now: int) -> None:
        """The data plane serves a model no more."""
        del now
        log.info("model %s is withdrawn", answer.model)

    def plane_died(self, now: int) -> None:
        """The data plane ended unasked; the supervisor starts it again."""
        touched = (DeploymentState.SWAPPING, DeploymentState.PROBATION, DeploymentState.ROLLING_BACK)
        for model, record in list(self._records.items()):
            if record.state in touched:
                self._feed(model, Happened(event=Event.PLANE_DIED), now)

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
            if target is None:
                self._withdraw(record, now)
            elif deployment.should_pursue(record, target) and self._may_start(record):
                self._feed(model, Happened(event=Event.ASSIGNED, target=target), now)

    def _withdraw(self, record: Deployment, now: int) -> None:
        if record.state is not DeploymentState.IDLE and record.state not in deployment.UNDIVIDED:
            self._feed(record.model, Happened(event=Event.WITHDRAWN), now)

    def _may_start(self, record: Deployment) -> bool:
        """One model at a time; one that is already on its way may be superseded."""
        others = (other for other in self._records.values() if other.model != record.model)
        return not any(other.state in IN_FLIGHT for other in others)

    def _feed(self, model: str, happened: Happened, now: int) -> None:
        before = self._records.get(model, Deployment(model=model))
        record, effect = deployment.advance(before, happened, now)
        self._enter(record, effect, now, announce=before.state is not record.state)

    def _enter(self, record: Deployment, effect: Effect, now: int, *, announce: bool = False) -> None:
        self._deployments.save(record)
        self._records[record.model] = record
        if announce:
            self._tell(record)
        self._ticket += 1
        self._tickets[record.model] = self._ticket
        self._due.pop(record.model, None)
        self._effects[effect](self, record, self._ticket, now)
        self._changed()

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
        self._due[model] = (0, lambda now: self._feed(model, happened, now))

    # ------------------------------------------------------------ the effects
    def _rest(self, record: Deployment, ticket: int, now: int) -> None:
        """Wait for an assignment."""

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
        self._due[record.model] = (now + int(pause * 1000), lambda at: self._download(record, ticket, at))

    def _check_room(self, record: Deployment, ticket: int, now: int) -> None:
        del ticket, now
        objection = object_to_trial(_target_of(record), self._facts)
        self._later(record.model, _refused(objection) if objection else Happened(event=Event.CLEARED))

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
                detail += f"; fastest here is {rungs.name(best)}, {best.p50_us} us"
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

    def _watch(self, record: Deployment, ticket: int, now: int) -> None:
        del ticket
        ends = now + self._probation_ms
        survived = Happened(event=Event.SURVIVED)
        self._due[record.model] = (ends, lambda at: self._feed(record.model, survived, at))

    def _revert(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        stored = self._store.find(record.committed.digest) if record.committed else None
        if stored:
            self._plane.serve(ticket, stored)
        else:
            detail = "there is no committed version to go back to"
            self._later(record.model, Happened(event=Event.REVERT_FAILED, reason=record.reason, detail=detail))

    def _tidy(self, record: Deployment, ticket: int, now: int) -> None:
        del ticket, now
        if record.target:
            self._downloads.discard(record.target.sha256)
        if not any(other.state in IN_FLIGHT for other in self._records.values()):
            self._store.collect(sorted(self._worth_keeping()))

    def _start_over(self, record: Deployment, ticket: int, now: int) -> None:
        """The new ticket makes running work stop and its result void; the next tick pursues what is wanted now."""
        del ticket, now
        log.info("%s is superseded", record.model)

    def _remove(self, record: Deployment, ticket: int, now: int) -> None:
        del now
        self._store.activate(record.model, None)
        self._plane.withdraw(ticket, record.model)

    _effects = {  # noqa: RUF012 - the one table from the machine's effects to the methods above; never changed
        Effect.REST: _rest,
        Effect.ADMIT: _admit,
        Effect.DOWNLOAD: _download,
        Effect.DOWNLOAD_LATER: _download_later,
        Effect.CHECK_ROOM: _check_room,
        Effect.TRY: _try,
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
            versions = (record.serving, record.committed, record.previous)
            keep |= {version.digest for version in versions if version}
            keep |= {record.target.sha256} if record.target else set()
        return keep

    def _adopt_active(self) -> None:
        """A pointer without a record (its file was lost) still names a verified model: it counts as committed."""
        for model, digest in self._store.active().items():
            stored = self._store.find(digest)
            if model not in self._records and stored:
                version = deployment.Serving(version=stored.manifest.version, digest=digest)
                self._records[model] = Deployment(
                    model=model, state=DeploymentState.COMMITTED, serving=version, committed=version
                )

    def _lost_from_store(self, model: str, digest: str) -> None:
        """The active bundle is damaged: never load it. Fall back to the committed one, else wait for the fleet."""
        record = self._records.get(model, Deployment(model=model))
        committed = record.committed if record.committed and record.committed.digest != digest else None
        stored = self._store.find(committed.digest) if committed else None
        self._store.activate(model, stored.digest if stored else None)
        if stored:
            self._plane.serve(0, stored)
        self._records[model] = Deployment(
            model=model, serving=committed if stored else None, committed=committed if stored else None
        )
        remedy = "the committed version serves instead" if stored else "nothing serves until the fleet sends it again"
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
    except (Weather, Trouble, OSError) as error:
        return Happened(event=Event.INTERRUPTED, detail=str(error))
    except Exception as error:  # the machine must hear of every end, of a bug too
        log.exception("background work failed")
        return Happened(event=Event.INTERRUPTED, detail=f"internal error: {error!r}")
