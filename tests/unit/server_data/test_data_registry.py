"""Devices, tokens, bundles and desires, on both databases."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from data_world import NOW, birth, bundle, desire, enrol, event
from sqlalchemy.engine import Engine

from fleet_server.adapters.database.registry import (
    DatabaseDesiredStates,
    DatabaseRegistry,
    DatabaseReleases,
    StaleDesire,
)
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.enrolment import DeviceExists, TokenRefused
from fleet_server.ports import Batch, DeploymentRecord, Device, TokenRecord
from protocol.states import DeploymentState, PresenceState


@pytest.fixture
def engine(opened: Engine) -> Engine:
    return opened


def registry_of(engine: Engine, now: int = NOW) -> DatabaseRegistry:
    return DatabaseRegistry(engine, clock=lambda: now)


def token(uses: int = 1) -> TokenRecord:
    return TokenRecord(id="t1", secret_sha256="h", labels={"site": "oslo"}, uses_left=uses, expires_at=NOW + 1000)


# ---------------------------------------------------------------- tokens
def test_a_token_with_three_uses_lets_exactly_three_in_however_many_try_at_once(engine: Engine) -> None:
    registry = registry_of(engine)
    registry.add_token(token(uses=3))

    def attempt(_: int) -> bool:
        try:
            return registry.redeem_token("t1", "h", NOW).labels == {"site": "oslo"}
        except TokenRefused:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(24))) == 3


@pytest.mark.parametrize(
    ("token_id", "secret", "now", "words"),
    [
        ("t2", "h", NOW, "unknown"),
        ("t1", "wrong", NOW, "unknown"),
        ("t1", "h", NOW + 1000, "expired"),
    ],
)
def test_a_bad_token_is_refused_and_loses_no_use(
    engine: Engine, token_id: str, secret: str, now: int, words: str
) -> None:
    registry = registry_of(engine)
    registry.add_token(token())
    with pytest.raises(TokenRefused, match=words):
        registry.redeem_token(token_id, secret, now)
    assert registry.redeem_token("t1", "h", NOW).id == "t1"


# ---------------------------------------------------------------- devices
def test_a_device_comes_back_as_it_was_added_and_only_once(engine: Engine) -> None:
    registry = registry_of(engine)
    device = Device(id="cam-1", labels={"a": "b"}, certificate="PEM", enrolled_at=NOW)
    registry.add_device(device)
    assert (registry.device("cam-1"), registry.device("cam-2"), registry.devices()) == (device, None, [device])
    with pytest.raises(DeviceExists):
        registry.add_device(device)


def test_presence_is_derived_at_the_moment_of_asking(engine: Engine) -> None:
    enrol(engine, "cam-1")
    DatabaseTelemetry(engine).store(Batch(states=[("cam-1", birth(4))], received_at=NOW))
    seen = [registry_of(engine, NOW + passed).presence("cam-1").state for passed in (0, 181_000)]
    assert seen == [PresenceState.ONLINE, PresenceState.STALE]
    known = registry_of(engine).presence("cam-1")
    assert (known.connected, known.birth, known.last_seen) == (True, birth(4), NOW)
    assert registry_of(engine).presence("nobody").state == PresenceState.NEW


# ---------------------------------------------------------------- bundles and desires
def test_adding_a_bundle_again_changes_nothing(engine: Engine) -> None:
    releases = DatabaseReleases(engine)
    releases.add_bundles([bundle(2), bundle(1)])
    releases.add_bundles([bundle(1), bundle(1, model="faces")])
    assert releases.bundles("digits") == [bundle(1), bundle(2)]
    assert releases.bundles() == [bundle(1), bundle(2), bundle(1, model="faces")]


def test_a_desire_comes_back_as_signed_and_only_a_newer_one_replaces_it(engine: Engine) -> None:
    enrol(engine, "cam-1")
    desired = DatabaseDesiredStates(engine)
    desired.save_desired(desire("cam-1", 3, bundle(1)))
    for version in (2, 3):
        with pytest.raises(StaleDesire):
            desired.save_desired(desire("cam-1", version))
    assert desired.desired("cam-1") == desire("cam-1", 3, bundle(1))
    assert desired.desired("cam-2") is None


def test_expiring_desires_come_soonest_first(engine: Engine) -> None:
    enrol(engine, "a", "b", "c")
    desired = DatabaseDesiredStates(engine)
    for name, version in (("a", 30), ("b", 10), ("c", 99)):
        desired.save_desired(desire(name, version))
    assert [d.device for d in desired.expiring(NOW + 50)] == ["b", "a"]


def test_the_highest_attempt_is_remembered_after_the_assignment_is_gone(engine: Engine) -> None:
    enrol(engine, "cam-1")
    desired = DatabaseDesiredStates(engine)
    desired.save_desired(desire("cam-1", 1, bundle(1), attempt=2))
    desired.save_desired(desire("cam-1", 2, bundle(2)))
    desired.save_desired(desire("cam-1", 3, bundle(1), attempt=1))
    assert [desired.highest_attempt("cam-1", bundle(n).sha256) for n in (1, 2, 3)] == [2, 1, 0]


def test_an_order_is_kept(engine: Engine) -> None:
    order = DeploymentRecord(id="o1", kind="deploy", model="digits", by="admin", at=NOW, targets={"cam-1": 2})
    desired = DatabaseDesiredStates(engine)
    desired.add_deployment(order)
    assert (desired.deployment("o1"), desired.deployment("o2")) == (order, None)


def test_committed_versions_come_in_the_order_of_happening_not_of_arrival(engine: Engine) -> None:
    enrol(engine, "cam-1")
    events = [
        event(1, spool="old", version=1),
        event(7, version=3),
        event(3, version=2),  # was missing, came later
        event(5, version=9, state=DeploymentState.FAILED),
        event(6, version=9, model="faces"),
    ]
    DatabaseTelemetry(engine).store(Batch(events=[("cam-1", e) for e in events], received_at=NOW))
    assert DatabaseDesiredStates(engine).committed_versions("cam-1", "digits") == [1, 2, 3]
