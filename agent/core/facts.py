"""Facts that the device's decisions are made from. Plain values; nothing here acts or decides."""

from dataclasses import dataclass

from protocol.release import Assignment, DeviceConfig, Release
from protocol.states import RuntimeName


@dataclass(frozen=True, kw_only=True)
class Target:
    """One model the fleet wants here; both repositories agree on it."""

    release: Release
    assignment: Assignment
    sha256: str
    length: int
    floor: int = 0  # lowest version of this model that may run


@dataclass(frozen=True, kw_only=True)
class VerifiedDesire:
    """A desired state that passed both repositories."""

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
