"""One simulated device: the agent's own reporter, windows and update machine on in-memory adapters.

What it says on the wire is what a real agent would say. What is made up stands in `simulator.traffic`, and here: a
bundle is never downloaded, a trial passes unless the script says otherwise, and a desired state is believed without a
signature, since nothing here is worth protecting. Everything runs on the thread that calls `step`.
"""

import logging
import queue
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from agent.adapters.mqtt import Ears, Words
from agent.channel import CANDIDATE, SelfTested, Serving, Shadow, ShadowDelta, Shadowing, TrialVerdict
from agent.core.deployment import running_model
from agent.core.health import HealthLimits
from agent.core.merging import merge_payloads
from agent.core.shadowing import ShadowCounts
from agent.core.windows import DEFAULT_LENGTH, Windows
from agent.desire import Desires
from agent.ports import DeviceFacts, Refusal, StoredModel, Target, TrustVersions, Uplink, VerifiedDesire
from agent.reporter import Reporter
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol import __version__
from protocol.codec import CODECS, BadMessage, decode_acknowledgement, decode_server_state, encode
from protocol.manifest import Golden, Manifest
from protocol.messages import Birth, DesiredState, Farewell, RunningModel, Will
from protocol.names import short_digest
from protocol.release import Assignment, DirectorScope, Release, from_custom
from protocol.states import RejectReason, RuntimeName
from simulator.memory import (
    DataPlaneCall,
    FakeDataPlane,
    FakeDownloads,
    FakeHost,
    InlineBackground,
    MemoryDeployments,
    MemorySpool,
    MemoryStore,
)
from simulator.traffic import Behaviour, Load, Traffic

log = logging.getLogger(__name__)


class Link(Uplink, Protocol):
    """An uplink with a life: `agent.adapters.mqtt.MqttUplink`, or one in memory."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def announce(self) -> None: ...


Connect = Callable[[Words, Ears], Link]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a simulated device is like."""

    load: Load = field(default_factory=Load)
    behaviour: Behaviour = field(default_factory=Behaviour)
    versions: Mapping[int, Behaviour] = field(default_factory=dict)  # where a version differs from that
    failing_versions: frozenset[int] = frozenset()  # that fail their trial
    window: int = DEFAULT_LENGTH  # ms
    probation: int = 60_000  # ms
    device_class: str = "simulated"
    memory: int = 10**9  # bytes


class SimulatedDevice:
    """A device that nobody can touch."""

    def __init__(
        self,
        *,
        device: str,
        scene: Scene,
        connect: Connect,
        now: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``connect`` makes the uplink from what it is to say and whom it is to tell; ``now`` gives UTC ms."""
        self.device = device
        self._scene = scene
        self._now = now
        self._boot = secrets.token_hex(8)
        self._facts = DeviceFacts(
            device_class=scene.device_class, runtimes=(RuntimeName.LITERT,), memory_total=scene.memory
        )
        self._turns: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._traffic = Traffic(device, scene.load)
        self._serving: dict[str, StoredModel] = {}
        self._candidates: dict[str, StoredModel] = {}
        self._shadows: dict[str, Shadow] = {}
        self._models: tuple[RunningModel, ...] = ()
        self._stepped = now()
        self._store = SimulatedStore()
        self._trust = BelievingTrust(device)
        self.spool = MemorySpool(secrets.token_hex(8), merge=merge_payloads)
        self._link = connect(self._words(), self._ears())
        self.reporter = Reporter(
            spool=self.spool,
            uplink=self._link,
            host=FakeHost(),
            windows=Windows(now(), scene.window),
            now=now,
            monotonic=monotonic,
        )
        background = InlineBackground(self._turns.put)
        chance = random.Random(device).random  # noqa: S311 - jitter of a simulation
        plane = FakeDataPlane(self._hear_order, on_shadow=self._hear_shadow, on_test=self._hear_test)
        self.verdicts = Verdicts(
            plane=plane, monotonic=monotonic, probation_ms=scene.probation, limits=HealthLimits()
        )
        self.updater = Updater(
            facts=self._facts,
            deployments=MemoryDeployments(),
            store=self._store,
            downloads=FakeDownloads(),
            trials=SimulatedTrials(scene.failing_versions),
            plane=plane,
            background=background,
            events=self.reporter,
            changed=self._announce,
            random=chance,
            monotonic=monotonic,
            verdicts=self.verdicts,
            calm=Calm(),
        )
        self._desires = Desires(
            trust=self._trust,
            background=background,
            events=self.reporter,
            verified=self._pursue,
            clock=now,
            random=chance,
        )

    def start(self) -> None:
        """Connect."""
        self.updater.start(self._now())
        self._link.start()

    def step(self) -> None:
        """Do what is due; call about once a second."""
        now = self._now()
        while not self._turns.empty():
            self._turns.get()()
        self._serve(now)
        self.updater.tick(now)
        self._desires.tick(now)
        self.reporter.tick(now)

    def stop(self) -> None:
        """Report the last window and say good-bye."""
        self.step()
        self.reporter.flush(self._now())
        self._link.stop()

    # ------------------------------------------------------------ the data plane
    def _serve(self, now: int) -> None:
        span, self._stepped = now - self._stepped, now
        for model, stored in self._serving.items():
            delta = self._traffic.during(span, now, short_digest(stored.digest), self._behaviour_of(stored))
            self.reporter.count(delta)
            self.verdicts.count(delta)
            if model in self._shadows and delta.models:
                self.verdicts.shadowed(self._compare(model, stored, delta.models[0].requests))

    def _behaviour_of(self, stored: StoredModel) -> Behaviour:
        return self._scene.versions.get(stored.manifest.version, self._scene.behaviour)

    def _compare(self, model: str, stored: StoredModel, requests: int) -> ShadowDelta:
        """Two classifiers agree about as often as the worse of them is right."""
        candidate = self._candidates[model]
        compared = round(requests * self._shadows[model].share)
        agreement = min(self._behaviour_of(stored).accuracy, self._behaviour_of(candidate).accuracy)
        counts = ShadowCounts(
            stable=stored.digest, candidate=candidate.digest, compared=compared, agreed=round(compared * agreement)
        )
        return ShadowDelta(model=model, counts=counts)

    def _hear_order(self, call: DataPlaneCall) -> None:
        self._shadows.pop(call.model, None)
        self._candidates.pop(call.model, None)
        if call.stored is None:
            if call.alias != CANDIDATE:
                self._serving.pop(call.model, None)
            return
        (self._candidates if call.alias == CANDIDATE else self._serving)[call.model] = call.stored
        answer = Serving(
            ticket=call.ticket,
            model=call.model,
            version=call.stored.manifest.version,
            digest=call.stored.digest,
            runtime=RuntimeName.LITERT,
            took_us=10_000,
            alias=call.alias,
        )
        self._turns.put(lambda: self.updater.plane_serves(answer, self._now()))

    def _hear_shadow(self, order: Shadow) -> None:
        self._shadows[order.model] = order
        digests = self._serving[order.model].digest, self._candidates[order.model].digest
        told = Shadowing(ticket=order.ticket, model=order.model, stable=digests[0], candidate=digests[1])
        self._turns.put(lambda: self.verdicts.shadowed(told))

    def _hear_test(self, ticket: int, model: str) -> None:
        digest = self._serving[model].digest if model in self._serving else ""
        answer = SelfTested(ticket=ticket, model=model, digest=digest, passed=True, detail="8 golden samples agree")
        self._turns.put(lambda: self.verdicts.tested(answer))

    # ------------------------------------------------------------ the desired state
    def _pursue(self, desire: VerifiedDesire) -> None:
        self._store.expect(desire)
        self.reporter.set_window(desire.config.window_seconds)
        self.updater.want(desire, self._now())
        self._announce()

    def _announce(self) -> None:
        self._models = tuple(running_model(record) for record in self.updater.records())
        self._link.announce()

    # ------------------------------------------------------------ the uplink
    def _ears(self) -> Ears:
        turn = self._turns.put
        return Ears(
            on_desired=lambda payload: turn(lambda: self._desires.arrived(payload, self._now())),
            on_acknowledgement=lambda payload: turn(lambda: self._hear_acknowledgement(payload)),
            on_server_state=lambda payload: turn(lambda: self._hear_server_state(payload)),
            on_connected=lambda _: turn(self.reporter.connected),
            on_disconnected=lambda reason: log.info("%s: %s", self.device, reason),
            on_published=lambda _stream, _number: turn(self.reporter.publish),
            on_unpublished=lambda _stream, _number, _why: None,
            on_trouble=lambda trouble: log.warning("%s: %s", self.device, trouble),
        )

    def _words(self) -> Words:
        return Words(
            birth=self._birth,
            will=lambda connection: encode(Will(boot=self._boot, connection=connection)),
            farewell=lambda connection: encode(Farewell(boot=self._boot, connection=connection, at=self._now())),
        )

    def _birth(self, connection: int) -> bytes:
        return encode(
            Birth(
                boot=self._boot,
                connection=connection,
                at=self._now(),
                agent=__version__,
                device_class=self._facts.device_class,
                runtimes=self._facts.runtimes,
                codecs=tuple(CODECS),
                spool=self.spool.id,
                director_version=self._trust.versions().director,
                models=self._models,
                facts={"machine": "simulated"},
            )
        )

    def _hear_acknowledgement(self, payload: bytes) -> None:
        try:
            self.reporter.acknowledge(decode_acknowledgement(payload))
        except BadMessage as error:
            log.warning("%s ignored an acknowledgement: %s", self.device, error)

    def _hear_server_state(self, payload: bytes) -> None:
        try:
            self.reporter.server_state(decode_server_state(payload))
        except BadMessage as error:
            log.warning("%s ignored a server state: %s", self.device, error)


class SimulatedStore(MemoryStore):
    """Holds the bundle of every target that was ever wanted, made from what is signed about it."""

    def expect(self, desire: VerifiedDesire) -> None:
        """Get to know the bundles of a desired state."""
        for target in desire.targets:
            self.manifests[target.sha256] = _manifest_of(target.release)


class SimulatedTrials:
    """`agent.ports.Trials`: fails the versions of the script."""

    def __init__(self, failing: frozenset[int]) -> None:
        """``failing``: versions of any model."""
        self._failing = failing

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:  # noqa: ARG002 - the port's signature
        if target.release.version in self._failing:
            detail = "the simulation's script says so"
            return TrialVerdict(passed=False, reason=RejectReason.SELFTEST_FAILED.value, detail=detail)
        return TrialVerdict(passed=True, runtime=RuntimeName.LITERT, latency_us=1000, golden=8)


class _TargetFile(msgspec.Struct):
    """What a simulated device reads of a TUF target."""

    length: int
    hashes: dict[str, str]
    custom: dict[str, msgspec.Raw]


class _Signed(msgspec.Struct):
    version: int
    targets: dict[str, _TargetFile]
    custom: DirectorScope


class _DirectorTargets(msgspec.Struct):
    signed: _Signed


class BelievingTrust:
    """`agent.ports.Trust` without verification: reads the Director's targets and believes them."""

    def __init__(self, device: str) -> None:
        """``device``: a desired state for another is refused all the same."""
        self._device = device
        self._director = 0

    def verify(self, message: DesiredState, now: int) -> VerifiedDesire:  # noqa: ARG002 - the port's signature
        try:
            signed = msgspec.json.decode(message.targets, type=_DirectorTargets).signed
            targets = tuple(_target(file) for file in signed.targets.values())
        except (msgspec.DecodeError, KeyError) as error:
            raise Refusal(RejectReason.MALFORMED, str(error)) from error
        if signed.custom.device != self._device:
            raise Refusal(RejectReason.WRONG_DEVICE, f"it is for {signed.custom.device}")
        if signed.version < self._director:
            raise Refusal(RejectReason.REPLAYED, f"{signed.version} is older than {self._director}")
        self._director = signed.version
        return VerifiedDesire(
            director_version=signed.version, issued=signed.custom.issued, targets=targets, config=signed.custom.config
        )

    def versions(self) -> TrustVersions:
        return TrustVersions(director=self._director)


def _target(file: _TargetFile) -> Target:
    return Target(
        release=from_custom(msgspec.json.decode(file.custom["release"])),
        assignment=msgspec.json.decode(file.custom["assignment"], type=Assignment),
        sha256=file.hashes["sha256"],
        length=file.length,
    )


def _manifest_of(release: Release) -> Manifest:
    return Manifest(
        model=release.model,
        version=release.version,
        variant=release.variant,
        title=release.title,
        task=release.task,
        inputs=release.inputs,
        outputs=release.outputs,
        needs=release.needs,
        golden=Golden(samples=8, tolerance=1.0),
        members={"model.tflite": "a" * 64, "golden.npz": "b" * 64},
    )
