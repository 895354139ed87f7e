"""Which deltas an order signs into a device's assignment."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import pytest
from trust_world import World, birth, now_ms, source
from tuf.api.metadata import Metadata, Targets

from fleet_server.api_types import DeployRequest
from fleet_server.ports import Assigned, NoDeltas
from protocol.messages import Birth, RunningModel
from protocol.release import BSDIFF, NO_BASE, ZSTD, Assignment, Delta
from protocol.states import DeploymentState


@dataclass
class Prepared(NoDeltas):
    """`ports.Deltas` that has one delta from every base it was told of."""

    ready: dict[str, Delta] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    waited: float = 0.0

    def prepare(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.asked += pairs

    def settle(self, patience: float) -> bool:
        self.waited = patience
        return False

    def offer(self, base: str, target: str, methods: Collection[str]) -> Delta | None:
        delta = self.ready.get(base)
        return delta if delta and delta.method in methods else None


def digest_of_version(world: World, version: int) -> str:
    (bundle,) = [b for b in world.releases.bundles("digits") if b.release.version == version]
    return bundle.sha256


@pytest.fixture
def fleet(ready: World) -> World:
    ready.registry.put("a")
    for content in (b"one", b"two"):
        ready.publish(source(content=content))
    return ready


def serving(digest: str | None, **facts: str) -> Birth:
    model = RunningModel(model="digits", state=DeploymentState.COMMITTED, version=1, digest=digest)
    return msgspec.structs.replace(birth(), models=(model,), facts=facts)


def order(world: World, deltas: Prepared) -> Assignment:
    rollouts = replace(world.rollouts, deltas=deltas)
    rollouts.deploy(DeployRequest(model="digits", version=2, all=True), "ann", now_ms())
    signed = Metadata[Targets].from_bytes(world.desired.current["a"].targets).signed
    (target,) = signed.targets.values()
    return msgspec.convert(target.unrecognized_fields["custom"]["assignment"], Assignment)


def delta(method: str) -> Delta:
    return Delta(method=method, length=10, sha256="d" * 64)


def test_what_is_ready_for_what_the_device_serves_and_can_apply_is_signed(fleet: World) -> None:
    old, new = digest_of_version(fleet, 1), digest_of_version(fleet, 2)
    fleet.registry.births["a"] = serving(old, deltas="zstd bsdiff")
    deltas = Prepared(ready={old: delta(BSDIFF), NO_BASE: delta(ZSTD), "e" * 64: delta(ZSTD)})

    assert {old: delta(BSDIFF), NO_BASE: delta(ZSTD)} == order(fleet, deltas).deltas
    assert [(old, new), (NO_BASE, new)] == deltas.asked
    assert 0 < deltas.waited <= 5


NONE: list[tuple[str, Birth | None, dict[str, str]]] = [
    ("a device that was never seen", None, {NO_BASE: ZSTD}),
    ("a device without decoders", serving(None), {NO_BASE: ZSTD}),
    ("a device that knows other methods", serving(None, deltas="bsdiff"), {NO_BASE: ZSTD}),
    ("nothing is ready", serving("f" * 64, deltas="zstd bsdiff"), {}),
]


@pytest.mark.parametrize(("seen", "offers"), [row[1:] for row in NONE], ids=[row[0] for row in NONE])
def test_an_order_without_deltas_is_as_it_always_was(
    fleet: World, seen: Birth | None, offers: dict[str, str]
) -> None:
    if seen:
        fleet.registry.births["a"] = seen
    deltas = Prepared(ready={base: delta(method) for base, method in offers.items()})

    assert Assignment(rollout="order-1") == order(fleet, deltas)
    assert b'"deltas"' not in fleet.desired.current["a"].targets


def test_an_assignment_with_deltas_is_read_back_as_it_was_stored(fleet: World) -> None:
    old = digest_of_version(fleet, 1)
    fleet.registry.births["a"] = serving(old, deltas="bsdiff")
    order(fleet, Prepared(ready={old: delta(BSDIFF)}))
    assigned = fleet.desired.current["a"].assigned
    assert {old} == set(assigned[0].assignment.deltas)
    assert assigned == msgspec.json.decode(msgspec.json.encode(assigned), type=tuple[Assigned, ...])
