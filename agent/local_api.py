"""What the agent's own command line asks a running agent, and what it is told: the contract of ``control.sock``.

One request and one answer per connection, each a line of JSON, capped. The socket is open to the agent's own user
and root only, so whoever reaches it may do what a person at the device may do: look, hold, take a model back.
"""

import msgspec

from protocol.states import DeploymentState, RejectReason

MAX_LINE = 1024 * 1024  # bytes
SOCKET_NAME = "control.sock"  # in the agent's state folder


class _Request(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of what may be asked."""


class AskStatus(_Request, frozen=True, kw_only=True):
    """What serves, what is under way, how the device is connected."""


class AskHistory(_Request, frozen=True, kw_only=True):
    """What happened to the models, newest first."""

    limit: int = 20
    model: str = ""  # empty: all


class AskTrust(_Request, frozen=True, kw_only=True):
    """What this device believes, and whether that has expired."""


class AskVerify(_Request, frozen=True, kw_only=True):
    """Hash every stored bundle again."""


class OrderRollback(_Request, frozen=True, kw_only=True):
    """Serve an earlier version of a model."""

    model: str


class OrderHold(_Request, frozen=True, kw_only=True):
    """Let no update disturb for a while; 0 seconds end a hold."""

    seconds: int


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model on this device."""

    model: str
    state: DeploymentState
    since: int  # UTC ms
    serving: int | None = None  # versions
    wanted: int | None = None
    previous: int | None = None
    factory: int | None = None
    attempt: int = 0
    reason: RejectReason | None = None
    detail: str = ""
    waits: str = ""  # why an update is held


class Status(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `AskStatus`."""

    device: str
    agent: str  # version
    boot: str
    connected: bool
    server_up: bool
    spooled_events: int
    spooled_reports: int
    dropped_reports: int
    data_plane: int | None = None  # process id
    hold_until: int = 0  # UTC ms; 0: nothing holds
    certificate_expires: int = 0  # UTC ms
    shut_out: str = ""  # what the fleet server said when it refused this device
    trouble: str = ""  # what a person on this device must see to, with its remedy
    models: tuple[ModelStatus, ...] = ()


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A transition that happened."""

    at: int  # UTC ms
    model: str
    state: DeploymentState
    version: int | None = None
    attempt: int | None = None
    reason: RejectReason | None = None
    detail: str = ""


class History(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `AskHistory`."""

    steps: tuple[Step, ...]


class TrustStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `AskTrust`."""

    device: str
    director: int  # versions
    director_root: int
    image_root: int
    clock_floor: int  # UTC ms; the clock never counts as earlier
    expired: bool  # then nothing new is installed
    problem: str = ""  # why what is stored cannot be used
    models: tuple[str, ...] = ()  # "digits 3" of the desired state


class BundleCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One stored bundle."""

    digest: str
    model: str
    version: int
    damage: str = ""  # empty: whole
    active: bool = False


class Verified(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `AskVerify`."""

    bundles: tuple[BundleCheck, ...]


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to an order that was accepted, in a sentence."""

    said: str


class Denied(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to what cannot be, in a sentence."""

    why: str


LocalRequest = AskStatus | AskHistory | AskTrust | AskVerify | OrderRollback | OrderHold
LocalAnswer = Status | History | TrustStatus | Verified | Done | Denied
REQUESTS = msgspec.json.Decoder(LocalRequest)
ANSWERS = msgspec.json.Decoder(LocalAnswer)
