"""Messages between the control process and its data plane, and the framed socket they travel on.

One Unix socket pair, inherited by the data plane as the file descriptor named in ``EW_CHANNEL_FD``. A frame is a
4-byte big-endian length and a JSON object; frames are capped. Control orders, the data plane answers and sends the
*difference* of its statistics once a second. Neither side interprets the other's state: what to do about an answer is
decided in ``core/``.
"""

import socket
import struct
import threading
from contextlib import suppress
from typing import TypeVar

import msgspec

from agent.core.capturing import CapturePolicy
from agent.core.delegates import Delegate
from agent.core.governor import Level, Measures
from agent.core.pipelines import PipelineSettings
from agent.core.rungs import Rung
from agent.core.shadowing import ShadowCounts
from protocol.states import RuntimeName, Task
from protocol.statistics import ModelStatistics, TruthStatistics

MAX_FRAME = 4 * 1024 * 1024  # bytes; a second's statistics of 32 models with 1000 classes stay below
CHANNEL_FD = "EW_CHANNEL_FD"
LISTEN_FDS = "EW_LISTEN_FDS"  # comma-separated: listening sockets that control holds
PARENT_PID = "EW_PARENT_PID"  # a child whose parent is another by the time it looks has been orphaned
EXIT_HUNG = 70  # a data plane ended itself, for a model hung in it; `Hung` named it before
STABLE, CANDIDATE = "stable", "candidate"  # the aliases of the versions of a model that serve side by side
_HEADER = struct.Struct(">I")


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: load this bundle, warm it beside what serves under the same name, flip, drain, drop the old."""

    ticket: int  # echoed in the answer
    model: str
    version: int
    digest: str  # sha256 hex of the bundle
    folder: str  # extracted bundle
    runtime: str = ""  # measured to be the fastest here; empty: as set
    threads: int = 0  # of one interpreter; 0: as set
    delegate: str = ""  # of those configured; was measured in a child before
    alias: str = STABLE  # the candidate is answered by its version or alias only


class Withdraw(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: stop serving a model, or only what has this alias."""

    ticket: int
    model: str
    alias: str = ""  # empty: every version


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: what this device's own settings add. Comes once, before anything is served; they may start programs."""

    pipelines: tuple[PipelineSettings, ...] = ()
    capture: CapturePolicy = CapturePolicy()
    delegates: tuple[Delegate, ...] = ()
    state: str = ""  # the agent's state folder: samples, their key, locks


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: import what these runtimes and settings need, then wait to be needed. Comes before any other, or never.

    Nothing is configured, loaded or opened by it; it is not answered. May come again when more is needed.
    """

    runtimes: tuple[RuntimeName, ...] = ()
    configuration: Configure = Configure()


class Shadow(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: let the candidate answer a share of a model's requests, unseen, and compare."""

    ticket: int
    model: str
    share: float  # of the requests, above 0, at most 1
    cpu: float = 0.25  # of one core


class EndShadow(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: compare no more."""

    ticket: int
    model: str


class SelfTest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: run the golden samples of what is stable on the interpreters that serve, last in line."""

    ticket: int
    model: str


class Govern(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: how hard to work from now on, also for what is loaded later. The last one stands; it is not answered."""

    level: Level
    measures: Measures


class Open(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: accept connections. Comes once, when everything that should serve does; until then they wait queued."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Order: finish what is in flight, send the last statistics, exit with 0."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The data plane accepts orders. Sent once, first."""

    pid: int
    runtimes: tuple[RuntimeName, ...]


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `Open`: clients reach this data plane on every address. The one before it may go."""


class Serving(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `Serve`: the flip happened."""

    ticket: int
    model: str
    version: int
    digest: str
    runtime: RuntimeName
    took_us: int  # load + warm + flip
    alias: str = STABLE
    stop_start: bool = False  # memory did not allow both: the old one was dropped before this one was loaded
    without_delegate: str = ""  # why it serves without the one that was ordered


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `Withdraw`."""

    ticket: int
    model: str


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to an order that could not be carried out; what served before serves on."""

    ticket: int
    model: str
    reason: str
    alias: str = STABLE


class Hung(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last word of a data plane that ends itself with `EXIT_HUNG`: this model did not come back."""

    model: str
    version: int
    digest: str
    seconds: float  # the limit that it broke


class Shadowing(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `Shadow`: it has begun."""

    ticket: int
    model: str
    stable: str  # sha256 hex
    candidate: str


class ShadowEnded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `EndShadow`, or to a `Shadow` that cannot be; ticket 0: it ended by itself. Deltas come before."""

    ticket: int
    model: str
    reason: str


class ShadowDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a shadow has counted since the last delta. A delta that was sent is never sent again."""

    model: str
    counts: ShadowCounts


class SelfTested(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer to `SelfTest`."""

    ticket: int
    model: str
    passed: bool | None  # None: they could not be run now
    detail: str
    digest: str = ""  # sha256 hex of what was tested


class StatisticsDelta(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What happened since the last delta. A delta that was sent is never sent again."""

    models: tuple[ModelStatistics, ...] = ()
    truth: tuple[TruthStatistics, ...] = ()
    unknown_truth: int = 0  # feedback for predictions no longer remembered


Order = Prepare | Configure | Govern | Serve | Withdraw | Shadow | EndShadow | SelfTest | Open | Drain
Answer = (
    Ready
    | Opened
    | Serving
    | Withdrawn
    | Refused
    | Shadowing
    | ShadowEnded
    | ShadowDelta
    | SelfTested
    | Hung
    | StatisticsDelta
)


class TrialRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the trial child is to try: standard input of ``python -m agent.inference.trial``."""

    bundle: str  # path of the downloaded .ewb
    folder: str  # empty folder to unpack into
    task: Task = Task.CLASSIFICATION
    runtime: str = "auto"  # auto | litert | tflite-runtime
    memory_bytes: int  # data segment allowed beyond what the runtime itself takes (RLIMIT_DATA)
    cpu_seconds: int
    manifest_sha256: str | None = None
    model: str = ""  # what the signed release says the bundle is; empty: not asked
    version: int = 0
    variant: str = ""
    ladder_seconds: float = 0.0  # for measuring runtimes and threads after passing; 0: nothing is measured
    delegates: tuple[Delegate, ...] = ()  # to be measured too


class TrialVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the trial child found: its one line of standard output. No line, or an exit code other than 0: failed."""

    passed: bool
    reason: str = ""  # RejectReason value when not passed
    detail: str = ""
    runtime: RuntimeName | None = None
    latency_us: int | None = None  # median of the warm runs
    peak_memory: int | None = None  # bytes
    golden: int = 0  # golden samples that agreed
    ladder: tuple[Rung, ...] = ()  # what was measured, when that was asked for
    network: str = ""  # how the network was taken away: unshare, seccomp


class RebuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which delta to apply: standard input of ``python -m agent.inference.rebuild``."""

    method: str
    base: str  # digest of the bundle it starts from
    folder: str  # where that bundle lies, extracted; empty: it starts from nothing
    delta: str  # path
    made: str  # path of the bundle to write
    length: int  # of that bundle; more is never written
    memory_bytes: int  # data segment allowed beyond what the decoders' code takes (RLIMIT_DATA)
    cpu_seconds: int


class RebuildVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """How it went: one line of standard output. Whether it is the right bundle is for others to see."""

    trouble: str = ""  # empty: made
    peak_memory: int = 0  # bytes more than before the delta was read


class ChannelClosed(ConnectionError):
    """The other side is gone, or sent something that is not a frame."""


T = TypeVar("T")


class Channel:
    """A framed socket. Sending is safe from several threads; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, message: Order | Answer) -> None:
        """Send one message; raise `ChannelClosed`."""
        body = msgspec.json.encode(message)
        with self._sending:
            try:
                self._sock.sendall(_HEADER.pack(len(body)) + body)
            except OSError as error:
                raise ChannelClosed(str(error)) from error

    def receive_order(self) -> Order:
        """Wait for the next order; raise `ChannelClosed`."""
        order: Order = self._receive(_orders)
        return order

    def receive_answer(self) -> Answer:
        """Wait for the next answer; raise `ChannelClosed`."""
        answer: Answer = self._receive(_answers)
        return answer

    def close(self) -> None:
        """Close the socket; the other side sees `ChannelClosed`."""
        with suppress(OSError):  # the other side may be gone already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _receive(self, decoder: "msgspec.json.Decoder[T]") -> T:
        (length,) = _HEADER.unpack(self._read(_HEADER.size))
        if length > MAX_FRAME:
            raise ChannelClosed(f"a frame of {length} bytes is over the cap of {MAX_FRAME}")
        try:
            return decoder.decode(self._read(length))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ChannelClosed(f"not a message: {error}") from error

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                chunk = self._sock.recv(size - len(data))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not chunk:
                raise ChannelClosed("the other side closed the channel")
            data += chunk
        return bytes(data)


_orders = msgspec.json.Decoder(
    Prepare | Configure | Govern | Serve | Withdraw | Shadow | EndShadow | SelfTest | Open | Drain
)
_answers = msgspec.json.Decoder(
    Ready
    | Opened
    | Serving
    | Withdrawn
    | Refused
    | Shadowing
    | ShadowEnded
    | ShadowDelta
    | SelfTested
    | Hung
    | StatisticsDelta
)
