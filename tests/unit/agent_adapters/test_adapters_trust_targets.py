"""What is said against one model and leaves the others alone: floors, yanks, and families that cannot be believed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf_world import DAY, NOW, Bundle, TufWorld, make_release, open_trust, said_of

from agent.adapters.trust import TufTrust
from agent.ports import Refusal, Weather
from protocol.states import RejectReason

METERS = ["models/meters/*"]
Spoil = Callable[[TufWorld, Bundle], None]


def gauge(version: int = 1) -> Bundle:
    return Bundle(make_release("gauge", version, family="meters"), f"gauge {version}".encode() * 30)


@pytest.fixture
def world() -> TufWorld:
    return TufWorld()


@pytest.fixture
def stored() -> set[str]:
    return set()


@pytest.fixture
def trust(world: TufWorld, tmp_path: Path, stored: set[str]) -> TufTrust:
    return open_trust(world, tmp_path, stored)


# ---------------------------------------------------------------- floors and yanks
@pytest.mark.parametrize("has", [False, True], ids=["not here yet", "stored and serving"])
def test_a_floor_above_one_model_stops_that_model_only(
    world: TufWorld, trust: TufTrust, stored: set[str], has: bool
) -> None:
    digits, gauges = world.publish("digits", 2), world.publish("gauges", 5)
    trust.verify(world.assign(digits, gauges), NOW)
    stored.update({digits.sha256} if has else ())
    world.raise_floor("digits", 3)

    desire = trust.verify(world.assign(digits, gauges), NOW)

    assert said_of(desire) == {"digits": RejectReason.BELOW_FLOOR, "gauges": None}
    assert {target.release.model: target.floor for target in desire.targets} == {"digits": 3, "gauges": 0}


@pytest.mark.parametrize("why", ["it confuses 3 and 8", "", True, 0], ids=repr)
def test_a_yanked_bundle_is_not_installed_anew(world: TufWorld, trust: TufTrust, why: object) -> None:
    bad, good = world.publish("digits", 2), world.publish("gauges", 5)
    world.yank(bad, why)

    assert said_of(trust.verify(world.assign(bad, good), NOW)) == {"digits": RejectReason.YANKED, "gauges": None}


def test_a_yanked_bundle_that_is_here_serves_on(world: TufWorld, trust: TufTrust, stored: set[str]) -> None:
    bundle = world.publish()
    stored.add(bundle.sha256)
    world.yank(bundle)

    assert said_of(trust.verify(world.assign(bundle), NOW)) == {"digits": None}


def test_a_yanked_bundle_that_is_here_no_longer_is_not_fetched_again(
    world: TufWorld, trust: TufTrust, stored: set[str], tmp_path: Path
) -> None:
    bundle = world.publish()
    stored.add(bundle.sha256)
    world.yank(bundle)
    message = world.assign(bundle)
    trust.verify(message, NOW)
    stored.clear()

    assert said_of(trust.verify(message, NOW)) == {"digits": RejectReason.YANKED}
    recalled = open_trust(world, tmp_path).recall(NOW)
    assert recalled is not None
    assert said_of(recalled.desire) == {"digits": RejectReason.YANKED}


# ---------------------------------------------------------------- families
def forged(world: TufWorld, bundle: Bundle) -> None:
    """The delegator no longer vouches for the key that signs."""
    world.delegate(bundle, paths=METERS, forged=True)


def expired(world: TufWorld, bundle: Bundle) -> None:
    world.delegate(bundle, paths=METERS, life=-DAY)


def unnamed(world: TufWorld, bundle: Bundle) -> None:
    del bundle
    world.delegate(paths=METERS)


def resigned_with_other_bytes(world: TufWorld, bundle: Bundle) -> None:
    """What a thief of the family's key can do: the honest Director still names the old bytes."""
    world.delegate(Bundle(bundle.release, b"evil"), paths=METERS)


FAMILY_FAULTS: list[tuple[Spoil, RejectReason]] = [
    (forged, RejectReason.BAD_SIGNATURE),
    (expired, RejectReason.EXPIRED),
    (unnamed, RejectReason.NOT_RELEASED),
    (resigned_with_other_bytes, RejectReason.DISAGREEMENT),
]
FAULTS = pytest.mark.parametrize(
    ("spoil", "reason"), FAMILY_FAULTS, ids=[spoil.__name__ for spoil, _ in FAMILY_FAULTS]
)


@FAULTS
def test_a_family_that_cannot_be_believed_stops_its_own_models_only(
    world: TufWorld, trust: TufTrust, tmp_path: Path, spoil: Spoil, reason: RejectReason
) -> None:
    digits, meter = world.publish("digits"), gauge()
    spoil(world, meter)

    desire = trust.verify(world.assign(digits, meter), NOW)

    assert said_of(desire) == {"digits": None, "gauge": reason}
    recalled = open_trust(world, tmp_path).recall(NOW)
    assert recalled is not None
    assert recalled.desire == desire


@FAULTS
def test_a_family_put_in_order_is_believed_when_the_same_desired_state_comes_again(
    world: TufWorld, trust: TufTrust, spoil: Spoil, reason: RejectReason
) -> None:
    meter = gauge()
    spoil(world, meter)
    message = world.assign(meter)
    assert said_of(trust.verify(message, NOW)) == {"gauge": reason}
    world.failure = Weather("the server did not answer")
    with pytest.raises(Weather):
        trust.verify(message, NOW)
    world.failure = None
    world.delegate(meter, paths=METERS, version=2)

    assert said_of(trust.verify(message, NOW)) == {"gauge": None}


def test_a_cached_role_whose_delegator_vouches_for_another_key_now_is_not_used(
    world: TufWorld, trust: TufTrust, tmp_path: Path
) -> None:
    """Version and bytes of the role are the cached ones; only the delegation has changed."""
    old_key = CryptoSigner.generate_ed25519()
    meter = gauge()
    world.delegate(meter, paths=METERS, key=old_key)
    assert said_of(trust.verify(world.assign(meter), NOW)) == {"gauge": None}
    signed_by_the_old_key = world.image.files["team.json"]
    world.delegate(meter, paths=METERS)
    world.image.files["team.json"] = signed_by_the_old_key

    assert said_of(trust.verify(world.assign(meter), NOW)) == {"gauge": RejectReason.BAD_SIGNATURE}
    assert '"team.json":"' not in (tmp_path / "trust" / "trust.json").read_text()


def test_a_cached_role_that_is_no_longer_delegated_to_is_forgotten(
    world: TufWorld, trust: TufTrust, tmp_path: Path
) -> None:
    meter = gauge()
    world.delegate(meter, paths=METERS)
    trust.verify(world.assign(meter), NOW)
    world.image.files.pop("team.json")
    world.image.rotate("snapshot")  # a new snapshot key may take names back
    digits = world.publish("digits")

    assert said_of(trust.verify(world.assign(digits), NOW)) == {"digits": None}
    assert '"team.json":"' not in (tmp_path / "trust" / "trust.json").read_text()
    with pytest.raises(Refusal) as refused:
        trust.verify(world.assign(meter), NOW)
    assert refused.value.reason is RejectReason.NOT_RELEASED


def test_an_expired_family_stands_in_no_rollbacks_way(world: TufWorld, tmp_path: Path) -> None:
    old, new, digits = gauge(1), gauge(2), world.publish("digits")
    key = CryptoSigner.generate_ed25519()
    world.delegate(old, new, paths=METERS, life=2 * DAY, key=key)
    trust = open_trust(world, tmp_path, {old.sha256})
    trust.verify(world.assign(new, digits), NOW)

    later = NOW + 3 * DAY
    assert said_of(trust.verify(world.assign(old, digits), later)) == {"digits": None, "gauge": None}
    assert said_of(trust.verify(world.assign(new, digits), later)) == {"digits": None, "gauge": RejectReason.EXPIRED}


def test_a_role_that_differs_from_the_servers_snapshot_is_no_familys_fault(world: TufWorld, trust: TufTrust) -> None:
    """Mix and match: the snapshot names version 2 of the role, the server sends version 1."""
    meter = gauge()
    key = CryptoSigner.generate_ed25519()
    world.delegate(meter, paths=METERS, key=key)
    old = world.image.files["team.json"]
    world.delegate(meter, paths=METERS, key=key, version=2)
    world.image.files["team.json"] = old

    with pytest.raises(Refusal) as refused:
        trust.verify(world.assign(meter), NOW)

    assert refused.value.reason is RejectReason.REPLAYED


# ---------------------------------------------------------------- what was agreed on before
def test_a_stored_bundle_that_is_released_no_longer_stops_itself_only(
    world: TufWorld, trust: TufTrust, stored: set[str]
) -> None:
    retired, other = world.publish("digits"), world.publish("gauges")
    stored.add(retired.sha256)
    trust.verify(world.assign(retired, other), NOW)
    del world.released[retired.path]
    world.sign_image()

    desire = trust.verify(world.assign(retired, other), NOW)

    assert said_of(desire) == {"digits": RejectReason.NOT_RELEASED, "gauges": None}
