"""Orders: who gets what, with which number and attempt, and who is left out and why."""

import msgspec
import pytest
from trust_world import DAY, World, birth, now_ms, source
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from fleet_server.api_types import DeploymentView, DeployRequest, RollbackRequest
from fleet_server.ports import SignedDesire
from fleet_server.rollouts import BadOrder
from protocol.messages import RunningModel
from protocol.states import DeploymentState, RuntimeName


@pytest.fixture
def fleet(ready: World) -> World:
    """Devices a and b; digits 1, 2 and 3; wake 1."""
    ready.registry.put("a", "b")
    for content in (b"one", b"two", b"three"):
        ready.publish(source(content=content))
    ready.publish(source("wake"))
    return ready


def deploy(world: World, version: int = 1, model: str = "digits", **changes: object) -> DeploymentView:
    request = DeployRequest(model=model, version=version)
    if "devices" not in changes:
        changes = {"all": True, **changes}
    return world.rollouts.deploy(msgspec.structs.replace(request, **changes), "ann", now_ms())


def rollback(world: World, **changes: object) -> DeploymentView:
    request = msgspec.structs.replace(RollbackRequest(model="digits", all=True), **changes)
    return world.rollouts.rollback(request, "ann", now_ms())


def wanted(world: World, device: str) -> dict[str, tuple[int, int]]:
    """model -> (version, attempt)."""
    return {
        a.bundle.release.model: (a.bundle.release.version, a.assignment.attempt)
        for a in world.desired.current[device].assigned
    }


def test_an_order_reaches_the_devices_it_names_and_is_recorded(fleet: World) -> None:
    view = deploy(fleet, 2, devices=("b", "b"))
    assert view == DeploymentView(id="order-1", kind="deploy", model="digits", targets={"b": 2})
    assert [(d.id, d.by, d.targets) for d in fleet.desired.deployments] == [("order-1", "ann", {"b": 2})]
    assert list(fleet.uplink.retained) == ["b"]


def test_a_desired_state_is_always_the_full_one(fleet: World) -> None:
    deploy(fleet, 1)
    deploy(fleet, 1, "wake")
    deploy(fleet, 3)
    assert wanted(fleet, "a") == {"digits": (3, 1), "wake": (1, 1)}


def test_a_bundle_that_was_ordered_before_gets_the_next_attempt(fleet: World) -> None:
    attempts = []
    for version in (1, 2, 2, 1, 2):
        deploy(fleet, version)
        attempts.append(wanted(fleet, "a")["digits"])
    assert attempts == [(1, 1), (2, 1), (2, 2), (1, 2), (2, 3)]


def test_a_restored_server_goes_above_the_attempt_and_the_number_that_the_device_reports(fleet: World) -> None:
    failed = RunningModel(model="digits", state=DeploymentState.FAILED, attempt=4)
    fleet.registry.births["a"] = birth(director_version=41, models=(failed,))
    deploy(fleet, 1)
    assert fleet.desired.current["a"].version == 42
    assert wanted(fleet, "a")["digits"] == (1, 5)


def test_all_three_roles_carry_one_number_that_only_grows(fleet: World) -> None:
    for number in (1, 2):
        deploy(fleet, number)
        desire = fleet.desired.current["a"]
        versions = [
            Metadata[Timestamp].from_bytes(desire.timestamp).signed.version,
            Metadata[Timestamp].from_bytes(desire.timestamp).signed.snapshot_meta.version,
            Metadata[Snapshot].from_bytes(desire.snapshot).signed.version,
            Metadata[Targets].from_bytes(desire.targets).signed.version,
            desire.version,
        ]
        assert versions == [number] * 5


BAD_ORDERS = [
    ("nobody chosen", {"devices": (), "all": False}, "name the devices"),
    ("both ways at once", {"devices": ("a",), "all": True}, "not both"),
    ("unknown devices", {"devices": ("a", "zz", "yy")}, "no such device: yy, zz"),
    ("unknown model", {"model": "nope"}, "no version of model 'nope'"),
    ("unknown version", {"version": 9}, "has no version 9; published are 1, 2, 3"),
    ("unknown variant", {"variant": "fp64"}, "no variant 'fp64'; published are int8"),
]


@pytest.mark.parametrize(("changes", "reason"), [c[1:] for c in BAD_ORDERS], ids=[c[0] for c in BAD_ORDERS])
def test_an_order_that_cannot_be_carried_out_changes_nothing(
    fleet: World, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(BadOrder, match=reason):
        deploy(fleet, **changes)
    assert (fleet.desired.deployments, fleet.desired.current) == ([], {})


def test_orders_wait_for_the_trust_roots(world: World) -> None:
    world.registry.put("a")
    with pytest.raises(BadOrder):
        deploy(world)


def test_a_revoked_device_is_left_out_with_the_reason(fleet: World) -> None:
    fleet.registry.revoke("a")
    view = deploy(fleet)
    assert (view.targets, view.skipped) == ({"b": 1}, {"a": "the device is revoked"})


def test_each_device_gets_the_first_variant_that_fits_its_birth(fleet: World) -> None:
    needs = source().manifest.needs
    fleet.publish(
        source("multi", content=b"l"),
        source(
            "multi",
            variant="tf",
            needs=msgspec.structs.replace(needs, runtimes=(RuntimeName.TFLITE_RUNTIME,), device_classes=("pi",)),
        ),
    )
    fleet.registry.put("pi", "odd")
    fleet.registry.births["pi"] = birth(runtimes=(RuntimeName.TFLITE_RUNTIME,), device_class="pi")
    fleet.registry.births["odd"] = birth(runtimes=(RuntimeName.TFLITE_RUNTIME,), device_class="x86_64")
    view = deploy(fleet, 1, "multi")
    variants = {d: fleet.desired.current[d].assigned[0].bundle.release.variant for d in view.targets}
    assert variants == {"a": "int8", "b": "int8", "pi": "tf"}
    assert view.skipped == {"odd": "no variant fits the runtimes and class that the device reports"}


# ---------------------------------------------------------------- rollback
def test_a_rollback_takes_each_device_to_what_it_committed_before(fleet: World) -> None:
    fleet.desired.committed = {("a", "digits"): [1, 2], ("b", "digits"): [2]}
    deploy(fleet, 3)
    view = rollback(fleet)
    assert (view.kind, view.targets) == ("rollback", {"a": 2, "b": 2})
    fleet.desired.committed[("a", "digits")] = [1, 2, 2]
    view = rollback(fleet)
    assert view.targets == {"a": 1}
    assert view.skipped == {"b": "no earlier version of digits was committed here"}


def test_a_rollback_to_a_number_goes_there(fleet: World) -> None:
    deploy(fleet, 3)
    before = fleet.desired.current["a"].version
    assert rollback(fleet, to=1).targets == {"a": 1, "b": 1}
    assert fleet.desired.current["a"].version == before + 1
    with pytest.raises(BadOrder, match="has no version 7"):
        rollback(fleet, to=7)
    with pytest.raises(BadOrder, match="no version of model"):
        rollback(fleet, model="nope")


def test_a_committed_version_that_is_not_published_is_no_target(fleet: World) -> None:
    fleet.desired.committed = {("a", "digits"): [7], ("b", "digits"): [2]}
    deploy(fleet, 3)
    assert rollback(fleet).skipped == {"a": "version 7 of digits is not published"}


# ---------------------------------------------------------------- renewal and republishing
def age(desire: SignedDesire, world: World) -> int:
    return world.desired.current[desire.device].version - desire.version


def test_desired_states_are_signed_again_at_half_of_their_life_with_the_same_contents(fleet: World) -> None:
    deploy(fleet, 2)
    before = dict(fleet.desired.current)
    fleet.registry.revoke("b")
    assert fleet.rollouts.renew(now_ms() + 3 * DAY) == 0
    assert fleet.rollouts.renew(now_ms() + 4 * DAY) == 1
    assert {d: age(desire, fleet) for d, desire in before.items()} == {"a": 1, "b": 0}
    assert fleet.desired.current["a"].assigned == before["a"].assigned
    assert fleet.uplink.retained["a"].targets == fleet.desired.current["a"].targets


def test_after_a_broker_start_everything_is_published_again_except_to_the_revoked(fleet: World) -> None:
    deploy(fleet)
    fleet.registry.put("new")
    fleet.registry.revoke("b")
    fleet.uplink.published.clear()
    fleet.rollouts.republish_all()
    assert fleet.uplink.published == ["a"]


def test_a_device_that_comes_back_is_told_again_or_told_something_newer_than_it_has_seen(fleet: World) -> None:
    deploy(fleet, 2)
    fleet.registry.revoke("b")
    cases = {"it missed the last": (0, 1), "it has seen more than the server knows": (41, 42)}
    for name, (seen, version) in cases.items():
        fleet.registry.births["a"] = birth(director_version=seen)
        fleet.uplink.published.clear()
        for device in ("a", "b", "stranger"):
            fleet.rollouts.answer_birth(device, birth(director_version=seen), now_ms())
        assert (fleet.uplink.published, fleet.desired.current["a"].version) == (["a"], version), name
    assert wanted(fleet, "a") == {"digits": (2, 1)}
