"""What the device's drivers need of the world, in their own words.

Drivers (`updater.py`, `reporter.py`, …) know only these protocols; `adapters/` implement
them on the real machine, `simulator/` in memory; `daemon.py` puts them together. Blocking calls say so. Errors are
split by who must act: `Weather` passes (retry), `Refusal` is final for this content (report it), `Trouble` needs
a person on this device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.channel import Answer, Order, TrialVerdict
from protocol.manifest import Manifest
from protocol.messages import DesiredState, Resources
from protocol.release import Assignment, DeviceConfig, Release
from protocol.states import RejectReason, RuntimeName


# ---------------------------------------------------------------- errors
class AgentError(Exception):
    """Root of what the agent's adapters raise."""


class Weather(AgentError):
    """The network, the server or a neighbour process did not answer. Trying again later is right."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """``retry_after``: seconds, when the server asked for them."""
        super().__init__(message)
        self.retry_after = retry_after


class Refusal(AgentError):
    """Content is not acceptable. Trying the same again cannot help; the reason goes to the server."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Name the fault or attack; ``detail`` is a sentence for people."""
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class Trouble(AgentError):
    """This device is set up wrongly or its disk is in the way: a person must act. ``remedy`` says how."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        """Say what is wrong and what to do."""
        super().__init__(message + (f". {remedy}" if remedy else ""))
        self.remedy = remedy


# ---------------------------------------------------------------- facts
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
class TrustVersions:
    """What the birth says of the trust this device holds."""

    director: int = 0
    director_root: int = 1
    image_root: int = 1


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A verified bundle on disk, extracted."""

    digest: str
    folder: str
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class DataPlaneExit:
    """The data plane process ended. ``planned`` when control drained it."""

    pid: int
    returncode: int
    planned: bool


# ---------------------------------------------------------------- ports
class Trust(Protocol):
    """Both TUF repositories, read with python-tuf. Keeps its own state on disk, committed atomically."""

    def verify(self, message: DesiredState, now: int) -> VerifiedDesire:
        """Verify a desired state against both repositories (blocking: may fetch Image metadata over HTTPS).

        Raises `Refusal` with the attack's name, or `Weather`. A failure leaves the trusted state as it was.
        """

    def versions(self) -> TrustVersions: ...


class Downloads(Protocol):
    """Bundles from the server."""

    def fetch(self, target: Target, progress: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
        """Download into a file, capped at the signed length; check the hash; return its path (blocking).

        Raises `Weather` (retry later), `Refusal` (HASH_MISMATCH, NO_SPACE, or 404/410 as UNREACHABLE), and
        `Weather` when cancelled.
        """

    def discard(self, sha256: str) -> None:
        """Remove what is left of a download."""


class ModelStore(Protocol):
    """Verified, extracted bundles under ``models/<sha256>/`` and the pointer to the active ones."""

    def stage(self, digest: str) -> str:
        """Return a fresh, empty folder to unpack a candidate into."""

    def admit(self, digest: str) -> StoredModel:
        """Move the staged folder into the store, durably; raise `Refusal` when a member is not what was signed."""

    def find(self, digest: str) -> StoredModel | None:
        """Return a stored bundle whose every member still has its hash, or None (a damaged one is removed)."""

    def active(self) -> Mapping[str, str]:
        """Return {model: digest} of the active pointer."""

    def activate(self, model: str, digest: str | None) -> None:
        """Point a model to a digest (None: to nothing), in one atomic, durable step."""

    def collect(self, keep: Sequence[str]) -> None:
        """Remove stored bundles and leftovers except these digests."""


class Trials(Protocol):
    """The short-lived child that tries a candidate under limits."""

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:
        """Try a bundle (blocking, bounded by a wall-clock limit). A child that dies or hangs is a failed verdict."""


class DataPlaneProcess(Protocol):
    """One running data plane."""

    @property
    def pid(self) -> int: ...
    def send(self, order: Order) -> None:
        """Send an order; raise `agent.channel.ChannelClosed`."""

    def receive(self) -> Answer:
        """Wait for an answer (blocking); raise `agent.channel.ChannelClosed`."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; return the return code, or None on time-out."""

    def kill(self) -> None: ...


class DataPlaneLauncher(Protocol):
    """Starts data planes on the listening sockets that control holds."""

    def launch(self) -> DataPlaneProcess:
        """Start one. Must be called from a thread that lives as long as control (PDEATHSIG)."""


class DataPlane(Protocol):
    """What the update machine asks of the supervisor; answers come back as events."""

    def serve(self, ticket: int, model: StoredModel) -> None: ...
    def withdraw(self, ticket: int, model: str) -> None: ...


class Spool(Protocol):
    """The on-disk queue of records the server has not acknowledged. Two streams: telemetry and events."""

    @property
    def id(self) -> str: ...
    def append(self, stream: str, make: Callable[[int], bytes]) -> int:
        """Take the next number, store ``make(number)`` durably, return the number. Merges or drops when full."""

    def unpublished(self, stream: str, limit: int) -> Sequence[tuple[int, bytes]]:
        """Records not yet published on this connection, oldest first."""

    def mark_published(self, stream: str, number: int) -> None: ...
    def acknowledge(self, stream: str, upto: int, missing: Sequence[tuple[int, int]]) -> int:
        """Drop what the server has; make the missing ranges unpublished again; return how many were dropped."""

    def forget_published(self) -> None:
        """After a new connection or server epoch: everything unacknowledged is unpublished again."""

    def depth(self, stream: str) -> int: ...
    def dropped(self) -> int:
        """How many telemetry records a full spool had to drop, ever."""


class Uplink(Protocol):
    """The connection to the broker. Publishing never blocks; it is refused while not connected."""

    def publish(self, stream: str, number: int, payload: bytes) -> bool:
        """Publish a spooled record; False when not connected or the window of 20 in flight is full."""

    @property
    def connected(self) -> bool: ...


class Host(Protocol):
    """Readings of this machine."""

    def read(self, data_plane_pid: int | None) -> Resources:
        """Return the readings since the last call."""

    def facts(self) -> dict[str, str]: ...


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What this device is; decides whether a release fits it."""

    device_class: str
    runtimes: tuple[RuntimeName, ...]
    memory_total: int  # bytes
