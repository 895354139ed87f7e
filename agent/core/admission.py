"""Whether a release may be taken up on this device: floor, class, runtime, memory.

What the repositories say against a release comes with it (`agreement.py`). Pure: facts in, a reason or None out.
"""

from agent.core.facts import DeviceFacts, Objection, Target
from protocol.release import Release
from protocol.states import RejectReason

TRIAL_SHARE = 0.5  # of the machine's memory that a candidate may ask for: it is tried beside what serves


def object_to(target: Target, facts: DeviceFacts) -> Objection | None:
    """Return why a release may not be taken up on this device, or None."""
    if target.objection:
        return target.objection
    if below := object_to_age(target.release, target.floor):
        return below
    needs = target.release.needs
    if needs.device_classes and facts.device_class not in needs.device_classes:
        return _misfit(f"it is for {', '.join(needs.device_classes)}; this device is {facts.device_class}")
    if not set(needs.runtimes) & set(facts.runtimes):
        have = ", ".join(runtime.value for runtime in facts.runtimes) or "none"
        return _misfit(f"it needs one of {', '.join(r.value for r in needs.runtimes)}; this device has {have}")
    return None


def object_to_age(release: Release, floor: int) -> Objection | None:
    """Return why a release is too old to be taken up, or None."""
    if release.version >= floor:
        return None
    return Objection(
        reason=RejectReason.BELOW_FLOOR, detail=f"{release.model} {release.version} is below the floor {floor}"
    )


def object_to_trial(target: Target, facts: DeviceFacts) -> Objection | None:
    """Return why a release cannot even be tried here, or None."""
    allowed = int(facts.memory_total * TRIAL_SHARE)
    if target.release.needs.memory > allowed:
        return _misfit(f"it needs {target.release.needs.memory} bytes of memory; {allowed} may be used for a trial")
    return None


def _misfit(detail: str) -> Objection:
    return Objection(reason=RejectReason.DOES_NOT_FIT, detail=detail)
