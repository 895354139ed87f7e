"""A simulated device on an in-memory link: the agent's own core does the talking."""

from collections.abc import Callable, Iterable

import msgspec
import pytest

from agent.adapters.mqtt import Ears, Words
from agent.ports import EVENTS, TELEMETRY
from protocol.codec import decode_device_state, decode_event, decode_report, encode
from protocol.messages import Acknowledgement, Birth, DesiredState, Report, ServerState
from protocol.metrics import accuracy
from protocol.names import short_digest
from protocol.release import Assignment, DeviceConfig, DirectorScope, release_of, to_custom
from protocol.states import DeploymentState, EventKind, RejectReason
from protocol.statistics import merge_by_digest, merge_truth
from simulator.device import Scene, SimulatedDevice
from simulator.memory import MemoryUplink, example_digest, example_manifest
from simulator.traffic import Behaviour, Load, Traffic

NOON = 1_750_075_200_000


class MemoryLink(MemoryUplink):
    """An uplink to a broker that does not exist; the test is the server."""

    def __init__(self, words: Words, ears: Ears) -> None:
        super().__init__(connected=False, window=10**6)
        self.ears = ears
        self.words = words
        self.births: list[Birth] = []

    def start(self) -> None:
        self.connected = True
        self.announce()
        self.ears.on_connected(False)
        self.ears.on_server_state(encode(ServerState(up=True, epoch="e")))

    def announce(self) -> None:
        if self.connected:
            birth = decode_device_state(self.words.birth(1))
            assert isinstance(birth, Birth)
            self.births.append(birth)

    def stop(self) -> None:
        self.connected = False


class World:
    def __init__(self, scene: Scene) -> None:
        self.now = NOON
        links: list[MemoryLink] = []

        def connect(words: Words, ears: Ears) -> MemoryLink:
            links.append(MemoryLink(words, ears))
            return links[-1]

        self.device = SimulatedDevice(
            device="sim-1", scene=scene, connect=connect, now=lambda: self.now, monotonic=lambda: self.now / 1000
        )
        (self.link,) = links
        self.device.start()

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1000
            self.device.step()

    def want(self, number: int, *versions: int, attempt: int = 1, device: str = "sim-1", window: int = 60) -> None:
        payload = encode(desired(number, versions, attempt=attempt, device=device, window=window))
        self.link.ears.on_desired(payload)

    def reports(self) -> list[Report]:
        return [decode_report(payload) for stream, _, payload in self.link.published if stream == TELEMETRY]

    def states(self) -> list[DeploymentState | None]:
        events = [decode_event(payload) for stream, _, payload in self.link.published if stream == EVENTS]
        return [event.state for event in events if event.kind is EventKind.DEPLOYMENT]


def desired(
    number: int, versions: Iterable[int], *, attempt: int = 1, device: str = "sim-1", window: int = 60
) -> DesiredState:
    """Return Director metadata as the server makes it; the signature is not looked at here."""
    targets = {
        f"models/main/digits-{version}-int8.ewb": {
            "length": 1000,
            "hashes": {"sha256": example_digest("digits", version)},
            "custom": {
                "release": to_custom(release_of(example_manifest("digits", version))),
                "assignment": msgspec.to_builtins(Assignment(rollout="r", attempt=attempt)),
            },
        }
        for version in versions
    }
    scope = DirectorScope(device=device, issued=NOON, config=DeviceConfig(window_seconds=window))
    signed = {"_type": "targets", "version": number, "targets": targets, "custom": msgspec.to_builtins(scope)}
    return DesiredState(
        timestamp=b"", snapshot=b"", targets=msgspec.json.encode({"signed": signed, "signatures": []})
    )


SCENE = Scene(load=Load(requests_per_second=5, labelled=0.5), probation=10_000, failing_versions=frozenset({9}))


def test_a_device_says_what_it_is_and_gives_signs_of_life() -> None:
    world = World(SCENE)
    world.run(61)
    assert ("simulated", ()) == (world.link.births[0].device_class, world.link.births[0].models)
    (report,) = world.reports()
    assert ((), world.device.spool.id) == (report.windows[0].models, report.spool)


def test_a_wanted_model_goes_through_the_agents_own_machine_and_serves() -> None:
    world = World(SCENE)
    world.want(1, 1)
    world.run(30)
    assert DeploymentState.PROBATION in world.states()
    assert DeploymentState.COMMITTED is world.states()[-1]
    (model,) = world.link.births[-1].models
    assert ("digits", 1, DeploymentState.COMMITTED) == (model.model, model.version, model.state)
    assert example_digest("digits", 1) == model.digest
    world.run(60)
    served = merge_by_digest(m for r in world.reports() for w in r.windows for m in w.models)
    assert [short_digest(example_digest("digits", 1))] == [m.digest for m in served]
    assert served[0].requests > 100


def test_a_version_that_fails_its_trial_leaves_the_old_one_serving() -> None:
    world = World(SCENE)
    world.want(1, 1)
    world.run(30)
    world.want(2, 9)
    world.run(30)
    (model,) = world.link.births[-1].models
    assert (1, RejectReason.SELFTEST_FAILED) == (model.version, model.reason)


def test_a_desired_state_for_another_device_is_refused() -> None:
    world = World(SCENE)
    world.want(1, 1, device="sim-2")
    world.run(5)
    assert () == world.link.births[-1].models
    ((_, _, payload),) = [record for record in world.link.published if record[0] == EVENTS]
    event = decode_event(payload)
    assert (EventKind.REFUSED, RejectReason.WRONG_DEVICE) == (event.kind, event.reason)


def test_the_fleet_sets_the_window() -> None:
    world = World(SCENE)
    world.want(1, 1, window=2)
    world.run(21)
    assert 9 <= len(world.reports()) <= 11


def test_acknowledged_records_leave_the_spool() -> None:
    world = World(SCENE)
    world.run(125)
    world.link.ears.on_acknowledgement(encode(Acknowledgement(spool=world.device.spool.id, at=NOON, telemetry=2)))
    world.run(1)
    assert 0 == world.device.spool.depth(TELEMETRY)


def test_nonsense_from_the_server_is_survived() -> None:
    world = World(SCENE)
    for ear in ("on_acknowledgement", "on_server_state", "on_desired"):
        tell: Callable[[bytes], None] = getattr(world.link.ears, ear)
        tell(b"\x07 nonsense")
    world.run(61)
    assert 1 == len(world.reports())


# ---------------------------------------------------------------- traffic
def served(seed: str, behaviour: Behaviour, load: Load, seconds: int = 300) -> tuple[object, ...]:
    traffic = Traffic(seed, load)
    deltas = [traffic.during(1000, NOON + second * 1000, "d", behaviour) for second in range(seconds)]
    (model,) = merge_by_digest(m for delta in deltas for m in delta.models)
    return model, merge_truth(t for delta in deltas for t in delta.truth)


def test_the_same_seed_is_the_same_traffic() -> None:
    load, behaviour = Load(requests_per_second=3.7), Behaviour()
    assert served("a", behaviour, load, 20) == served("a", behaviour, load, 20)
    assert served("a", behaviour, load, 20) != served("b", behaviour, load, 20)


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_traffic_is_as_good_and_as_fast_as_it_was_told_to_be(share: float) -> None:
    behaviour = Behaviour(accuracy=share, latency_us=5000, errors=0.1, confidence=0.8)
    model, truth = served("a", behaviour, Load(requests_per_second=20.5, labelled=1.0))
    assert model.requests == 6150
    assert model.errors == pytest.approx(615, rel=0.15)
    assert model.latency.count == model.requests - model.errors == sum(model.classes)
    assert model.latency.quantile(0.5) == pytest.approx(5000, rel=0.1)
    right = accuracy(cell for t in truth for cell in t.confusion)
    assert right.n == model.latency.count
    assert right.value == pytest.approx(share, abs=0.03)


def test_truth_belongs_to_its_minute() -> None:
    _, truth = served("a", Behaviour(), Load(requests_per_second=5, labelled=1.0), 180)
    assert [NOON, NOON + 60_000, NOON + 120_000] == [t.minute for t in truth]
