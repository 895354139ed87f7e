"""What the server's drivers need of the world, in their own words, and the facts that pass between them.

Drivers (`enrolment.py`, `publishing.py`, `rollouts.py`, `ingest.py`) know only these; `adapters/` implement them;
`app.py` puts them together. Times are UTC ms unless a name says otherwise.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Protocol

from fleet_server.api_types import Publication
from protocol.messages import (
    Acknowledgement,
    Birth,
    DesiredState,
    DeviceState,
    Event,
    Report,
)
from protocol.release import Assignment, Delta, DeviceConfig, Release
from protocol.states import PresenceState


# ---------------------------------------------------------------- facts
@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as the registry knows it."""

    id: str
    labels: dict[str, str]
    certificate: str  # PEM of the certificate in force; its key signs the device's requests
    enrolled_at: int
    revoked: bool = False


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
    dead_letters: Sequence[tuple[str, bytes, str]] = ()  # (topic, payload cut to 4 KiB, reason)
    received_at: int = 0


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
class LoginSession:
    """A person's session; the token itself is only in their cookie."""

    token_sha256: str
    account: str
    csrf: str  # what forms must carry
    expires_at: int


# ---------------------------------------------------------------- storage, in adapters/database
class Accounts(Protocol):
    """People who may log in, and their sessions."""

    def password_hash(self, account: str) -> str | None: ...
    def set_password_hash(self, account: str, password_hash: str) -> None:
        """Set a password (argon2id hash); every session of the account ends."""

    def add_session(self, session: LoginSession) -> None: ...
    def session(self, token_sha256: str, now: int) -> LoginSession | None:
        """Return a session that is not over."""

    def extend_session(self, token_sha256: str, expires_at: int) -> None: ...
    def end_session(self, token_sha256: str) -> None: ...


class Registry(Protocol):
    """Devices and the tokens that let them in."""

    def add_token(self, token: TokenRecord) -> None: ...
    def redeem_token(self, token_id: str, secret_sha256: str, now: int) -> TokenRecord:
        """Take one use of a token, atomically; raise `enrolment.TokenRefused` (unknown, wrong, used up, expired)."""

    def add_device(self, device: Device) -> None:
        """Add a device; raise `enrolment.DeviceExists`."""

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


class Telemetry(Protocol):
    """Reports, events and states as they came in, each stored once."""

    def store(self, batch: Batch) -> Sequence[tuple[str, Acknowledgement]]:
        """Write a batch in one transaction and return the acknowledgement of each (device, spool) it touched."""


# ---------------------------------------------------------------- trust, in adapters
class Authority(Protocol):
    """The server's certificate authority for devices."""

    def ca_certificate(self) -> bytes:
        """PEM of the CA."""

    def ca_key_sha256(self) -> str:
        """SHA-256 of the CA's SubjectPublicKeyInfo (DER), as tokens carry it."""

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
