"""Every MQTT payload, frozen and typed. ``codec.py`` turns bytes into these and back.

Receivers ignore unknown fields within a major version, so fields may be added, never changed. Units: µs, bytes,
per mille, 0.1 °C, UTC ms. The prose with numbered requirements is README.md; one frozen example of each message
is kept in ``golden/``.
"""

import msgspec

from protocol.states import CommandOutcome, DeploymentState, EventKind, RejectReason, RuntimeName
from protocol.statistics import ModelStatistics, TruthStatistics

WIRE_VERSION = 1
_UNSAID = 1  # what a message without ``v`` is, for ever: defaults are left out on the wire


class RunningModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model as the device sees it: what serves, and where its update stands."""

    model: str
    state: DeploymentState
    version: int | None = None  # what serves; None when nothing does
    digest: str | None = None  # sha256 of the serving bundle, hex
    attempt: int = 0
    reason: RejectReason | None = None


class Birth(msgspec.Struct, frozen=True, kw_only=True, tag_field="s", tag="on"):
    """A device is connected (``up/state``, retained)."""

    v: int = _UNSAID
    boot: str  # random per start of the agent
    connection: int  # grows with each connection of this installation, for ever
    at: int  # UTC ms by the device's clock
    agent: str  # version of the agent
    device_class: str  # operator's label or machine architecture
    timezone: str = "UTC"  # IANA
    runtimes: tuple[RuntimeName, ...] = ()
    codecs: tuple[int, ...] = (0,)  # codec bytes this device can read
    spool: str = ""  # id of the spool file; new when the file is new
    director_version: int = 0  # newest Director metadata accepted
    director_root: int = 1  # root versions held: the server sends the steps after them
    image_root: int = 1
    models: tuple[RunningModel, ...] = ()
    facts: dict[str, str] = {}  # machine, kernel, python, memory, …


class Farewell(msgspec.Struct, frozen=True, kw_only=True, tag_field="s", tag="off"):
    """A device disconnected on purpose (``up/state``, retained)."""

    v: int = _UNSAID
    boot: str
    connection: int
    at: int


class Will(msgspec.Struct, frozen=True, kw_only=True, tag_field="s", tag="lost"):
    """The broker lost the device (``up/state``, retained, sent by the broker). Stale if the connection is old."""

    v: int = _UNSAID
    boot: str
    connection: int


DeviceState = Birth | Farewell | Will


class Resources(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Readings of the machine over a window. A sensor that is missing is None, never zero."""

    cpu: int | None = None  # per mille of all cores, mean over the window
    memory: int | None = None  # bytes in use (total - available), last reading
    memory_total: int | None = msgspec.field(default=None, name="memtot")
    control_rss: int | None = msgspec.field(default=None, name="rss")  # bytes, control process
    data_plane_rss: int | None = msgspec.field(default=None, name="dprss")  # bytes, data plane
    network_in: int | None = msgspec.field(default=None, name="rx")  # bytes over the window
    network_out: int | None = msgspec.field(default=None, name="tx")
    disk_free: int | None = msgspec.field(default=None, name="disk")  # bytes where the models live
    temperature: int | None = msgspec.field(default=None, name="temp")  # 0.1 °C, hottest sensor


class Window(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all models and the machine did over one span of time."""

    start: int = msgspec.field(name="t")  # UTC ms
    span: int = msgspec.field(name="w")  # ms
    models: tuple[ModelStatistics, ...] = msgspec.field(default=(), name="m")
    resources: Resources | None = msgspec.field(default=None, name="r")


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Telemetry (``up/t``). Its id is (device, spool, sequence); once published it never changes."""

    v: int = _UNSAID
    spool: str = msgspec.field(name="p")
    sequence: int = msgspec.field(name="q")
    covers: int = msgspec.field(default=1, name="k")  # how many numbers, ending at sequence, were merged into this
    windows: tuple[Window, ...] = msgspec.field(default=(), name="w")
    truth: tuple[TruthStatistics, ...] = msgspec.field(default=(), name="g")
    dropped: int = msgspec.field(default=0, name="lost")  # reports dropped by a full spool so far


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something happened (``up/e``). Own sequence in the same spool; sent before the telemetry backlog."""

    v: int = _UNSAID
    spool: str = msgspec.field(name="p")
    sequence: int = msgspec.field(name="q")
    at: int  # UTC ms
    kind: EventKind
    model: str | None = None
    version: int | None = None
    digest: str | None = None
    state: DeploymentState | None = None
    reason: RejectReason | None = None
    attempt: int | None = None
    detail: str = ""  # a sentence for people, at most 500 characters


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a command (``up/r``). Own sequence in the same spool; sent before everything else."""

    v: int = _UNSAID
    spool: str = msgspec.field(name="p")
    sequence: int = msgspec.field(name="q")
    at: int  # UTC ms
    command: str  # its id
    outcome: CommandOutcome
    reason: RejectReason | None = None  # why it was refused
    detail: str = ""  # a sentence for people, at most 500 characters


class Acknowledgement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The server has these in its database (``down/ack``, QoS 0). Cumulative: also answers for older ones."""

    v: int = _UNSAID
    spool: str
    at: int  # server's UTC ms
    telemetry: int = 0  # every report up to here is stored, except those in missing
    events: int = 0
    missing_telemetry: tuple[tuple[int, int], ...] = ()  # inclusive ranges to send again
    missing_events: tuple[tuple[int, int], ...] = ()
    replies: int = 0
    missing_replies: tuple[tuple[int, int], ...] = ()


class DesiredState(msgspec.Struct, frozen=True, kw_only=True):
    """Director metadata for one device (``down/want``, retained): the exact signed bytes (TUF 1.0 JSON)."""

    v: int = _UNSAID
    root: tuple[bytes, ...] = ()  # root steps after the version named in the last birth, in order
    timestamp: bytes
    snapshot: bytes
    targets: bytes


class EnvelopeSignature(msgspec.Struct, frozen=True, kw_only=True):
    """One signature of an envelope."""

    keyid: str  # as in TUF metadata
    sig: bytes


class CommandEnvelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A signed command (``down/cmd``): a DSSE envelope. Nothing in it counts before its signatures are verified."""

    v: int = _UNSAID
    payload: bytes  # the exact signed bytes of a `protocol.commands.Command`
    payload_type: str = msgspec.field(name="payloadType")
    signatures: tuple[EnvelopeSignature, ...]


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet server's presence (``srv/state``, retained; ``up=false`` is its will)."""

    v: int = _UNSAID
    up: bool
    epoch: str  # random per start of ingest: a new one means "send again what I did not acknowledge"
    at: int = 0
