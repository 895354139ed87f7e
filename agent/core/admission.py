"""Whether a release may be taken up on this device: floor, class, runtime, memory.

Trust is settled before it gets here (both repositories agree). Pure: facts in, a reason or None out.
"""

from dataclasses import dataclass

from agent.core.facts import DeviceFacts, Target
from protocol.states import RejectReason

TRIAL_SHARE = 0.5  # of the machine's memory that a candidate may ask for: it is tried beside what serves


@dataclass(frozen=True, kw_only=True)
class Objection:
    """Why not, for the machine and in a sentence."""

    reason: RejectReason
    detail: str


def object_to(target: Target, facts: DeviceFacts) -> Objection | None:
    """Return why a release does not fit this device, or None."""
    release, needs = target.release, target.release.needs
    if release.version < target.floor:
        return Objection(
            reason=RejectReason.BELOW_FLOOR,
            detail=f"{release.model} {release.version} is below the floor {target.floor}",
        )
    if needs.device_classes and facts.device_class not in needs.device_classes:
        return _misfit(f"it is for {', '.join(needs.device_classes)}; this device is {facts.device_class}")
    if not set(needs.runtimes) & set(facts.runtimes):
        have = ", ".join(runtime.value for runtime in facts.runtimes) or "none"
        return _misfit(f"it needs one of {', '.join(r.value for r in needs.runtimes)}; this device has {have}")
    return None


def object_to_trial(target: Target, facts: DeviceFacts) -> Objection | None:
    """Return why a release cannot even be tried here, or None."""
    allowed = int(facts.memory_total * TRIAL_SHARE)
    if target.release.needs.memory > allowed:
        return _misfit(f"it needs {target.release.needs.memory} bytes of memory; {allowed} may be used for a trial")
    return None


def _misfit(detail: str) -> Objection:
    return Objection(reason=RejectReason.DOES_NOT_FIT, detail=detail)
