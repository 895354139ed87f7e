"""The attacks of the TUF and Uptane papers by name, against a device that has accepted two good desired states."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from device_pki import Authority
from https_server import Book, Request, https_server
from securesystemslib.signer import CryptoSigner
from tuf_world import DAY, NOW, Bundle, TufWorld, make_release, open_trust, said_of

from agent.adapters.device_api import HttpsMetadata
from agent.adapters.https import HttpsServer
from agent.adapters.identity import context_for
from agent.adapters.trust import TufTrust
from agent.ports import Refusal, Weather
from protocol.messages import DesiredState
from protocol.states import RejectReason

YEARS = 3653 * DAY  # ten of them
HUGE = 2**31 - 1


@dataclass(frozen=True)
class Attack:
    """What arrives on ``down/want``, when by the device's clock, and what it is refused as."""

    name: str
    message: Callable[[TufWorld], DesiredState]
    reason: RejectReason
    now: int = NOW


def arbitrary_bundle(world: TufWorld) -> DesiredState:
    return world.assign(Bundle(make_release(version=9), b"evil"), wrong_key="targets")


def nothing_new(world: TufWorld) -> DesiredState:
    """The newest genuine message, held back until its life was over."""
    return world.assign(world.publish(version=2))


def frozen_image(world: TufWorld) -> DesiredState:
    bundle = world.publish(version=2)
    world.image.now = NOW - 100 * DAY
    world.sign_image()
    return world.assign(bundle)


def older_director(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), version=world.director_version - 1)


def older_image(world: TufWorld) -> DesiredState:
    world.image.files = world.image.history[0]
    return world.assign(Bundle(make_release(version=1), b"digits 1" * 40))


def fast_forward_without_the_key(world: TufWorld) -> DesiredState:
    return world.assign(version=HUGE, wrong_key="timestamp")


def back_from_a_fast_forward(world: TufWorld) -> DesiredState:
    """Versions that only a new root may begin anew begin anew under the old one."""
    return world.assign(version=1)


def mixed_director(world: TufWorld) -> DesiredState:
    older = world.director.history[-1]
    newest = world.assign(world.publish(version=2))
    return DesiredState(timestamp=newest.timestamp, snapshot=newest.snapshot, targets=older["targets.json"])


def mixed_image(world: TufWorld) -> DesiredState:
    older = world.image.files["targets.json"]
    message = world.assign(world.publish(version=2))
    world.image.files["targets.json"] = older
    return message


def stolen_director_names_what_nobody_released(world: TufWorld) -> DesiredState:
    return world.assign(Bundle(make_release(version=9), b"evil"))


def stolen_director_changes_what_was_released(world: TufWorld) -> DesiredState:
    genuine = world.publish(version=2)
    return world.assign(Bundle(genuine.release, b"evil"))


def one_of_two_release_keys(world: TufWorld) -> DesiredState:
    """The thief also has the server: snapshot and timestamp are properly signed."""
    evil = Bundle(make_release(version=9), b"evil")
    world.released[evil.path] = evil.target()
    world.sign_image(stolen={"targets": world.image.keys["targets"]})
    return world.assign(evil)


def one_release_key_twice(world: TufWorld) -> DesiredState:
    evil = Bundle(make_release(version=9), b"evil")
    world.released[evil.path] = evil.target()
    second = world.image.seconds.pop("targets")
    world.image.seconds["targets"] = world.image.keys["targets"]
    world.sign_image()
    world.image.seconds["targets"] = second
    return world.assign(evil)


def wrong_devices_director(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), device="cam-8")


def wrong_devices_empty_list(world: TufWorld) -> DesiredState:
    return world.assign(device="cam-8")


def empty_list_of_long_ago(world: TufWorld) -> DesiredState:
    """It was genuine, for this device, before anything was assigned to it."""
    first = world.director.history[0]
    return DesiredState(
        timestamp=first["timestamp.json"], snapshot=first["snapshot.json"], targets=first["targets.json"]
    )


def one_model_by_two_bundles(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), world.publish(version=3))


def stale_by_the_signed_time(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), life=-DAY, issued=NOW - 8 * DAY)


R = RejectReason
ATTACKS = [
    Attack("arbitrary bundle", arbitrary_bundle, R.BAD_SIGNATURE),
    Attack("freeze of the Director", nothing_new, R.EXPIRED, now=NOW + 8 * DAY),
    Attack("freeze of the Image repository", frozen_image, R.EXPIRED),
    Attack("rollback of the Director", older_director, R.REPLAYED),
    Attack("rollback of the Image repository", older_image, R.REPLAYED),
    Attack("fast-forward without the key", fast_forward_without_the_key, R.BAD_SIGNATURE),
    Attack("versions begin anew under the same root", back_from_a_fast_forward, R.REPLAYED),
    Attack("mix and match in the Director", mixed_director, R.REPLAYED),
    Attack("mix and match in the Image repository", mixed_image, R.REPLAYED),
    Attack("Director keys stolen: an unreleased bundle", stolen_director_names_what_nobody_released, R.NOT_RELEASED),
    Attack("Director keys stolen: a changed bundle", stolen_director_changes_what_was_released, R.DISAGREEMENT),
    Attack("one of two Image targets keys stolen", one_of_two_release_keys, R.BAD_SIGNATURE),
    Attack("one Image targets key signs twice", one_release_key_twice, R.BAD_SIGNATURE),
    Attack("wrong device's Director", wrong_devices_director, R.WRONG_DEVICE),
    Attack("wrong device's empty Director", wrong_devices_empty_list, R.WRONG_DEVICE),
    Attack("empty Director replayed", empty_list_of_long_ago, R.REPLAYED),
    Attack("duplicate ids", one_model_by_two_bundles, R.MALFORMED),
    Attack("clock ten years back", stale_by_the_signed_time, R.EXPIRED, now=NOW - YEARS),
    Attack("clock ten years ahead", nothing_new, R.EXPIRED, now=NOW + YEARS),
]


@pytest.fixture
def world() -> TufWorld:
    world = TufWorld()
    world.image.seconds["targets"] = CryptoSigner.generate_ed25519()
    world.image.roots.clear()
    world.image.root_version = 0
    world.image.sign_root()
    return world


@pytest.fixture
def trust(world: TufWorld, tmp_path: Path) -> TufTrust:
    """A device that was given an empty list, then one model."""
    trust = open_trust(world, tmp_path)
    trust.verify(world.assign(), NOW)
    world.publish("another")
    trust.verify(world.assign(world.publish()), NOW)
    return trust


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder, folder / "trust") for path in path.glob("trust*.json")}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_refused_by_name_and_leaves_no_trace(
    world: TufWorld, trust: TufTrust, tmp_path: Path, attack: Attack
) -> None:
    before = on_disk(tmp_path)
    message = attack.message(world)

    with pytest.raises(Refusal) as refused:
        trust.verify(message, attack.now)

    assert refused.value.reason is attack.reason, refused.value
    assert on_disk(tmp_path) == before
    assert len(before) == 2


# ---------------------------------------------------------------- attacks that concern one model, or that end well
def test_a_floor_violation_is_objected_to_by_name(world: TufWorld, trust: TufTrust) -> None:
    old = world.publish(version=2)
    world.raise_floor("digits", 3)

    assert said_of(trust.verify(world.assign(old), NOW)) == {"digits": R.BELOW_FLOOR}


def test_a_clock_ten_years_ahead_leaves_nothing_behind(world: TufWorld, trust: TufTrust) -> None:
    message = world.assign(world.publish(version=2))
    with pytest.raises(Refusal):
        trust.verify(message, NOW + YEARS)

    assert trust.clock_floor == NOW
    assert said_of(trust.verify(message, NOW)) == {"digits": None}


def test_a_clock_ten_years_back_stops_no_genuine_message(world: TufWorld, trust: TufTrust) -> None:
    assert said_of(trust.verify(world.assign(world.publish(version=2)), NOW - YEARS)) == {"digits": None}


def test_a_fast_forward_by_stolen_keys_ends_with_the_root_that_replaces_them(
    world: TufWorld, trust: TufTrust, tmp_path: Path
) -> None:
    honest = world.director_version
    trust.verify(world.assign(version=HUGE), NOW)
    root = world.director.rotate("targets", "snapshot", "timestamp")

    desire = trust.verify(world.assign(world.publish(version=2), version=honest + 1, root=[root]), NOW)

    assert (desire.director_version, trust.versions().director) == (honest + 1, honest + 1)
    assert open_trust(world, tmp_path).recall(NOW) is not None


# ---------------------------------------------------------------- a server that never stops, or never gets on
@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server(authority: Authority, tmp_path: Path) -> Iterator[Book]:
    with https_server(authority.server_tls(tmp_path)) as book:
        yield book


@pytest.fixture
def fetching(
    world: TufWorld, trust: TufTrust, server: Book, authority: Authority, tmp_path: Path
) -> Iterator[TufTrust]:
    """The same device after a restart, with the Image repository behind real HTTPS."""
    del trust
    context = context_for(authority.pem)
    https = HttpsServer(server.url, tls=lambda: context, read_timeout=0.5)
    yield open_trust(world, tmp_path, image=HttpsMetadata(https).image)
    https.close()


def endless(request: Request) -> None:
    request.send_response(200)
    request.end_headers()
    chunk = b" " * 65536
    while True:  # ends when the client hangs up
        request.wfile.write(chunk)


def slow(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "5000")
    request.end_headers()
    for _ in range(12):
        request.wfile.write(b" ")
        time.sleep(0.1)


def test_endless_data_is_cut_off_at_the_cap(
    world: TufWorld, fetching: TufTrust, server: Book, tmp_path: Path
) -> None:
    server.answer = endless
    before = on_disk(tmp_path)

    with pytest.raises(Refusal) as refused:
        fetching.verify(world.assign(world.publish(version=2)), NOW)

    assert refused.value.reason is R.MALFORMED
    assert on_disk(tmp_path) == before


def test_slow_data_is_given_up_and_tried_again_later(
    world: TufWorld, fetching: TufTrust, server: Book, tmp_path: Path
) -> None:
    server.answer = slow
    before = on_disk(tmp_path)

    with pytest.raises(Weather, match="sends only"):
        fetching.verify(world.assign(world.publish(version=2)), NOW)

    assert on_disk(tmp_path) == before
