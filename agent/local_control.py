"""Answers what a person at the device asks of the running agent, and carries out what they order.

Runs on the main thread, between two steps of the update machine; reading the disk is done in the background. What
may be taken back, and when an update waits, is the update machine's business.
"""

from collections.abc import Callable
from dataclasses import dataclass

from agent.core.deployment import Deployment
from agent.core.holding import MAX_HOLD_MS
from agent.local_api import (
    AskHistory,
    AskStatus,
    AskTrust,
    AskVerify,
    BundleCheck,
    Denied,
    Done,
    History,
    LocalAnswer,
    LocalRequest,
    ModelStatus,
    OrderHold,
    OrderRollback,
    Status,
    TrustStatus,
    Verified,
)
from agent.ports import Background, Hold, ModelStore, Refusal, Steps, Trouble
from agent.updater import Updater

Reply = Callable[[LocalAnswer], None]


@dataclass(frozen=True, kw_only=True)
class LocalControl:
    """What answers need. ``status`` fills in what only the wiring knows; ``trust`` reads the disk."""

    updater: Updater
    store: ModelStore
    history: Steps
    hold: Hold
    background: Background
    status: Callable[[tuple[ModelStatus, ...], int], Status]
    trust: Callable[[int], TrustStatus]

    def answer(self, request: LocalRequest, reply: Reply, now: int) -> None:
        """Answer a request, now or when the disk has been read (UTC ms)."""
        try:
            self._answer(request, reply, now)
        except (Refusal, Trouble) as error:
            reply(Denied(why=error.detail if isinstance(error, Refusal) else str(error)))

    def _answer(self, request: LocalRequest, reply: Reply, now: int) -> None:
        match request:
            case AskStatus():
                reply(self.status(self._models(), self._held_until(now)))
            case AskHistory():
                self.background.submit(
                    "history", lambda: History(steps=tuple(self.history.newest(request.limit, request.model))), reply
                )
            case AskTrust():
                self.background.submit("trust", lambda: self.trust(now), reply)
            case AskVerify():
                self.background.submit("verify the store", self._verify, reply)
            case OrderRollback():
                serves = self.updater.take_back(request.model, now)
                reply(Done(said=f"{serves} will serve; the fleet's next order for this model may change that"))
            case OrderHold():
                reply(self._hold(request.seconds, now))

    def _models(self) -> tuple[ModelStatus, ...]:
        return tuple(_model_status(record, self.updater.held(record.model)) for record in self.updater.records())

    def _held_until(self, now: int) -> int:
        until = self.hold.until()
        return until if until > now else 0

    def _hold(self, seconds: int, now: int) -> LocalAnswer:
        if not 0 <= seconds * 1000 <= MAX_HOLD_MS:
            return Denied(why=f"a hold lasts from 1 second to {MAX_HOLD_MS // 3_600_000} hours; 0 ends it")
        self.hold.set(now + seconds * 1000 if seconds else 0)
        self.updater.look_again()
        return Done(said=f"updates wait for {seconds} s; a forced one does not" if seconds else "updates go on")

    def _verify(self) -> Verified:
        active = set(self.store.active().values())
        return Verified(
            bundles=tuple(
                BundleCheck(
                    digest=stored.digest,
                    model=stored.manifest.model,
                    version=stored.manifest.version,
                    damage=damage,
                    active=stored.digest in active,
                )
                for stored, damage in self.store.check_all()
            )
        )


def _model_status(record: Deployment, waits: str) -> ModelStatus:
    return ModelStatus(
        model=record.model,
        state=record.state,
        since=record.since,
        serving=record.serving.version if record.serving else None,
        wanted=record.target.release.version if record.target else None,
        previous=record.previous.version if record.previous else None,
        factory=record.factory.version if record.factory else None,
        attempt=record.target.assignment.attempt if record.target else 0,
        reason=record.reason,
        detail=record.detail,
        waits=waits,
    )
