"""The agent's ports in memory: same promises as the adapters, no disk, no network, no other process.

Used by the simulated fleet and by the agent's unit tests. What a real part would find out (a signature, a download,
a trial) is scripted by the caller and used up in order; the last entry of a script repeats. Everything asked of a
fake is kept in its ``calls``, so that a test can read the story afterwards.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from agent.channel import STABLE, Shadow, TrialVerdict
from agent.core.deployment import Deployment
from agent.core.rungs import Rung
from agent.ports import (
    EVENTS,
    REPLIES,
    TELEMETRY,
    AgentError,
    Refusal,
    StoredModel,
    Target,
    TrustVersions,
    VerifiedDesire,
    Weather,
)
from protocol.manifest import Golden, Manifest, Needs, TensorSpec
from protocol.messages import DesiredState, Resources
from protocol.release import Assignment, DeviceConfig, ShadowTerms, release_of
from protocol.states import RejectReason, Task

RECORD_OVERHEAD = 32  # bytes that a stored record costs beside its payload; as in agent/adapters/spool.py
Merge = Callable[[bytes, bytes], bytes | None]
T = TypeVar("T")


class Script(Generic[T]):
    """Outcomes to be played in order. The last one repeats; an exception is raised instead of returned."""

    def __init__(self, outcomes: Iterable[T | AgentError]) -> None:
        """Take the outcomes; there must be at least one."""
        self._left = list(outcomes)
        if not self._left:
            raise ValueError("a script needs at least one outcome")

    def play(self) -> T:
        """Return the next outcome, or raise it."""
        outcome = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        if isinstance(outcome, AgentError):
            raise outcome
        return outcome


# ---------------------------------------------------------------- trust, downloads, store, trial, data plane
class FakeTrust:
    """`agent.ports.Trust`: answers each desired state with the next scripted result."""

    def __init__(self, results: Iterable[VerifiedDesire | AgentError], versions: TrustVersions | None = None) -> None:
        """``results``: verified desires, or the `Refusal` or `Weather` to raise."""
        self._script: Script[VerifiedDesire] = Script(results)
        self._versions = versions or TrustVersions()
        self.calls: list[tuple[DesiredState, int]] = []

    def verify(self, message: DesiredState, now: int) -> VerifiedDesire:
        self.calls.append((message, now))
        desire = self._script.play()
        self._versions = TrustVersions(
            director=desire.director_version,
            director_root=self._versions.director_root,
            image_root=self._versions.image_root,
        )
        return desire

    def versions(self) -> TrustVersions:
        return self._versions


class FakeDownloads:
    """`agent.ports.Downloads`: each digest has its script of paths and errors; unscripted ones succeed at once."""

    def __init__(
        self,
        outcomes: Mapping[str, Iterable[str | AgentError]] | None = None,
        *,
        hold: threading.Event | None = None,
    ) -> None:
        """``hold``: every fetch waits until it is set or the fetch is cancelled."""
        self._scripts: dict[str, Script[str]] = {sha256: Script(each) for sha256, each in (outcomes or {}).items()}
        self._hold = hold
        self.calls: list[Target] = []
        self.discarded: list[str] = []
        self.kept: tuple[str, ...] = ()  # what `collect` was last told to keep
        self.room = True

    def fetch(self, target: Target, progress: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
        self.calls.append(target)
        while self._hold is not None and not self._hold.wait(0.01):
            if cancelled():
                break
        if cancelled():
            raise Weather("the download was cancelled")
        script = self._scripts.get(target.sha256)
        path = script.play() if script else f"memory:/downloads/{target.sha256}.ewb"
        progress(target.length)
        return path

    def has_room(self, target: Target) -> bool:  # noqa: ARG002 - the port's
        return self.room

    def discard(self, sha256: str) -> None:
        self.discarded.append(sha256)

    def collect(self, keep: Sequence[str]) -> None:
        self.kept = tuple(keep)


class MemoryStore:
    """`agent.ports.ModelStore`: bundles are known by the manifests given to it."""

    def __init__(
        self, manifests: Mapping[str, Manifest] | None = None, *, damaged: Mapping[str, Refusal] | None = None
    ) -> None:
        """``manifests``: {digest: what `admit` will find}; ``damaged``: {digest: what `admit` raises}."""
        self.manifests = dict(manifests or {})
        self.damaged = dict(damaged or {})
        self.staged: set[str] = set()
        self.stored: dict[str, StoredModel] = {}
        self.calls: list[tuple[str, ...]] = []
        self._active: dict[str, str] = {}

    def stage(self, digest: str) -> str:
        self.calls.append(("stage", digest))
        self.staged.add(digest)
        return f"memory:/staged/{digest}"

    def admit(self, digest: str) -> StoredModel:
        self.calls.append(("admit", digest))
        self.staged.discard(digest)
        if digest in self.damaged:
            raise self.damaged[digest]
        if digest not in self.manifests:
            raise Refusal(RejectReason.BAD_BUNDLE, f"nothing was staged for {digest[:16]}")
        stored = StoredModel(digest=digest, folder=f"memory:/models/{digest}", manifest=self.manifests[digest])
        self.stored[digest] = stored
        return stored

    def note_rungs(self, digest: str, rungs: Sequence[Rung]) -> None:
        self.calls.append(("note_rungs", digest, str(len(rungs))))

    def find(self, digest: str) -> StoredModel | None:
        return self.stored.get(digest)

    def active(self) -> Mapping[str, str]:
        return dict(self._active)

    def activate(self, model: str, digest: str | None) -> None:
        self.calls.append(("activate", model, digest or ""))
        if digest is None:
            self._active.pop(model, None)
        else:
            self._active[model] = digest

    def check_all(self) -> Sequence[tuple[StoredModel, str]]:
        return [(stored, "") for stored in self.stored.values()]

    def collect(self, keep: Sequence[str]) -> None:
        self.calls.append(("collect", *keep))
        self.staged.clear()
        self.stored = {digest: model for digest, model in self.stored.items() if digest in keep}


class FakeTrials:
    """`agent.ports.Trials`: each digest has its script of verdicts; unscripted ones pass."""

    def __init__(self, verdicts: Mapping[str, Iterable[TrialVerdict | AgentError]] | None = None) -> None:
        """``verdicts``: {digest: verdicts in order}."""
        self._scripts: dict[str, Script[TrialVerdict]] = {sha: Script(each) for sha, each in (verdicts or {}).items()}
        self.calls: list[tuple[str, str, Target]] = []

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:
        self.calls.append((bundle, folder, target))
        script = self._scripts.get(target.sha256)
        return script.play() if script else TrialVerdict(passed=True, golden=8)


@dataclass(frozen=True, kw_only=True)
class DataPlaneCall:
    """One order the updater gave: serve ``stored`` as ``model``, or withdraw the model when it is None."""

    ticket: int
    model: str
    stored: StoredModel | None
    alias: str = STABLE  # empty with a withdrawal: every version


class FakeDataPlane:
    """`agent.ports.DataPlane`: records what is asked; the test posts the answers itself or gives callbacks."""

    def __init__(
        self,
        on_call: Callable[[DataPlaneCall], None] | None = None,
        *,
        on_shadow: Callable[[Shadow], None] = lambda _: None,
        on_test: Callable[[int, str], None] = lambda _ticket, _model: None,
    ) -> None:
        """Each is told of its calls, after they were recorded."""
        self.calls: list[DataPlaneCall] = []
        self.shadows: list[Shadow] = []
        self.tests: list[tuple[int, str]] = []  # ticket, model
        self._on_call = on_call
        self._on_shadow = on_shadow
        self._on_test = on_test

    def serve(self, ticket: int, model: StoredModel, alias: str = STABLE) -> None:
        self._note(DataPlaneCall(ticket=ticket, model=model.manifest.model, stored=model, alias=alias))

    def withdraw(self, ticket: int, model: str, alias: str = "") -> None:
        self._note(DataPlaneCall(ticket=ticket, model=model, stored=None, alias=alias))

    def shadow(self, order: Shadow) -> None:
        self.shadows.append(order)
        self._on_shadow(order)

    def self_test(self, ticket: int, model: str) -> None:
        self.tests.append((ticket, model))
        self._on_test(ticket, model)

    def _note(self, call: DataPlaneCall) -> None:
        self.calls.append(call)
        if self._on_call is not None:
            self._on_call(call)


class MemoryDeployments:
    """`agent.ports.Deployments`: ends with the process."""

    def __init__(self, records: Iterable[Deployment] = ()) -> None:
        """``records``: what a start before this one left."""
        self._records = {record.model: record for record in records}

    def load(self) -> Mapping[str, Deployment]:
        return dict(self._records)

    def save(self, record: Deployment) -> None:
        self._records[record.model] = record


class InlineBackground:
    """`agent.ports.Background`: works at once, and hands the result to ``post`` for the main thread's next turn."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        """``post`` takes a call to be made on the main thread."""
        self._post = post

    def submit(self, name: str, work: Callable[[], T], done: Callable[[T], None]) -> None:  # noqa: ARG002 - the port's
        result = work()
        self._post(lambda: done(result))


# ---------------------------------------------------------------- spool, uplink, host
@dataclass
class _Record:
    number: int
    payload: bytes
    covers: int = 1
    published: bool = False


@dataclass
class _Stream:
    last: int = 0
    handed_out: int = 0
    records: list[_Record] = field(default_factory=list)  # by number


class MemorySpool:
    """`agent.ports.Spool` with the promises of ``agent/adapters/spool.py``, except that it ends with the process."""

    def __init__(self, spool_id: str = "memory", *, limit: int = 1024 * 1024, merge: Merge | None = None) -> None:
        """``limit``: bytes before neighbouring reports are merged, then the oldest dropped."""
        self._id = spool_id
        self._limit = limit
        self._merge = merge
        self._lock = threading.RLock()
        self._streams: dict[str, _Stream] = {}
        self._dropped = 0

    @property
    def id(self) -> str:
        return self._id

    def append(self, stream: str, make: Callable[[int], bytes]) -> int:
        with self._lock:
            queue = self._stream(stream)
            payload = make(queue.last + 1)
            queue.last += 1
            queue.records.append(_Record(queue.last, payload))
            self._make_room()
            return queue.last

    def unpublished(self, stream: str, limit: int) -> Sequence[tuple[int, bytes]]:
        with self._lock:
            queue = self._stream(stream)
            ready = [record for record in queue.records if not record.published][:limit]
            if ready:
                queue.handed_out = max(queue.handed_out, ready[-1].number)
            return [(record.number, record.payload) for record in ready]

    def mark_published(self, stream: str, number: int) -> None:
        with self._lock:
            for record in self._stream(stream).records:
                record.published = record.published or record.number == number

    def acknowledge(self, stream: str, upto: int, missing: Sequence[tuple[int, int]]) -> int:
        with self._lock:
            queue = self._stream(stream)
            before = len(queue.records)
            wanted = [record for record in queue.records if _within(record.number, missing)]
            for record in wanted:
                record.published = False
            known = min(upto, queue.handed_out)
            queue.records = [r for r in queue.records if r.number > known or _within(r.number, missing)]
            return before - len(queue.records)

    def forget_published(self) -> None:
        with self._lock:
            for queue in self._streams.values():
                for record in queue.records:
                    record.published = False

    def depth(self, stream: str) -> int:
        with self._lock:
            return len(self._stream(stream).records)

    def dropped(self) -> int:
        return self._dropped

    def _stream(self, name: str) -> _Stream:
        return self._streams.setdefault(name, _Stream())

    def _make_room(self) -> None:
        while self._size() > self._limit and (self._merge_one() or self._drop_one()):
            pass

    def _size(self) -> int:
        return sum(len(r.payload) + RECORD_OVERHEAD for queue in self._streams.values() for r in queue.records)

    def _merge_one(self) -> bool:
        if self._merge is None:
            return False
        queue = self._stream(TELEMETRY)
        fresh = [record for record in queue.records if record.number > queue.handed_out]
        pairs = sorted(itertools.pairwise(fresh), key=lambda pair: pair[0].covers + pair[1].covers)
        for older, newer in pairs:
            merged = self._merge(older.payload, newer.payload)
            if merged is not None:
                newer.payload, newer.covers = merged, older.covers + newer.covers
                queue.records.remove(older)
                return True
        return False

    def _drop_one(self) -> bool:
        telemetry = self._stream(TELEMETRY)
        if telemetry.records:
            self._dropped += telemetry.records.pop(0).covers
            return True
        for queue in (self._stream(EVENTS), self._stream(REPLIES)):
            if len(queue.records) > 1:
                queue.records.pop(0)
                return True
        return False


def _within(number: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(low <= number <= high for low, high in ranges)


class MemoryUplink:
    """`agent.ports.Uplink`: keeps what was published; ``connected`` and the window are set by the test."""

    def __init__(self, *, connected: bool = True, window: int = 20) -> None:
        """``window``: records in flight until `settle` is called."""
        self.connected = connected
        self.published: list[tuple[str, int, bytes]] = []
        self._window = window
        self._in_flight = 0

    def publish(self, stream: str, number: int, payload: bytes) -> bool:
        if not self.connected or self._in_flight >= self._window:
            return False
        self._in_flight += 1
        self.published.append((stream, number, payload))
        return True

    def settle(self) -> None:
        """The broker confirmed everything in flight."""
        self._in_flight = 0

    def take(self) -> list[tuple[str, int, bytes]]:
        """Return what was published since the last call, and settle."""
        taken, self.published = self.published, []
        self.settle()
        return taken


class FakeHost:
    """`agent.ports.Host`: the readings are what ``resources`` was last set to."""

    def __init__(self, resources: Resources | None = None, facts: Mapping[str, str] | None = None) -> None:
        """``resources``: answered until set anew."""
        self.resources = resources or Resources(cpu=120, memory=300_000_000, memory_total=1_000_000_000)
        self._facts = dict(facts or {"machine": "simulated"})

    def read(self, data_plane_pid: int | None) -> Resources:  # noqa: ARG002 - the port's signature
        return self.resources

    def facts(self) -> dict[str, str]:
        return dict(self._facts)


# ---------------------------------------------------------------- examples for tests and simulations
def example_manifest(
    model: str = "digits", version: int = 1, *, variant: str = "int8", classes: int = 10
) -> Manifest:
    """Return a manifest that passes its own checks."""
    return Manifest(
        model=model,
        version=version,
        variant=variant,
        inputs=(TensorSpec(name="image", dtype="INT8", shape=(-1, 8, 8, 1), scale=1 / 255, zero_point=-128),),
        outputs=(TensorSpec(name="scores", dtype="INT8", shape=(-1, classes), scale=1 / 256, zero_point=-128),),
        classes=tuple(str(k) for k in range(classes)),
        needs=Needs(memory=2_000_000),
        golden=Golden(samples=8, tolerance=1.0),
        members={"model.tflite": "a" * 64, "golden.npz": "b" * 64},
        task=Task.CLASSIFICATION,
    )


def example_digest(model: str, version: int) -> str:
    """Return a well-formed digest that tells model and version, for readable failures."""
    seed = f"{version}-{model}-".encode().hex()
    return (seed * 64)[:64]


def example_target(
    model: str = "digits",
    version: int = 1,
    *,
    attempt: int = 1,
    floor: int = 0,
    forced: bool = False,
    shadow: ShadowTerms | None = None,
) -> Target:
    """Return a target both repositories could have agreed on."""
    return Target(
        release=release_of(example_manifest(model, version)),
        assignment=Assignment(rollout="r-1", attempt=attempt, forced=forced, shadow=shadow),
        sha256=example_digest(model, version),
        length=1000,
        floor=floor,
    )


def example_desire(
    *targets: Target, director_version: int = 1, issued: int = 1_750_000_000_000, config: DeviceConfig | None = None
) -> VerifiedDesire:
    """Return a verified desired state of these targets."""
    return VerifiedDesire(
        director_version=director_version, issued=issued, targets=targets, config=config or DeviceConfig()
    )
