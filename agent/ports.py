"""What the device's drivers need of the world, in their own words.

Drivers (`updater.py`, `reporter.py`, …) know only these protocols; `adapters/` implement
them on the real machine, `simulator/` in memory; `daemon.py` puts them together. Blocking calls say so. Errors are
split by who must act: `Weather` passes (retry), `Refusal` is final for this content (report it), `Trouble` needs
a person on this device.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agent.channel import STABLE, Answer, Govern, Order, Shadow, TrialVerdict
from agent.core.commands import Ledger
from agent.core.deployment import Deployment
from agent.core.facts import DeviceFacts as DeviceFacts
from agent.core.facts import Target as Target
from agent.core.facts import VerifiedDesire as VerifiedDesire
from agent.core.governor import Readings
from agent.core.rungs import Rung
from agent.local_api import Step
from protocol.commands import Command
from protocol.device_api import EnrolRequest, EnrolResponse, RenewRequest, RenewResponse, Standing
from protocol.manifest import Manifest
from protocol.messages import DesiredState, Resources
from protocol.states import CommandOutcome, DeploymentState, EventKind, RejectReason

T = TypeVar("T")

TELEMETRY = "telemetry"  # the streams of the spool; each numbers its records from 1
EVENTS = "events"
REPLIES = "replies"


# ---------------------------------------------------------------- errors
class AgentError(Exception):
    """Root of what the agent's adapters raise."""


class Weather(AgentError):
    """The network, the server or a neighbour process did not answer. Trying again later is right."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """``retry_after``: seconds, when the server asked for them."""
        super().__init__(message)
        self.retry_after = retry_after


class Postponed(Weather):
    """This device itself waits: a budget is used up, or a fleet is not to come all at once. No try is counted."""


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


class ShutOut(AgentError):
    """The server does not take this device for a member, or no longer: its operator must act. The text is its own."""


# ---------------------------------------------------------------- facts
@dataclass(frozen=True, kw_only=True)
class TrustVersions:
    """What the birth says of the trust this device holds."""

    director: int = 0
    director_root: int = 1
    image_root: int = 1


@dataclass(frozen=True, kw_only=True)
class RecalledDesire:
    """What this device last accepted, verified again from its own disk without the server."""

    desire: VerifiedDesire
    expired: bool  # keep serving what it names; install nothing new from it


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A verified bundle on disk, extracted."""

    digest: str
    folder: str
    manifest: Manifest
    rung: Rung | None = None  # how it runs best on this device, if that was measured


@dataclass(frozen=True, kw_only=True)
class DataPlaneExit:
    """The data plane process ended. ``planned`` when control drained it."""

    pid: int
    returncode: int
    planned: bool
    detail: str = ""  # what it said last of its end


@dataclass(frozen=True, kw_only=True)
class Rebuilding:
    """A bundle to be made from a delta. Paths are files, but for the base."""

    method: str
    base: str  # digest of the bundle it starts from, or NO_BASE
    folder: str  # where that bundle lies, extracted; empty with NO_BASE
    delta: str
    made: str
    length: int  # of the bundle that comes out


# ---------------------------------------------------------------- ports
class Trust(Protocol):
    """Both TUF repositories, read with python-tuf. Keeps its own state on disk, committed atomically."""

    def verify(self, message: DesiredState, now: int) -> VerifiedDesire:
        """Verify a desired state against both repositories (blocking: may fetch Image metadata over HTTPS).

        Raises `Refusal` with the attack's name, or `Weather`. A failure leaves the trusted state as it was.
        What speaks against one target only comes as that target's objection.
        """

    def versions(self) -> TrustVersions: ...


class Rebuilds(Protocol):
    """Applies deltas in a short-lived child under limits."""

    def methods(self) -> Collection[str]:
        """Return which methods this device can apply."""

    def rebuild(self, wanted: Rebuilding) -> str:
        """Make the bundle (blocking, bounded); return why it could not be made, empty when it was.

        What comes out is not verified here.
        """


class Downloads(Protocol):
    """Bundles from the server."""

    def fetch(self, target: Target, progress: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
        """Download into a file, capped at the signed length; check the hash; return its path (blocking).

        Raises `Weather` (retry later; `Postponed` when this device wants it so), `Refusal` (HASH_MISMATCH, NO_SPACE,
        or 404/410 as UNREACHABLE), and `Weather` when cancelled.
        """

    def has_room(self, target: Target) -> bool:
        """Tell whether the disk has room for a bundle, downloaded and extracted."""

    def discard(self, sha256: str) -> None:
        """Remove what is left of a download."""

    def collect(self, keep: Sequence[str]) -> None:
        """Remove what is left of all downloads but these (SHA-256); none may be running."""


class ModelStore(Protocol):
    """Verified, extracted bundles under ``models/<sha256>/`` and the pointer to the active ones."""

    def stage(self, digest: str) -> str:
        """Return a fresh, empty folder to unpack a candidate into."""

    def admit(self, digest: str) -> StoredModel:
        """Move the staged folder into the store, durably; raise `Refusal` when a member is not what was signed."""

    def note_rungs(self, digest: str, rungs: Sequence[Rung]) -> None:
        """Keep what was measured of a stored bundle, beside it."""

    def find(self, digest: str) -> StoredModel | None:
        """Return a stored bundle whose every member still has its hash, or None.

        A damaged one is removed; one that the disk does not let us read now stays.
        """

    def active(self) -> Mapping[str, str]:
        """Return {model: digest} of the active pointer."""

    def activate(self, model: str, digest: str | None) -> None:
        """Point a model to a digest (None: to nothing), in one atomic, durable step."""

    def collect(self, keep: Sequence[str]) -> None:
        """Remove stored bundles and leftovers except these digests."""

    def check_all(self) -> Sequence[tuple[StoredModel, str]]:
        """Hash every stored bundle again (blocking); return each with what is wrong with it, or nothing."""


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

    def serve(self, ticket: int, model: StoredModel, alias: str = STABLE) -> None: ...
    def withdraw(self, ticket: int, model: str, alias: str = "") -> None: ...
    def shadow(self, order: Shadow) -> None:
        """Have the candidate answer a share of the requests, unseen."""

    def self_test(self, ticket: int, model: str) -> None:
        """Have the golden samples run where a model serves."""


class Spool(Protocol):
    """The on-disk queue of records the server has not acknowledged. Streams: telemetry, events and replies."""

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


class Sensors(Protocol):
    """How this machine is: heat, throttling, memory, power."""

    def read(self) -> Readings:
        """Return what is true now (may block for a moment); what the machine cannot tell is None."""


class CommandTrust(Protocol):
    """Who may command this device."""

    def open(self, payload: bytes, at: int) -> Command:
        """Return a command signed by the threshold of the Director's targets keys; raise `Refusal`.

        ``at``: UTC ms. BAD_SIGNATURE, MALFORMED, or EXPIRED when the root that names the keys is past its life.
        """


class CommandMemory(Protocol):
    """What is remembered of commands."""

    def load(self) -> Ledger: ...
    def save(self, ledger: Ledger) -> None:
        """Store the ledger durably before this returns; raise `Trouble`."""


class CommandedPlane(Protocol):
    """What commands ask of the supervisor; answers come back as events."""

    @property
    def pid(self) -> int | None:
        """Return the process id of the data plane that serves, if one lives."""

    def self_test(self, ticket: int, model: str) -> None:
        """Have the golden samples run where a model serves; `SelfTested` with this ticket follows."""

    def restart_planned(self) -> None:
        """Replace the data plane without losing a request; a planned `DataPlaneExit` of the old one follows."""


class RenewNow(Protocol):
    """Renews this device's certificate when it is asked to."""

    def renew_now(self) -> None:
        """Renew as soon as may be, whatever the certificate's age."""


class Replies(Protocol):
    """Where the outcome of commands is told; the record reaches the server some day."""

    @property
    def replies_waiting(self) -> int:
        """Return how many replies the server has still to take."""

    def reply(
        self, *, command: str, outcome: CommandOutcome, reason: RejectReason | None = None, detail: str = ""
    ) -> None:
        """Spool a reply durably; raise `Trouble`."""


class Governed(Protocol):
    """What works as hard as the governor says."""

    def govern(self, order: Govern) -> None:
        """Work so hard from now on, and after every restart."""


class EventLog(Protocol):
    """Where drivers tell what happened; the record reaches the server some day, in order."""

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
    ) -> None: ...


class Steps(Protocol):
    """What happened to the models of this device, for people who look back."""

    def add(self, step: Step) -> None: ...
    def newest(self, limit: int, model: str = "") -> Sequence[Step]:
        """Return the newest steps, newest first; of one model if named (blocking)."""


class Hold(Protocol):
    """Until when an application wants no update."""

    def until(self) -> int:
        """Return UTC ms; 0 when nothing holds."""

    def set(self, until: int) -> None:
        """Hold until then, durably; 0 ends a hold. Raises `Trouble`."""


class Deployments(Protocol):
    """The update machines' memory."""

    def load(self) -> Mapping[str, Deployment]:
        """Return the record of each model."""

    def save(self, record: Deployment) -> None:
        """Store a record durably before this returns."""


class Background(Protocol):
    """Runs blocking work away from the main thread and hands its result back on the main thread."""

    def submit(self, name: str, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Run ``work`` and later call ``done`` with what it returned. ``work`` must not raise."""


class EnrolmentServer(Protocol):
    """The open part of the server's device API. Errors: `Weather`, or `Trouble` with what the server advises."""

    @property
    def url(self) -> str:
        """Return where the server is: ``https://host:port``."""

    def ca(self) -> str:
        """Return the server's CA (PEM) over TLS that nobody vouches for yet: worth nothing until it is compared."""

    def enrol(self, request: EnrolRequest, ca: str) -> EnrolResponse:
        """Send the request over TLS that is verified against ``ca``."""


class Credentials(Protocol):
    """This device's key, certificate and trust anchors on disk. Errors: `Trouble`."""

    def enrolled(self) -> bool:
        """Tell whether an earlier enrolment was completed."""

    def request(self, device: str) -> str:
        """Return a CSR (PEM) for this device's next key, which is made if there is none and kept until accepted."""

    def pinned(self, ca: str, pin: str) -> str | None:
        """Return, of several CAs (PEM), the one whose public key has this SHA-256 (hex), as tokens carry it."""

    def holds(self, ca: str) -> bool:
        """Tell whether these CAs (PEM) are the ones that this device trusts."""

    def accept(self, device: str, server: str, response: EnrolResponse) -> None:
        """Check that the certificate is for this device and its next key, from that CA; store all in one step."""

    def renew(self, response: RenewResponse) -> None:
        """Check and store the next certificate as `accept` does; the rest of the identity stays."""


class MembershipServer(Protocol):
    """What the server tells a device of itself. Errors: `Weather`, `ShutOut`, `Trouble`."""

    def standing(self) -> Standing:
        """Ask whether this device is a member, and which CAs are in force (blocking)."""

    def renew(self, request: RenewRequest) -> RenewResponse:
        """Ask for the next certificate (blocking)."""
