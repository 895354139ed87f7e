"""What the REST API says and hears (`/api/v1`), shared by `web/` and `cli/`.

Frozen structs only. Times are UTC ms, durations µs. Bytes travel as base64. Errors are RFC 9457 problem+json
(`Problem`). A figure that people act on comes with its n and interval (`protocol.metrics.Proportion`).
"""

import msgspec

from protocol.messages import Resources
from protocol.metrics import Proportion
from protocol.states import DeploymentState, EventKind, PresenceState, RejectReason, Task

API = "/api/v1"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457."""

    status: int
    title: str
    detail: str = ""
    type: str = "about:blank"


class LoginRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /login; answers with the session cookie."""

    user: str
    password: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """GET /overview."""

    version: str
    epoch: str
    now: int
    trust_ready: bool  # both roots are there, devices can enrol
    broker_up: bool
    devices: dict[str, int]  # presence state -> how many
    reports: int  # rows stored
    dead_letters: int
    trust_warnings: tuple[str, ...] = ()  # what expires soon, and the command that helps


class RoleStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One role of the trust metadata, and what to do about it."""

    name: str  # image-root, image-targets, director-root, image-snapshot, image-timestamp, or a family
    version: int
    expires: str  # ISO 8601
    days_left: int  # whole days; negative when it has expired
    threshold: int  # so many of its keys must sign
    keys: int
    warning: str = ""  # a sentence, when someone must act
    command: str = ""  # what to run then; empty for what the server renews by itself


class TrustStatus(msgspec.Struct, frozen=True, kw_only=True):
    """GET /trust."""

    ready: bool
    ca_key_sha256: str
    image_root_sha256: str | None
    image_root_version: int | None
    director_root_version: int | None
    targets_version: int | None
    targets_expires: str | None  # ISO 8601
    roles: tuple[RoleStatus, ...] = ()
    targets_versions: dict[str, int] = {}  # ``targets`` and each delegated family


class OnlineKeysView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /trust/online-keys: role -> TUF key object (keyid, keytype, scheme, keyval) as JSON text."""

    director: dict[str, str]
    image: dict[str, str]


class MakeOnlineKeys(msgspec.Struct, frozen=True, kw_only=True):
    """POST /trust/online-keys: have the server make its next keys; answers with `OnlineKeysView`.

    From then on these are the ones shown; they are taken into use when roots come that name them.
    """


class Roots(msgspec.Struct, frozen=True, kw_only=True):
    """POST /trust/roots: signed offline by ``edgewarden keys init``."""

    image_root: bytes
    image_targets: bytes  # version 1, empty
    director_root: bytes


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """POST /models/publish: metadata signed offline that takes effect together; what is absent stays as it is.

    Each is the next version of its role, or the same again. Bundles are uploaded first.
    """

    targets: bytes | None = None
    delegated: dict[str, bytes] = {}  # family -> targets metadata of its own role
    image_root: bytes | None = None
    director_root: bytes | None = None


class ModelVersion(msgspec.Struct, frozen=True, kw_only=True):
    """GET /models: one published variant."""

    model: str
    version: int
    variant: str
    family: str
    title: str
    task: Task
    sha256: str
    length: int
    published_at: int
    running_on: int = 0  # devices that serve it now
    accuracy: Proportion | None = None  # from all labelled predictions of this version in the fleet
    hindrance: str | None = None  # why it must not be newly installed: yanked, or below the floor


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokens."""

    uses: int = 1
    life_seconds: int = 3600
    labels: dict[str, str] = {}


class TokenCreated(msgspec.Struct, frozen=True, kw_only=True):
    """The only time the token is shown."""

    token: str
    expires_at: int


class ModelOnDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one device: wanted against running."""

    model: str
    wanted_version: int | None
    running_version: int | None
    running_digest: str | None
    state: DeploymentState
    reason: RejectReason | None = None
    requests: int = 0  # over the recent span
    errors: int = 0
    dropped: int = 0  # turned away, not among the requests: queue full, and
    late: int = 0  # of the dropped: for their deadline
    shed: int = 0  # of the dropped: for their priority, by a device in distress
    p50_us: float | None = None
    p95_us: float | None = None
    accuracy: Proportion | None = None  # of the running version over the recent span


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /devices and /devices/{id}."""

    id: str
    labels: dict[str, str]
    presence: PresenceState
    last_seen: int | None
    agent: str | None
    device_class: str | None
    director_version_wanted: int
    director_version_accepted: int
    models: tuple[ModelOnDevice, ...]
    resources: Resources | None
    reports: int  # stored
    missing: int  # sequence numbers known to be missing
    facts: dict[str, str] = {}


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /events, newest first."""

    row: int
    device: str
    at: int
    received_at: int
    kind: EventKind
    model: str | None = None
    version: int | None = None
    state: DeploymentState | None = None
    reason: RejectReason | None = None
    detail: str = ""


class SeriesPoint(msgspec.Struct, frozen=True, kw_only=True):
    """GET /devices/{id}/series?model=M: one window."""

    start: int
    span: int
    version: int | None
    requests: int
    errors: int
    p50_us: float | None
    p95_us: float | None
    accuracy: Proportion | None
    dropped: int = 0  # as in `ModelOnDevice`
    late: int = 0
    shed: int = 0


class DeployRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /deployments. Exactly one of ``devices`` and ``all`` must choose the devices."""

    model: str
    version: int
    variant: str | None = None
    devices: tuple[str, ...] = ()
    all: bool = False


class RollbackRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /rollbacks. Without ``to`` each device gets the version it last committed before."""

    model: str
    to: int | None = None
    devices: tuple[str, ...] = ()
    all: bool = False


class DeploymentView(msgspec.Struct, frozen=True, kw_only=True):
    """What an order came to: device -> version, and why some devices were left out."""

    id: str
    kind: str
    model: str
    targets: dict[str, int]
    skipped: dict[str, str] = {}
