"""What the server's drivers need of the world, in their own words, and the facts that pass between them.

Drivers (`enrolment.py`, `publishing.py`, `rollouts.py`, `ingest.py`) know only these; `adapters/` implement them;
`app.py` puts them together. Times are UTC ms unless a name says otherwise.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Protocol

from fleet_server.api_types import Publication
from fleet_server.core.access import Permission, Role
from fleet_server.core.audit import Act, Entry
from protocol.commands import Command
from protocol.messages import (
    Acknowledgement,
    Birth,
    CommandEnvelope,
    DesiredState,
    DeviceState,
    Event,
    Reply,
    Report,
)
from protocol.release import Assignment, Delta, DeviceConfig, Release
from protocol.states import CommandOutcome, PresenceState, RejectReason


# ---------------------------------------------------------------- facts
@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as the registry knows it."""

    id: str
    labels: dict[str, str]
    certificate: str  # PEM of the certificate in force; its key signs the device's requests
    enrolled_at: int
    revoked: bool = False
    next_certificate: str = ""  # PEM; issued by a renewal, in force from the first request that its key signs
    open_until: int = 0  # until then the id may enrol again, once


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """What a certificate says, for those who do not read X.509."""

    key_sha256: str  # of the SubjectPublicKeyInfo, DER
    ca: str  # the issuing CA's key identifier, hex
    expires_at: int


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """An enrolment token as it is stored: the secret only as a hash."""

    id: str
    secret_sha256: str
    labels: dict[str, str]
    uses_left: int
    expires_at: int


@dataclass(frozen=True, kw_only=True)
class PublishedBundle:
    """A release with the bytes it stands for, as signed in the Image repository."""

    release: Release
    path: str  # TUF target path
    sha256: str
    length: int
    published_at: int


@dataclass(frozen=True, kw_only=True)
class RoleFact:
    """What is known of one role of the trust metadata in force."""

    name: str  # image-root, image-targets, director-root, image-snapshot, image-timestamp, or a delegated family
    version: int
    expires_at: int
    threshold: int
    keys: int


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """One entry of a device's desired state."""

    bundle: PublishedBundle
    assignment: Assignment


@dataclass(frozen=True, kw_only=True)
class SignedDesire:
    """A device's desired state as the Director signed it."""

    device: str
    version: int  # of all three Director roles
    assigned: tuple[Assigned, ...]
    config: DeviceConfig
    timestamp: bytes
    snapshot: bytes
    targets: bytes
    issued_at: int
    expires_at: int

    def message(self, root_steps: Sequence[bytes] = ()) -> DesiredState:
        """Return the payload of ``down/want``, with the root steps that the device has not seen."""
        return DesiredState(
            root=tuple(root_steps), timestamp=self.timestamp, snapshot=self.snapshot, targets=self.targets
        )


@dataclass(frozen=True, kw_only=True)
class DeploymentRecord:
    """An operator's order: these devices shall run this version."""

    id: str
    kind: str  # deploy | rollback
    model: str
    by: str
    at: int
    targets: dict[str, int]  # device -> version


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What is known of a device's connection; `core/presence.py` derives the state from it."""

    device: str
    birth: Birth | None
    connected: bool  # by the newest birth, farewell or valid will
    said_goodbye: bool
    last_seen: int | None  # server's clock, any message
    state: PresenceState = PresenceState.NEW


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What ingest writes in one transaction. Each list is in order of arrival."""

    reports: Sequence[tuple[str, Report]] = ()  # (device, report)
    events: Sequence[tuple[str, Event]] = ()
    states: Sequence[tuple[str, DeviceState]] = ()
    replies: Sequence[tuple[str, Reply]] = ()
    dead_letters: Sequence[tuple[str, bytes, str]] = ()  # (topic, payload cut to 4 KiB, reason)
    received_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a batch added to the database, for those who count."""

    reports: Sequence[Report]
    events: Sequence[Event]
    again: int  # reports and events that were there already
    received_at: int


@dataclass(frozen=True, kw_only=True)
class CommandRecord:
    """A command to a device, and what became of it."""

    command: Command
    by: str
    outcome: CommandOutcome | None = None  # None: it is not answered
    reason: RejectReason | None = None
    detail: str = ""
    answered_at: int | None = None  # server's clock


@dataclass(frozen=True, kw_only=True)
class StoredEvent:
    """An event of a device in the server's database."""

    row: int  # grows with arrival
    device: str
    received_at: int
    event: Event


@dataclass(frozen=True, kw_only=True)
class OnlineKeys:
    """Public halves of the keys that live on the server: role name -> TUF key object as JSON bytes."""

    director: dict[str, bytes] = field(default_factory=dict)  # targets, snapshot, timestamp
    image: dict[str, bytes] = field(default_factory=dict)  # snapshot, timestamp


@dataclass(frozen=True, kw_only=True)
class Account:
    """A user."""

    name: str
    password_hash: str
    role: Role
    created_at: int
    disabled: bool = False
    revision: int = 1  # grows with each change


@dataclass(frozen=True, kw_only=True)
class LoginSession:
    """A person's session; the token itself is only in their cookie."""

    token_sha256: str
    account: str
    csrf: str  # what forms must carry
    expires_at: int  # unless it is used before
    started_at: int  # the log-in
    renewed_at: int  # when it got this token
    replaced: bool = False  # it has got another token; this one ends shortly


@dataclass(frozen=True, kw_only=True)
class ApiToken:
    """A program's key to the API, in the name of a user; the secret only as a hash."""

    id: str
    account: str
    name: str
    secret_sha256: str
    scopes: frozenset[Permission]
    created_at: int
    expires_at: int
    last_used_at: int | None = None
    revoked_at: int | None = None


# ---------------------------------------------------------------- storage, in adapters/database
class Accounts(Protocol):
    """Users, their sessions and their API tokens. An `Act` is logged in the same transaction as the change."""

    def account(self, name: str) -> Account | None: ...
    def accounts(self) -> Sequence[Account]: ...
    def add_account(self, account: Account, act: Act) -> None:
        """Add a user; raise `access.UserExists`."""

    def change_account(
        self,
        name: str,
        revision: int | None,
        act: Act,
        *,
        role: Role | None = None,
        disabled: bool | None = None,
        password_hash: str | None = None,
    ) -> Account:
        """Change a user and end every session of theirs.

        Raises `access.UnknownUser`, `access.Stale` (another revision is there), `access.LastAdmin`.
        """

    def remove_account(self, name: str, revision: int | None, act: Act) -> None:
        """Remove a user with sessions and API tokens; raises as `change_account` does."""

    def add_session(self, session: LoginSession, act: Act) -> None: ...
    def session(self, token_sha256: str, now: int) -> tuple[LoginSession, Account] | None:
        """Return a session that is not over, with its user, who is not disabled."""

    def extend_session(self, token_sha256: str, expires_at: int) -> None: ...
    def replace_session(self, token_sha256: str, new: LoginSession, until: int) -> bool:
        """Give a session another token; the one before ends then. False: it was replaced already."""

    def end_session(self, token_sha256: str, act: Act) -> None: ...
    def end_sessions(self, account: str, act: Act) -> int:
        """End every session of a user; return how many there were."""

    def add_api_token(self, token: ApiToken, act: Act) -> None: ...
    def api_token(self, token_id: str) -> tuple[ApiToken, Account] | None: ...
    def api_tokens(self, account: str | None = None) -> Sequence[ApiToken]: ...
    def revoke_api_token(self, token_id: str, act: Act) -> None: ...
    def note_use(self, token_id: str, now: int) -> None:
        """Store when an API token was last used."""


class AuditLog(Protocol):
    """Who did what, in a chain (`core/audit.py`)."""

    def append(self, acts: Sequence[Act]) -> None:
        """Add acts that happened already; raise `ingest.StoreUnavailable`."""

    def entries(self, *, after: int, limit: int) -> Sequence[Entry]:
        """Return entries in order, those that follow a sequence number."""

    def newest(self, *, before: int | None, limit: int, who: str | None, action: str | None) -> Sequence[Entry]:
        """Return entries, newest first, those before a sequence number."""


class KeptAnswers(Protocol):
    """What was answered to a request with an Idempotency-Key. ``key`` has the user's name before it."""

    def begin(self, key: str, request_sha256: str, now: int) -> bool:
        """Note that a request is under way; False when its key was used before."""

    def find(self, key: str) -> tuple[str, bytes | None] | None:
        """Return which request a key was used for, and its answer unless it is still under way."""

    def keep(self, key: str, answer: bytes) -> None: ...
    def drop(self, key: str) -> None:
        """Let a key be used again: nothing was changed."""


class Passwords(Protocol):
    """Hashes passwords, slowly."""

    def hash(self, password: str) -> str: ...
    def is_right(self, stored: str | None, password: str) -> bool:
        """Compare; without a stored hash it takes as long, and is wrong."""

    def is_outdated(self, stored: str) -> bool:
        """Whether a hash was made with weaker settings than today's."""


class Registry(Protocol):
    """Devices and the tokens that let them in."""

    def add_token(self, token: TokenRecord) -> None: ...
    def redeem_token(self, token_id: str, secret_sha256: str, now: int) -> TokenRecord:
        """Take one use of a token, atomically; raise `enrolment.TokenRefused` (unknown, wrong, used up, expired)."""

    def check_token(self, token_id: str, secret_sha256: str, now: int) -> None:
        """Raise `enrolment.TokenRefused` unless a token is known, right and not expired; its uses do not matter."""

    def add_device(self, device: Device) -> None:
        """Add a device; raise `enrolment.DeviceExists`."""

    def replace_device(self, device: Device, now: int) -> None:
        """Put a new enrolment in the place of an opened one; raise `enrolment.DeviceExists` when it is not open.

        Atomic, so an opening is worth one enrolment. The certificates before are retired.
        """

    def offer_certificate(self, device_id: str, certificate: str, now: int) -> None:
        """Note a device's next certificate; one noted before and never used is retired."""

    def promote(self, device_id: str, certificate: str, now: int) -> None:
        """Put the next certificate in force and retire the one before; does nothing when it is not the next."""

    def revoke(self, device_id: str, now: int) -> None:
        """Block a device and retire its certificates; an opening ends. Again changes nothing."""

    def reopen(self, device_id: str, until: int) -> None:
        """Let an id enrol again until then, once."""

    def retired(self) -> Sequence[str]:
        """Return the certificates (PEM) that count no more."""

    def forget_retired(self, certificates: Sequence[str]) -> None:
        """Forget retired certificates that have expired."""

    def device(self, device_id: str) -> Device | None: ...
    def devices(self) -> Sequence[Device]: ...
    def presence(self, device_id: str) -> Presence: ...


class Releases(Protocol):
    """Published bundles."""

    def add_bundles(self, bundles: Sequence[PublishedBundle]) -> None:
        """Add what is new; adding again changes nothing."""

    def bundles(self, model: str | None = None) -> Sequence[PublishedBundle]: ...


class DesiredStates(Protocol):
    """What each device should run, and what it did run."""

    def desired(self, device_id: str) -> SignedDesire | None: ...
    def save_desired(self, desire: SignedDesire) -> None:
        """Store the new current desire; its version must be higher than the stored one."""

    def expiring(self, before: int) -> Sequence[SignedDesire]: ...
    def add_deployment(self, deployment: DeploymentRecord) -> None: ...
    def committed_versions(self, device_id: str, model: str) -> Sequence[int]:
        """Versions this device reported as committed, oldest first."""

    def highest_attempt(self, device_id: str, sha256: str) -> int:
        """The highest attempt at this bundle in any desired state ever saved for this device; 0 when none."""


class CommandStore(Protocol):
    """Commands and what became of them. Answers come in by `Telemetry.store`, and the first is the last word."""

    def add(self, record: CommandRecord) -> None: ...
    def newest(self, device_id: str, limit: int) -> Sequence[CommandRecord]:
        """Return the newest commands to a device, newest first."""

    def waiting(self, device_id: str | None, now: int) -> Sequence[Command]:
        """Return what is neither answered nor over, of one device or of all; oldest first for each."""

    def highest(self, device_id: str) -> int:
        """Return the highest sequence ever given to a device; 0 when none."""


class Exposition(Protocol):
    """What `/metrics` shows."""

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return body and content type, in the format of an Accept header that is liked best."""


class Telemetry(Protocol):
    """Reports, events and states as they came in, each stored once."""

    def store(self, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
        """Write a batch in one transaction and return the acknowledgement of each (device, spool) it touched."""


# ---------------------------------------------------------------- trust, in adapters
class Authority(Protocol):
    """The server's certificate authority for devices: one CA, or two while the next takes over."""

    def ca_certificate(self) -> bytes:
        """PEM of every CA in force, first the one whose certificate the server shows."""

    def ca_key_sha256(self) -> str:
        """SHA-256 of the first CA's SubjectPublicKeyInfo (DER), as tokens carry it."""

    def facts(self, certificate: str) -> CertificateFacts: ...

    def sign(self, csr: str, device_id: str, now: int) -> str:
        """Return the certificate (PEM) for a CSR; raise `enrolment.BadRequest` when it is not that device's."""


class Director(Protocol):
    """Signs desired states with the server's online keys."""

    def online_keys(self) -> dict[str, bytes]: ...
    def roots(self) -> Sequence[bytes]:
        """All root versions, oldest first; empty until the offline keys were made."""

    def check_root(self, root: bytes) -> None:
        """Do everything `accept_root` does, except storing."""

    def accept_root(self, root: bytes) -> None:
        """Store the next root (the newest again changes nothing); raise `publishing.Refused`."""

    def make_next_keys(self) -> None:
        """Make the online keys that the next root shall name; `online_keys` shows them from now on."""

    def root_fact(self) -> RoleFact | None: ...
    def vouches_for(self, desire: SignedDesire) -> bool:
        """Tell whether the newest root names the keys that signed a desired state here."""

    def sign(
        self, device_id: str, version: int, assigned: Sequence[Assigned], config: DeviceConfig, now: int
    ) -> SignedDesire: ...


class CommandSigner(Protocol):
    """Signs commands with the Director's targets key."""

    def sign_command(self, command: Command) -> CommandEnvelope: ...


class ImageRepository(Protocol):
    """Keeps what the release team signed offline; adds snapshot and timestamp."""

    def online_keys(self) -> dict[str, bytes]: ...
    def make_next_keys(self) -> None:
        """Make the online keys that the next root shall name; `online_keys` shows them from now on."""

    def check(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        """Do everything `accept` does, except storing."""

    def accept(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        """Take root, targets and families after verifying them together; return every bundle that is named then.

        Raises `publishing.Refused`. What is in force may come again and changes nothing, so that an answer that was
        lost can be asked for again.
        """

    def catch_up(self, now: int) -> Sequence[PublishedBundle]:
        """Finish a publication that was cut short; return every bundle that is named. For the start."""

    def hindrance(self, sha256: str) -> str | None:
        """Return why a bundle must not be newly installed (yanked, below the floor), or None."""

    def roles(self) -> Sequence[RoleFact]: ...
    def first_root(self) -> bytes | None: ...
    def metadata(self, name: str) -> bytes | None:
        """Return a metadata file by its name (``2.root.json``, ``timestamp.json``, …).

        ``root.json``, ``targets.json`` and ``snapshot.json`` name the newest.
        """

    def renew(self, now: int) -> None:
        """Sign snapshot and timestamp anew when half of their life is over."""


class Artifacts(Protocol):
    """Bundles by digest."""

    def add(self, stream: Iterator[bytes], sha256: str, *, cap: int) -> int:
        """Store a bundle and return its length; raise `publishing.Refused` when digest or cap are broken."""

    def open(self, sha256: str) -> IO[bytes]:
        """Open for reading; raise KeyError."""

    def length(self, sha256: str) -> int | None: ...


class Deltas(Protocol):
    """Smaller ways from one bundle to another, by digest; a base may be `protocol.release.NO_BASE`."""

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Have deltas made of (base, target) that are not there yet; returns at once."""

    def settle(self, patience: float) -> bool:
        """Wait for what was asked for, at most so many seconds; tell whether all of it is done."""

    def offer(self, base: str, target: str, methods: Collection[str]) -> Delta | None:
        """Return the smallest that is ready and made by one of these methods."""

    def open(self, base: str, target: str, method: str) -> tuple[IO[bytes], Delta]:
        """Open one for reading; raise KeyError."""


class NoDeltas:
    """Every device fetches whole bundles."""

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Make nothing."""

    def settle(self, patience: float) -> bool:
        """Wait for nothing."""
        del patience
        return True

    def offer(self, base: str, target: str, methods: Collection[str]) -> Delta | None:
        """Offer nothing."""
        del base, target, methods
        return None

    def open(self, base: str, target: str, method: str) -> tuple[IO[bytes], Delta]:
        """Have nothing."""
        raise KeyError((base, target, method))


class Uplink(Protocol):
    """The server's connection to the broker."""

    def publish_desired(self, device_id: str, message: DesiredState) -> None:
        """Put the retained desired state of a device."""

    def acknowledge(self, device_id: str, acknowledgement: Acknowledgement) -> None: ...
    def admit(self, device_id: str) -> None:
        """Give an enrolled device its rights on the broker."""

    def expel(self, device_id: str) -> bool:
        """Take a device's rights, cut its connection, drop its session and its retained desired state.

        Return whether that is done; what could not be done is made up for when the broker can be reached again.
        """


class CommandUplink(Protocol):
    """How commands reach devices."""

    def send_command(self, device_id: str, envelope: CommandEnvelope, *, life_seconds: int) -> None:
        """Send a command that the broker forgets after so long. Without a connection nothing is sent."""
