"""Facts that the device's decisions are made from. Plain values; nothing here acts or decides."""

from dataclasses import dataclass

from protocol.release import Assignment, DeviceConfig, Release
from protocol.states import RejectReason, RuntimeName


@dataclass(frozen=True, kw_only=True)
class Objection:
    """Why not, for the machine and in a sentence."""

    reason: RejectReason
    detail: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """One model the fleet wants here. Both repositories agree on it, unless there is an objection."""

    release: Release
    assignment: Assignment
    sha256: str
    length: int
    floor: int = 0  # lowest version of this model that may run
    objection: Objection | None = None  # what the repositories say against this one; the others go on


@dataclass(frozen=True, kw_only=True)
class VerifiedDesire:
    """A desired state that passed both repositories. A target with an objection stays named, and is not taken up."""

    director_version: int
    issued: int  # UTC ms
    targets: tuple[Target, ...]
    config: DeviceConfig


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What this device is; decides whether a release fits it."""

    device_class: str
    runtimes: tuple[RuntimeName, ...]
    memory_total: int  # bytes
