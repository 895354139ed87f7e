"""How careful an order is with a device, and what came of it: the sentences that people read. Pure.

A verdict's own sentence, with its figures, is the device's; which of a device's steps carries it is known here.
"""

from collections.abc import Iterable

from protocol.messages import Event
from protocol.release import ShadowTerms
from protocol.states import DeploymentState, EventKind, RejectReason


def say_terms(shadow: ShadowTerms | None, *, forced: bool) -> str:
    """Return the terms of an order as a sentence; empty for one without.

    >>> say_terms(ShadowTerms(), forced=False)
    'shadow: 10 % of the requests, until 200 or 10 min, 95 % must agree'
    >>> say_terms(None, forced=True)
    'forced'
    """
    said = ["forced"] if forced else []
    if shadow is not None:
        share, agreement = (f"{permille / 10:g} %" for permille in (shadow.share, shadow.agreement))
        until = f"{shadow.requests} or {_span(shadow.seconds)}"
        said.append(f"shadow: {share} of the requests, until {until}, {agreement} must agree")
    return "; ".join(said)


def newest_sentence(events: Iterable[Event], model: str) -> tuple[str, str]:
    """Return what the newest step of a model's update says, and how the shadow of that update went.

    ``events`` are one device's, in order of their happening. Either is empty where nothing was said.
    """
    detail = verdict = ""
    before: DeploymentState | None = None
    for event in events:
        if event.kind is not EventKind.DEPLOYMENT or event.model != model or event.state is None:
            continue
        if event.state is DeploymentState.VERIFIED:
            verdict = ""
        elif _ends_shadow(before, event):
            verdict = event.detail
        detail, before = event.detail, event.state
    return detail, verdict


def _ends_shadow(before: DeploymentState | None, event: Event) -> bool:
    passed = before is DeploymentState.SHADOW and event.state is DeploymentState.SWAPPING
    return passed or event.reason is RejectReason.SHADOW_FAILED


def _span(seconds: int) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds % size == 0:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
