"""What the REST API says and hears (`/api/v1`), shared by `web/` and `cli/`.

Frozen structs only. Times are UTC ms, durations µs. Bytes travel as base64. Errors are RFC 9457 problem+json
(`Problem`). A figure that people act on comes with its n and interval (`protocol.metrics.Proportion`).
"""

from typing import Annotated

import msgspec

from fleet_server.core.access import Permission, Role
from fleet_server.core.audit import Result
from protocol.commands import MAX_LIFE_MS, Deed
from protocol.messages import Resources
from protocol.metrics import Proportion
from protocol.release import ShadowTerms
from protocol.states import CommandState, DeploymentState, EventKind, PresenceState, RejectReason, Task

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


class PasswordRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /password: one's own."""

    present: str
    new: str


class WhoAmI(msgspec.Struct, frozen=True, kw_only=True):
    """GET /whoami."""

    user: str
    role: Role
    permissions: tuple[Permission, ...]
    by: str  # session, or token:<id>


class UserRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /users; answers with `UserView`."""

    name: str
    password: str
    role: Role


class UserChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PATCH /users/{name}; what is absent stays. DELETE removes the user."""

    role: Role | None = None
    disabled: bool | None = None
    password: str | None = None


class UserView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /users and /users/{name}; the revision is the ETag."""

    name: str
    role: Role
    disabled: bool
    created_at: int
    revision: int


class ApiTokenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /api-tokens: a key for a program, which acts in one's own name."""

    name: str
    scopes: tuple[Permission, ...]
    life_days: int = 90


class ApiTokenCreated(msgspec.Struct, frozen=True, kw_only=True):
    """The only time the token is shown."""

    token: str
    id: str
    expires_at: int


class ApiTokenView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /api-tokens. DELETE /api-tokens/{id} revokes one."""

    id: str
    user: str
    name: str
    scopes: tuple[Permission, ...]
    created_at: int
    expires_at: int
    last_used_at: int | None = None  # exact to a minute
    revoked_at: int | None = None


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One act in the audit log; what the fields mean is in `core/audit.py`."""

    sequence: int
    at: int
    who: str
    by: str
    address: str
    action: str
    about: str
    result: Result
    detail: str
    previous: str
    digest: str


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """GET /audit. ``next`` is the ``before`` (or ``after``) of the page that follows; None on the last."""

    entries: tuple[AuditEntry, ...]
    next: int | None


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


class RevokeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /devices/{id}/revoke."""


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """What a revocation came to. HTTPS refuses the device from this answer on."""

    device: str
    cut: bool  # the broker has cut it off; else that follows when the broker can be reached


class ReopenRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /devices/{id}/reopen: let an id that is taken enrol again, once."""

    seconds: int = 3600


class Reopened(msgspec.Struct, frozen=True, kw_only=True):
    """Until when the id is open."""

    device: str
    open_until: int


class ModelOnDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one device: wanted against running."""

    model: str
    wanted_version: int | None
    running_version: int | None
    running_digest: str | None
    state: DeploymentState
    reason: RejectReason | None = None
    forced: bool = False  # its order: hold, maintenance hours and the loop breaker do not bind it
    shadow: ShadowTerms | None = None  # its order: how it is compared before it serves
    detail: str = ""  # the newest step's sentence, a verdict's figures among them; in the view of one device only
    shadow_verdict: str = ""  # how its shadow went; in the view of one device only
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
    certificate_expires: int | None = None
    ca: str = ""  # key identifier of the CA that issued its certificate
    open_until: int | None = None  # when an operator has opened the id for a new enrolment


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
    force: bool = False  # hold, maintenance hours and the loop breaker do not bind it
    shadow: ShadowTerms | None = None  # compare it before it serves


class RollbackRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /rollbacks. Without ``to`` each device gets the version it last committed before."""

    model: str
    to: int | None = None
    devices: tuple[str, ...] = ()
    all: bool = False
    force: bool = True  # as in `DeployRequest`; what is wrong must go, also outside of the hours


class DeploymentView(msgspec.Struct, frozen=True, kw_only=True):
    """What an order came to: device -> version, and why some devices were left out."""

    id: str
    kind: str
    model: str
    targets: dict[str, int]
    skipped: dict[str, str] = {}


class CommandRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /devices/{id}/commands: have a device do something once."""

    command: Deed
    life_seconds: Annotated[int, msgspec.Meta(ge=5, le=MAX_LIFE_MS // 1000)] = 600


class CommandView(msgspec.Struct, frozen=True, kw_only=True):
    """GET /devices/{id}/commands, newest first, and the answer to a `CommandRequest`."""

    id: str
    device: str
    command: str  # in words
    by: str
    issued_at: int
    expires_at: int
    state: CommandState
    reason: RejectReason | None = None  # why it was refused
    detail: str = ""
    answered_at: int | None = None
