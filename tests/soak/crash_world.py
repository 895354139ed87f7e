"""One device on the real adapters and a real disk, with the fleet's far ends in this process, for `crash_sweep.py`.

The device is wired as ``agent/daemon.py`` wires it: real stores, spool, trust, downloads over TLS, the real update
machine. In this process, and cheap: the broker and the server's database (`Server`), the data plane (`Plane`, which
hashes every member before it serves), the trial (the real unpacking; the model is not run), time.
"""

import contextlib
import random
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import bsdiff4
import msgspec
from crash_journal import Recorder
from device_pki import Authority
from https_server import Book, Request, https_server
from tuf_world import NOW, Bundle, TufWorld

from agent.adapters.allowance import Allowance
from agent.adapters.atomic_file import remove_leftovers
from agent.adapters.connection_counter import ConnectionCounter
from agent.adapters.deployment_file import DeploymentFile
from agent.adapters.download import BundleDownloads
from agent.adapters.history_file import HistoryFile
from agent.adapters.hold_file import HoldFile
from agent.adapters.https import HttpsServer
from agent.adapters.identity import context_for
from agent.adapters.model_store import FolderStore
from agent.adapters.spool import SqliteSpool
from agent.adapters.trust import TufTrust
from agent.channel import (
    CANDIDATE,
    STABLE,
    RebuildRequest,
    SelfTested,
    Serving,
    Shadow,
    ShadowDelta,
    Shadowing,
    TrialVerdict,
)
from agent.chronicle import Chronicle
from agent.core.deployment import AT_REST
from agent.core.facts import DeviceFacts
from agent.core.health import HealthLimits
from agent.core.merging import merge_payloads
from agent.core.rungs import Rung
from agent.core.shadowing import ShadowCounts
from agent.core.windows import Windows
from agent.desire import Desires
from agent.inference.loading import unpack_file
from agent.inference.rebuild import CannotRebuild, apply
from agent.local_api import Step
from agent.ports import EVENTS, TELEMETRY, Rebuilding, Refusal, StoredModel, Target, VerifiedDesire
from agent.reporter import Reporter
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol.bundle import digest_of, read_manifest, write_bundle
from protocol.codec import decode_event, decode_report, encode
from protocol.device_api import BUNDLES_PATH
from protocol.manifest import MANIFEST_NAME, Manifest, decode_manifest
from protocol.messages import Acknowledgement, DesiredState, ServerState
from protocol.release import BSDIFF, release_of
from protocol.states import DeploymentState, RejectReason, RuntimeName
from simulator.memory import FakeHost, InlineBackground

DEVICE = "cam-7"
EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"
BALLAST = random.Random(5).randbytes(24_000)  # in every version: what a fine-tuned model keeps
BANDWIDTH = 32 * 1024  # bytes per second: a bundle comes in several pieces
TURN_MS = 4000
MAX_TURNS = 400
PROBATION_MS = 10_000
FACTS = DeviceFacts(device_class="x86_64", runtimes=(RuntimeName.LITERT,), memory_total=10**9)


# ---------------------------------------------------------------- bundles
def make_bundle(example: str, version: int, model: str = "digits") -> Bundle:
    """Return an example as a published bundle, with ballast."""
    folder = EXAMPLES / example
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes())
    members = {name: (folder / name).read_bytes() for name in manifest.members}
    members["ballast.bin"] = BALLAST
    digests = {name: digest_of(data) for name, data in members.items()}
    manifest = msgspec.structs.replace(manifest, model=model, version=version, members=digests)
    made = BytesIO()
    write_bundle(made, manifest, members)
    return Bundle(release_of(manifest), made.getvalue())


# ---------------------------------------------------------------- the far ends
@dataclass
class Server:
    """The server's database: what it has of a device's records."""

    got: dict[tuple[str, str, int], bytes] = field(default_factory=dict)  # spool, stream, number
    conflicts: list[str] = field(default_factory=list)

    def take(self, spool: str, stream: str, number: int, payload: bytes) -> None:
        if self.got.setdefault((spool, stream, number), payload) != payload:
            self.conflicts.append(f"{stream} {number} came with another content")

    def covered(self, spool: str, stream: str) -> set[int]:
        """Return the numbers whose content is here, also in a record that others were merged into."""
        numbers: set[int] = set()
        for (of, which, number), payload in self.got.items():
            if (of, which) == (spool, stream):
                covers = decode_report(payload).covers if stream == TELEMETRY else 1
                numbers.update(range(number - covers + 1, number + 1))
        return numbers

    def acknowledgement(self, spool: str) -> Acknowledgement:
        telemetry, events = self.covered(spool, TELEMETRY), self.covered(spool, EVENTS)
        return Acknowledgement(
            spool=spool,
            at=NOW,
            telemetry=max(telemetry, default=0),
            events=max(events, default=0),
            missing_telemetry=_gaps(telemetry),
            missing_events=_gaps(events),
        )

    def last_state(self, spool: str) -> DeploymentState | None:
        told = [decode_event(payload) for (_, stream, _), payload in sorted(self.got.items()) if stream == EVENTS]
        return next((event.state for event in reversed(told) if event.state), None)


def _gaps(numbers: set[int]) -> tuple[tuple[int, int], ...]:
    missing = sorted(set(range(1, max(numbers, default=0))) - numbers)
    return tuple((number, number) for number in missing)


@dataclass
class Fleet:
    """Both repositories, the bundles on an HTTPS port, and what was asked for."""

    book: Book
    authority: Authority
    world: TufWorld = field(default_factory=lambda: TufWorld(DEVICE))
    files: dict[str, bytes] = field(default_factory=dict)  # by path and query
    cuts: list[int] = field(default_factory=list)  # answers that break off after so many bytes, one each
    sent: dict[str, int] = field(default_factory=dict)  # bytes by path and query

    def __post_init__(self) -> None:
        self.book.answer = self.answer
        self.client_tls = context_for(self.authority.pem)

    def publish(self, bundle: Bundle) -> Bundle:
        self.world.released[bundle.path] = bundle.target()
        self.world.sign_image()
        self.files[f"{BUNDLES_PATH}/{bundle.sha256}"] = bundle.data
        return bundle

    def offer_delta(self, base: Bundle, made: Bundle, delta: bytes | None = None) -> dict[str, Any]:
        """Serve a delta; return ``assignment.deltas``."""
        data = bsdiff4.diff(base.data, made.data) if delta is None else delta
        self.files[f"{BUNDLES_PATH}/{made.sha256}?from={base.sha256}&method={BSDIFF}"] = data
        return {base.sha256: {"method": BSDIFF, "length": len(data), "sha256": digest_of(data)}}

    def answer(self, request: Request) -> None:
        data = self.files.get(request.path)
        if data is None:
            request.reply(404)
            return
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        body = data[start:]
        if self.cuts:
            keep = self.cuts.pop(0)
            self._count(request, keep)
            request.send_response(206 if start else 200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body[:keep])
            request.close_connection = True
            return
        self._count(request, len(body))
        said = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        request.reply(206 if start else 200, body, **said)

    def _count(self, request: Request, count: int) -> None:
        self.sent[request.path] = self.sent.get(request.path, 0) + count


@contextlib.contextmanager
def far_ends() -> Iterator[tuple[Book, Authority]]:
    """Run the HTTPS port that every fleet of a sweep uses, one after the other."""
    authority = Authority()
    with tempfile.TemporaryDirectory() as folder, https_server(authority.server_tls(Path(folder))) as book:
        yield book, authority


# ---------------------------------------------------------------- the device
class NotVerified(AssertionError):
    """Something was to be served that is not what was signed."""


@dataclass
class Plane:
    """The data plane: hashes what it is to serve, and answers at once."""

    device: "Device"
    golden: Mapping[int, bool]  # by version: whether its golden samples agree where it serves
    agrees: bool  # whether a shadow answers as the stable version does
    stable: dict[str, str] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)

    def serve(self, ticket: int, model: StoredModel, alias: str = STABLE) -> None:
        _check_members(model)
        name = model.manifest.model
        (self.candidates if alias == CANDIDATE else self.stable)[name] = model.digest
        answer = Serving(
            ticket=ticket,
            model=name,
            version=model.manifest.version,
            digest=model.digest,
            runtime=RuntimeName.LITERT,
            took_us=1000,
            alias=alias,
        )
        self.device.post(lambda now: self.device.updater.plane_serves(answer, now))

    def withdraw(self, ticket: int, model: str, alias: str = "") -> None:
        self.candidates.pop(model, None)
        if alias != CANDIDATE:
            self.stable.pop(model, None)

    def shadow(self, order: Shadow) -> None:
        pair = self.stable[order.model], self.candidates[order.model]
        told = Shadowing(ticket=order.ticket, model=order.model, stable=pair[0], candidate=pair[1])
        counts = ShadowCounts(stable=pair[0], candidate=pair[1], compared=500, agreed=500 * self.agrees)
        self.device.post(lambda _: self.device.verdicts.shadowed(told))
        self.device.post(lambda _: self.device.verdicts.shadowed(ShadowDelta(model=order.model, counts=counts)))

    def self_test(self, ticket: int, model: str) -> None:
        digest = self.stable[model]
        stored = self.device.store.find(digest)
        assert stored is not None
        passed = self.golden.get(stored.manifest.version, True)
        answer = SelfTested(ticket=ticket, model=model, digest=digest, passed=passed, detail="8 golden samples")
        self.device.post(lambda _: self.device.verdicts.tested(answer))


def _check_members(model: StoredModel) -> None:
    folder = Path(model.folder)
    for name, expected in model.manifest.members.items():
        if digest_of((folder / name).read_bytes()) != expected:
            raise NotVerified(f"{name} of {model.digest[:8]} is not what was signed")


@dataclass(frozen=True)
class Trials:
    """The trial: unpacks for real; whether the model is any good is said by version."""

    failing: frozenset[int]

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:
        unpack_file(Path(bundle), Path(folder))
        if target.release.version in self.failing:
            reason = RejectReason.GOLDEN_FAILED.value
            return TrialVerdict(passed=False, reason=reason, detail="golden samples differ")
        ladder = (Rung(runtime=RuntimeName.LITERT, threads=1, p50_us=100, p95_us=120),)
        return TrialVerdict(passed=True, golden=8, runtime=RuntimeName.LITERT, ladder=ladder)


class Rebuilds:
    """The rebuild child's work, in this process."""

    def methods(self) -> tuple[str, ...]:
        return (BSDIFF,)

    def rebuild(self, wanted: Rebuilding) -> str:
        request = RebuildRequest(
            method=wanted.method,
            base=wanted.base,
            folder=wanted.folder,
            delta=wanted.delta,
            made=wanted.made,
            length=wanted.length,
            memory_bytes=10**9,
            cpu_seconds=10,
        )
        try:
            with Path(wanted.made).open("wb") as made:
                apply(request, made)
        except CannotRebuild as error:
            return str(error)
        return ""


class WatchedDownloads(BundleDownloads):
    """Tells the journal of each download that is finished."""

    finished: Callable[[str], None] = staticmethod(lambda _sha256: None)

    def fetch(self, target: Target, progress: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
        path = super().fetch(target, progress, cancelled)
        self.finished(target.sha256)
        return path


class WatchedHistory(HistoryFile):
    """Remembers what it was told since this start."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.added: list[Step] = []

    def add(self, step: Step) -> None:
        super().add(step)
        self.added.append(step)


class WatchedSpool(SqliteSpool):
    """Tells the journal of each record that counts as kept."""

    kept: Callable[[str, int], None] = staticmethod(lambda _stream, _number: None)

    def append(self, stream: str, make: Callable[[int], bytes]) -> int:
        number = super().append(stream, make)
        self.kept(stream, number)
        return number


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What differs between scenarios on the device."""

    failing: frozenset[int] = frozenset()  # versions that fail their trial
    golden: Mapping[int, bool] = field(default_factory=dict)
    agrees: bool = True
    bytes_per_day: int = 0
    spool_bytes: int = 8 * 1024 * 1024
    window_ms: int = 60_000


class Device:
    """All parts of one control process, but for its threads."""

    def __init__(
        self,
        state: Path,
        fleet: Fleet,
        server: Server,
        *,
        settings: Settings,
        scratch: Path,
        clock: int,
        recorder: Recorder | None = None,
    ) -> None:
        """Build everything, as the daemon does; ``clock``: UTC ms."""
        self.now = clock
        self.connected = False
        self.connection = 0
        self.fleet, self.server, self.recorder = fleet, server, recorder
        self._turns: deque[Callable[[int], None]] = deque()
        self.background = InlineBackground(lambda done: self.post(lambda now: self._finish(done, now)))
        remove_leftovers(state)
        self.store = FolderStore(state)
        self.spool = WatchedSpool(state / "spool.db", merge=merge_payloads, limit=settings.spool_bytes)
        self.spool.kept = lambda stream, number: self.mark("kept", self.spool.id, stream, number)
        self.https = HttpsServer(fleet.book.url, tls=lambda: fleet.client_tls)
        self.trust = TufTrust(
            device=DEVICE,
            director_root=fleet.world.director.roots[0],
            image_root=fleet.world.image.roots[0],
            folder=state / "trust",
            scratch=scratch,
            image=fleet.world.image_file,
            is_stored=lambda sha256: self.store.find(sha256) is not None,
        )
        self.counter = ConnectionCounter(state / "connections")
        self.hold = HoldFile(state / "hold")
        self.history = WatchedHistory(state / "history.jsonl")
        self.reporter = Reporter(
            spool=self.spool,
            uplink=self,
            host=FakeHost(),
            windows=Windows(self.now, settings.window_ms),
            now=lambda: self.now,
            monotonic=self.monotonic,
        )
        self.plane = Plane(self, settings.golden, settings.agrees)
        self.verdicts = Verdicts(
            plane=self.plane, monotonic=self.monotonic, probation_ms=PROBATION_MS, limits=HealthLimits()
        )
        self.allowance = Allowance(
            state / "downloads.json",
            bandwidth=BANDWIDTH,
            bytes_per_day=settings.bytes_per_day,
            clock=lambda: self.now,
            monotonic=lambda: self.monotonic() + self._looked(),
            sleep=lambda _: None,
        )
        self.downloads = WatchedDownloads(
            self.https,
            state / "downloads",
            allowance=self.allowance,
            rebuilds=Rebuilds(),
            base=lambda digest: stored.folder if (stored := self.store.find(digest)) else None,
            clock=lambda: self.now,
        )
        self.downloads.finished = lambda sha256: self.mark("downloaded", sha256)
        self.updater = Updater(
            facts=FACTS,
            deployments=DeploymentFile(state / "deployments.json"),
            store=self.store,
            downloads=self.downloads,
            trials=Trials(settings.failing),
            plane=self.plane,
            background=self.background,
            events=Chronicle(self.reporter, self.history, lambda: self.now),
            changed=lambda: None,
            random=lambda: 0.5,
            monotonic=self.monotonic,
            verdicts=self.verdicts,
            calm=Calm(hold=self.hold.until),
        )
        self.desires = Desires(
            trust=self.trust,
            background=self.background,
            events=self.reporter,
            verified=self._pursue,
            clock=lambda: self.now,
            random=lambda: 0.5,
        )

    # ------------------------------------------------------------ life
    def start(self) -> None:
        """Serve what served, go on where it stood, connect."""
        self.updater.start(self.now)
        self._turn()
        recalled = self.trust.recall(self.now)
        if recalled and not recalled.expired:
            self._pursue(recalled.desire)
        self.connection = self.counter.next()
        self.mark("connection", self.connection)

    def connect(self) -> None:
        """The broker and the server are there."""
        self.connected = True
        self.reporter.connected()
        self.reporter.server_state(ServerState(up=True, epoch="e1"))

    def say(self, message: DesiredState) -> None:
        """Bring a desired state."""
        self.desires.arrived(encode(message), self.now)

    def settle(self, done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until nothing is left to do, or that is so."""
        for _ in range(MAX_TURNS):
            self._turn()
            self.reporter.acknowledge(self.server.acknowledgement(self.spool.id))
            if not self._turns and (done() or self.is_settled()):
                return
            self.now += TURN_MS
        raise AssertionError(f"it does not come to rest: {self.updater.records()}")

    def is_settled(self) -> bool:
        """Tell whether all machines rest or are held, and the server has every record."""
        resting = all(record.state in AT_REST or self.updater.held(record.model) for record in self.updater.records())
        return resting and not self.spool.depth(EVENTS) and not self.spool.depth(TELEMETRY)

    def end(self) -> None:
        """Let go of everything, without a good-bye."""
        self.spool.close()
        self.https.close()

    # ------------------------------------------------------------ the loop
    def post(self, item: Callable[[int], None]) -> None:
        self._turns.append(item)

    def monotonic(self) -> float:
        return self.now / 1000

    def mark(self, *said: Any) -> None:
        if self.recorder is not None:
            self.recorder.mark(*said)

    def _looked(self) -> float:
        if self.recorder is not None:
            self.recorder.look()  # between two pieces of a download
        return 0.0

    def _turn(self) -> None:
        while self._turns:
            self._turns.popleft()(self.now)
        self.updater.tick(self.now)
        self.desires.tick(self.now)
        self.reporter.tick(self.now)
        while self._turns:
            self._turns.popleft()(self.now)

    def _finish(self, done: Callable[[], None], now: int) -> None:
        done()
        self.updater.tick(now)

    def _pursue(self, desire: VerifiedDesire) -> None:
        versions = self.trust.versions()
        self.mark("trusted", versions.director, versions.director_root, versions.image_root, self.trust.clock_floor)
        self.updater.want(desire, self.now)

    # ------------------------------------------------------------ the uplink
    def publish(self, stream: str, number: int, payload: bytes) -> bool:
        self.server.take(self.spool.id, stream, number, payload)
        self.mark("got", self.spool.id, stream, number, payload)
        return True


def manifest_of(bundle: Bundle) -> Manifest:
    """Return the manifest inside a published bundle."""
    return read_manifest(BytesIO(bundle.data))


def is_replay_refused(device: Device, message: DesiredState) -> bool:
    """Tell whether an older desired state is refused."""
    try:
        device.trust.verify(message, device.now)
    except Refusal:
        return True
    return False
