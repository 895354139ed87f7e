"""What a device's models are doing, from its birth and the events since. Pure.

A birth says everything but comes seldom; events come at each step. So the newest step after the birth overrides it.
"""

from collections.abc import Iterable

import msgspec

from protocol.messages import Birth, Event, RunningModel
from protocol.states import DeploymentState, EventKind

SERVES = frozenset({DeploymentState.PROBATION, DeploymentState.COMMITTED})  # the version named is the one serving


def models_now(birth: Birth | None, events: Iterable[Event]) -> tuple[RunningModel, ...]:
    """Return each model with what serves and where its update stands; events are in order of their happening."""
    models = {model.model: model for model in birth.models} if birth else {}
    served_before: dict[str, RunningModel] = {}  # what an update on probation goes back to
    since = birth.at if birth else 0
    for event in events:
        if event.kind is not EventKind.DEPLOYMENT or not event.model or not event.state or event.at < since:
            continue
        before = models.get(event.model, RunningModel(model=event.model, state=event.state))
        if event.state is DeploymentState.PROBATION:
            served_before[event.model] = before
        if event.state is DeploymentState.ROLLED_BACK:
            before = served_before.pop(event.model, before)
        models[event.model] = _after(before, event.state, event)
    return tuple(models[name] for name in sorted(models))


def _after(before: RunningModel, state: DeploymentState, event: Event) -> RunningModel:
    attempt = before.attempt if event.attempt is None else event.attempt
    model = msgspec.structs.replace(before, state=state, reason=event.reason, attempt=attempt)
    if state in SERVES and event.version is not None:
        return msgspec.structs.replace(model, version=event.version, digest=event.digest or before.digest)
    return model
