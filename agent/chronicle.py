"""Tells each event twice: to the fleet, and to the history that people read at the device."""

from collections.abc import Callable

from agent.local_api import Step
from agent.ports import EventLog, Steps
from protocol.states import DeploymentState, EventKind, RejectReason


class Chronicle:
    """Implements `agent.ports.EventLog` in front of another one."""

    def __init__(self, fleet: EventLog, history: Steps, now: Callable[[], int]) -> None:
        """``now`` returns UTC ms."""
        self._fleet = fleet
        self._history = history
        self._now = now

    def record(
        self,
        *,
        kind: EventKind,
        model: str | None = None,
        version: int | None = None,
        digest: str | None = None,
        state: DeploymentState | None = None,
        reason: RejectReason | None = None,
        attempt: int | None = None,
        detail: str = "",
    ) -> None:
        """Pass an event on; steps of the update machine are kept here too."""
        self._fleet.record(
            kind=kind,
            model=model,
            version=version,
            digest=digest,
            state=state,
            reason=reason,
            attempt=attempt,
            detail=detail,
        )
        if state is not None and model is not None:
            at = self._now()
            step = Step(
                at=at, model=model, state=state, version=version, attempt=attempt, reason=reason, detail=detail
            )
            self._history.add(step)
