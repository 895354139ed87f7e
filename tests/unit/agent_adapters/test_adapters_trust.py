import hashlib
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf_world import DAY, NOW, Bundle, TufWorld, make_release, open_trust, said_of

from agent.adapters.trust import TufTrust
from agent.ports import Refusal, Trouble, TrustVersions, Weather
from protocol.messages import DesiredState
from protocol.states import RejectReason

Attack = Callable[[TufWorld], DesiredState]


def state_of(folder: Path) -> bytes | None:
    path = folder / "trust" / "trust.json"
    return path.read_bytes() if path.exists() else None


@pytest.fixture
def world() -> TufWorld:
    return TufWorld()


@pytest.fixture
def trust(world: TufWorld, tmp_path: Path) -> TufTrust:
    return open_trust(world, tmp_path)


# ---------------------------------------------------------------- what is accepted
@pytest.mark.parametrize("consistent", [False, True], ids=["plain names", "consistent snapshot"])
def test_what_both_repositories_name_is_accepted(tmp_path: Path, consistent: bool) -> None:
    world = TufWorld(consistent=consistent)
    trust = open_trust(world, tmp_path)
    bundle = world.publish("digits", 3)
    world.raise_floor("digits", 2)

    desire = trust.verify(world.assign(bundle, attempt=4), NOW)

    target = desire.targets[0]
    assert (desire.director_version, desire.issued) == (1, NOW)
    assert (target.release, target.sha256, target.length) == (bundle.release, bundle.sha256, len(bundle.data))
    assert (target.assignment.rollout, target.assignment.attempt, target.floor) == ("r-1", 4, 2)


def test_an_empty_list_is_a_desired_state_and_asks_the_image_repository_nothing(
    world: TufWorld, trust: TufTrust
) -> None:
    assert trust.verify(world.assign(), NOW).targets == ()
    assert world.asked == []


def test_a_family_signed_by_a_team_of_its_own_is_found(world: TufWorld, trust: TufTrust) -> None:
    bundle = Bundle(make_release("gauge", 1, family="meters"), b"gauge")
    world.delegate(bundle, paths=["models/meters/*"])

    assert trust.verify(world.assign(bundle), NOW).targets[0].release == bundle.release


def test_the_same_desired_state_again_gives_the_same_answer_without_asking_anybody(
    world: TufWorld, trust: TufTrust
) -> None:
    message = world.assign(world.publish())
    first = trust.verify(message, NOW)
    world.asked.clear()

    assert trust.verify(message, NOW + 1) == first
    assert world.asked == []


def test_an_older_version_of_a_model_is_a_new_desired_state_like_any_other(world: TufWorld, trust: TufTrust) -> None:
    old, new = world.publish(version=1), world.publish(version=2)
    trust.verify(world.assign(new), NOW)

    assert trust.verify(world.assign(old), NOW).targets[0].release.version == 1


def test_a_chain_of_new_director_roots_comes_with_the_message(world: TufWorld, trust: TufTrust) -> None:
    trust.verify(world.assign(), NOW)
    steps = [
        world.director.rotate("root"),
        world.director.rotate("targets", "snapshot", "timestamp"),
        world.director.rotate("timestamp"),
    ]

    trust.verify(world.assign(root=steps), NOW)

    assert trust.versions() == TrustVersions(director=2, director_root=4, image_root=1)


def test_a_chain_of_new_image_roots_is_fetched(world: TufWorld, trust: TufTrust) -> None:
    trust.verify(world.assign(world.publish()), NOW)
    world.image.rotate("root", "timestamp")
    world.image.rotate("targets", "snapshot")

    trust.verify(world.assign(world.publish(version=2)), NOW)

    assert trust.versions().image_root == 3


# ---------------------------------------------------------------- what is refused
def bad_signature(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), wrong_key="targets")


def bad_timestamp_signature(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), wrong_key="timestamp")


def tampered(world: TufWorld) -> DesiredState:
    message = world.assign(world.publish(version=2))
    return msgspec.structs.replace(message, targets=message.targets.replace(b'"attempt":1', b'"attempt":2'))


def lower_version(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), version=world.director_version - 1)


def same_version_with_other_content(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), version=world.director_version)


def same_timestamp_with_other_targets(world: TufWorld) -> DesiredState:
    accepted = world.director.files["timestamp.json"]
    other = world.assign(world.publish(version=2), version=world.director_version)
    return msgspec.structs.replace(other, timestamp=accepted)


def old_snapshot_under_a_new_timestamp(world: TufWorld) -> DesiredState:
    old = world.director.files["snapshot.json"]
    return msgspec.structs.replace(world.assign(world.publish(version=2)), snapshot=old)


def expired(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), life=-DAY, issued=NOW - 2 * DAY)


def expired_image(world: TufWorld) -> DesiredState:
    bundle = world.publish(version=2)
    world.sign_image(life=-DAY)
    return world.assign(bundle)


def for_another_device(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), device="cam-8")


def empty_list_for_another_device(world: TufWorld) -> DesiredState:
    return world.assign(device="cam-8")


def for_nobody(world: TufWorld) -> DesiredState:
    return world.assign(scope={})


def scope_without_time(world: TufWorld) -> DesiredState:
    return world.assign(scope={"device": "cam-7", "issued": "yesterday"})


def issued_after_its_own_end(world: TufWorld) -> DesiredState:
    return world.assign(issued=NOW + 300 * DAY)


def never_released(world: TufWorld) -> DesiredState:
    return world.assign(Bundle(make_release(version=9), b"evil"))


def other_length(world: TufWorld) -> DesiredState:
    def longer(target: Any) -> None:
        target.length += 1

    return world.assign(world.publish(version=2), change=longer)


def other_hash(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), change=lambda target: target.hashes.update(sha256="0" * 64))


def weaker_hash(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), change=lambda target: target.hashes.update(md5="0" * 32))


def other_release(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), change=lambda target: target.custom["release"].update(version=7))


def no_release(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), change=lambda target: target.custom.pop("release"))


def no_assignment(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), change=lambda target: target.custom.pop("assignment"))


def release_under_a_foreign_path(world: TufWorld) -> DesiredState:
    bundle = Bundle(make_release("gauge", 1, family="meters"), b"digits, in truth")
    claim = Bundle(make_release("digits", 9), bundle.data).target(assignment={"rollout": "r", "attempt": 1}).custom
    lie = bundle.target()
    lie.unrecognized_fields["custom"] = {"release": claim["release"]}
    world.released[bundle.path] = lie
    world.sign_image()

    def same_lie(target: Any) -> None:
        target.unrecognized_fields["custom"] = claim

    return world.assign(bundle, change=same_lie)


def team_signs_outside_its_family(world: TufWorld) -> DesiredState:
    bundle = Bundle(make_release("digits", 9), b"not ours to sign")
    world.delegate(bundle, paths=["models/meters/*"])
    return world.assign(bundle)


def floor_without_number(world: TufWorld) -> DesiredState:
    bundle = world.publish(version=2)
    world.raise_floor("digits", "high")
    return world.assign(bundle)


def one_model_twice(world: TufWorld) -> DesiredState:
    return world.assign(world.publish(version=2), world.publish(version=3))


def floor_as_a_bundle(world: TufWorld) -> DesiredState:
    world.raise_floor("digits", 1)

    def to_floor(target: Any) -> None:
        target.path = "models/main/digits.floor"

    return world.assign(world.publish(version=2), change=to_floor)


def without_snapshot(world: TufWorld) -> DesiredState:
    return msgspec.structs.replace(world.assign(world.publish(version=2)), snapshot=b"")


def without_targets(world: TufWorld) -> DesiredState:
    return msgspec.structs.replace(world.assign(world.publish(version=2)), targets=b"")


def garbage(world: TufWorld) -> DesiredState:
    return msgspec.structs.replace(world.assign(), timestamp=b"[" * 16000)


def garbage_root(world: TufWorld) -> DesiredState:
    return world.assign(root=[b"\xff\xfe"])


def huge_timestamp(world: TufWorld) -> DesiredState:
    return msgspec.structs.replace(world.assign(), timestamp=b" " * 20_000)


def rotated_keys_with_a_hole_in_the_chain(world: TufWorld) -> DesiredState:
    world.director.rotate("timestamp")
    return world.assign(root=[world.director.rotate("snapshot")])


def root_of_a_stranger(world: TufWorld) -> DesiredState:
    stranger = TufWorld()
    return stranger.assign(version=9, root=[stranger.director.rotate("timestamp")])


def image_metadata_gone(world: TufWorld) -> DesiredState:
    message = world.assign(world.publish(version=2))
    del world.image.files["snapshot.json"]
    return message


def image_targets_forged(world: TufWorld) -> DesiredState:
    bundle = world.publish(version=2)
    world.sign_image(wrong_key="targets")
    return world.assign(bundle)


def image_rolled_back(world: TufWorld) -> DesiredState:
    world.image.files = world.image.history[0]
    return world.assign(Bundle(make_release(version=1), b"digits 1" * 40))


ATTACKS: list[tuple[Attack, RejectReason]] = [
    (bad_signature, RejectReason.BAD_SIGNATURE),
    (bad_timestamp_signature, RejectReason.BAD_SIGNATURE),
    (tampered, RejectReason.BAD_SIGNATURE),
    (lower_version, RejectReason.REPLAYED),
    (same_version_with_other_content, RejectReason.REPLAYED),
    (same_timestamp_with_other_targets, RejectReason.REPLAYED),
    (old_snapshot_under_a_new_timestamp, RejectReason.REPLAYED),
    (expired, RejectReason.EXPIRED),
    (expired_image, RejectReason.EXPIRED),
    (for_another_device, RejectReason.WRONG_DEVICE),
    (empty_list_for_another_device, RejectReason.WRONG_DEVICE),
    (for_nobody, RejectReason.WRONG_DEVICE),
    (scope_without_time, RejectReason.MALFORMED),
    (issued_after_its_own_end, RejectReason.MALFORMED),
    (never_released, RejectReason.NOT_RELEASED),
    (other_length, RejectReason.DISAGREEMENT),
    (other_hash, RejectReason.DISAGREEMENT),
    (weaker_hash, RejectReason.MALFORMED),
    (other_release, RejectReason.DISAGREEMENT),
    (no_release, RejectReason.MALFORMED),
    (no_assignment, RejectReason.MALFORMED),
    (release_under_a_foreign_path, RejectReason.DISAGREEMENT),
    (team_signs_outside_its_family, RejectReason.NOT_RELEASED),
    (floor_without_number, RejectReason.MALFORMED),
    (one_model_twice, RejectReason.MALFORMED),
    (floor_as_a_bundle, RejectReason.MALFORMED),
    (without_snapshot, RejectReason.INCOMPLETE),
    (without_targets, RejectReason.INCOMPLETE),
    (garbage, RejectReason.MALFORMED),
    (garbage_root, RejectReason.MALFORMED),
    (huge_timestamp, RejectReason.MALFORMED),
    (rotated_keys_with_a_hole_in_the_chain, RejectReason.BAD_SIGNATURE),
    (root_of_a_stranger, RejectReason.BAD_SIGNATURE),
    (image_metadata_gone, RejectReason.INCOMPLETE),
    (image_targets_forged, RejectReason.BAD_SIGNATURE),
    (image_rolled_back, RejectReason.REPLAYED),
]


@pytest.mark.parametrize(("attack", "reason"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
def test_a_refused_desired_state_has_a_name_and_changes_nothing(
    world: TufWorld, trust: TufTrust, tmp_path: Path, attack: Attack, reason: RejectReason
) -> None:
    """Two good states, then the attack: the second good one stands, also after a restart."""
    trust.verify(world.assign(world.publish()), NOW)
    accepted = trust.verify(world.assign(world.publish()), NOW)
    before = state_of(tmp_path)

    with pytest.raises(Refusal) as refused:
        trust.verify(attack(world), NOW)

    assert refused.value.reason is reason, refused.value
    assert state_of(tmp_path) == before
    recalled = open_trust(world, tmp_path).recall(NOW)
    assert recalled is not None
    assert recalled.desire == accepted


FUZZ_WORLD = TufWorld()
FUZZ = FUZZ_WORLD.assign(FUZZ_WORLD.publish())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_payload_is_refused_or_still_means_the_same(tmp_path: Path, data: st.DataObject) -> None:
    """The second is rare but right: the case of a signature's hex digits, for one, means nothing."""
    trust = open_trust(FUZZ_WORLD, tmp_path / data.draw(st.uuids()).hex)
    name = data.draw(st.sampled_from(["timestamp", "snapshot", "targets"]))
    body = bytearray(getattr(FUZZ, name))
    start = data.draw(st.integers(0, len(body) - 1))
    body[start : start + data.draw(st.integers(1, 40))] = data.draw(st.binary(max_size=8))

    try:
        targets = trust.verify(msgspec.structs.replace(FUZZ, **{name: bytes(body)}), NOW).targets
    except Refusal:
        assert trust.versions().director == 0
    else:
        assert [target.release.version for target in targets] == [1]


# ---------------------------------------------------------------- roots, clock, floors
def test_verified_roots_are_kept_when_the_rest_is_refused(world: TufWorld, trust: TufTrust, tmp_path: Path) -> None:
    trust.verify(world.assign(), NOW)
    step = world.director.rotate("timestamp")

    with pytest.raises(Refusal):
        trust.verify(msgspec.structs.replace(world.assign(root=[step]), timestamp=b"{}"), NOW)

    assert trust.versions().director_root == 2
    recalled = open_trust(world, tmp_path).recall(NOW)
    assert recalled is not None
    assert recalled.expired  # its keys were replaced since
    trust.verify(world.assign(), NOW)  # the step need not come again


def test_the_clock_never_falls_behind_what_was_issued(world: TufWorld, trust: TufTrust) -> None:
    """A message of last week expires in the meantime; a device that wakes in 1970 must not take it for fresh."""
    trust.verify(world.assign(), NOW)
    stale = world.assign(life=-DAY, issued=NOW - 5 * DAY)

    with pytest.raises(Refusal) as refused:
        trust.verify(stale, 0)

    assert refused.value.reason is RejectReason.EXPIRED
    assert trust.clock_floor == NOW


def test_a_floor_once_seen_does_not_fall(world: TufWorld, trust: TufTrust) -> None:
    old, new = world.publish(version=1), world.publish(version=3)
    world.raise_floor("digits", 3)
    trust.verify(world.assign(new), NOW)
    world.raise_floor("digits", 1)

    assert said_of(trust.verify(world.assign(old), NOW)) == {"digits": RejectReason.BELOW_FLOOR}


def test_a_publication_in_mid_fetch_is_asked_once_more(world: TufWorld, tmp_path: Path) -> None:
    bundle = world.publish()
    world.sign_image()
    torn = dict(world.image.files)
    world.sign_image()
    torn["snapshot.json"] = world.image.files["snapshot.json"]
    answers = [torn.get, torn.get, torn.get]  # 2.root.json, timestamp, snapshot of another moment

    def source(name: str, cap: int) -> bytes | None:
        return answers.pop()(name) if answers else world.image.serve(name, cap)

    assert len(open_trust(world, tmp_path, image=source).verify(world.assign(bundle), NOW).targets) == 1


# ---------------------------------------------------------------- without the server
@dataclass(frozen=True)
class Absence:
    """Why the Image repository cannot be asked."""

    name: str
    cause: Callable[[TufWorld], None]
    error: type[Exception]


def unreachable(world: TufWorld) -> None:
    world.failure = Weather("the server did not answer")


def keys_expired(world: TufWorld) -> None:
    world.sign_image(life=-DAY)


ABSENCES = [Absence("unreachable", unreachable, Weather), Absence("expired", keys_expired, Refusal)]


@pytest.mark.parametrize("absence", ABSENCES, ids=lambda absence: absence.name)
def test_a_stored_bundle_needs_no_fresh_image_metadata(world: TufWorld, tmp_path: Path, absence: Absence) -> None:
    old, new = world.publish(version=1), world.publish(version=2)
    stored = {old.sha256, new.sha256}
    trust = open_trust(world, tmp_path, is_stored=stored.__contains__)
    trust.verify(world.assign(new), NOW)
    absence.cause(world)

    assert trust.verify(world.assign(old), NOW).targets[0].release.version == 1
    assert trust.versions().director == 2


@pytest.mark.parametrize("absence", ABSENCES, ids=lambda absence: absence.name)
def test_a_bundle_that_is_not_stored_waits_for_fresh_image_metadata(
    world: TufWorld, tmp_path: Path, absence: Absence
) -> None:
    old, new = world.publish(version=1), world.publish(version=2)
    trust = open_trust(world, tmp_path, is_stored={old.sha256}.__contains__)
    trust.verify(world.assign(old), NOW)
    absence.cause(world)

    with pytest.raises(absence.error):
        trust.verify(world.assign(new), NOW)

    assert trust.versions().director == 1


def test_a_stored_bundle_that_no_image_metadata_ever_named_is_not_vouched_for(
    world: TufWorld, tmp_path: Path
) -> None:
    trust = open_trust(world, tmp_path, is_stored=lambda sha256: True)
    trust.verify(world.assign(world.publish()), NOW)
    unreachable(world)

    with pytest.raises(Weather):
        trust.verify(world.assign(Bundle(make_release(version=9), b"evil")), NOW)


def test_a_stored_bundle_below_a_known_floor_is_objected_to_without_the_server_too(
    world: TufWorld, tmp_path: Path
) -> None:
    old, new = world.publish(version=1), world.publish(version=2)
    world.raise_floor("digits", 2)
    trust = open_trust(world, tmp_path, is_stored=lambda sha256: True)
    trust.verify(world.assign(new), NOW)
    unreachable(world)

    assert said_of(trust.verify(world.assign(old), NOW)) == {"digits": RejectReason.BELOW_FLOOR}


@pytest.mark.parametrize(("later", "expired"), [(0, False), (8 * DAY, True), (400 * DAY, True)])
def test_the_last_desired_state_is_recalled_offline_however_old(
    world: TufWorld, trust: TufTrust, tmp_path: Path, later: int, expired: bool
) -> None:
    desire = trust.verify(world.assign(world.publish()), NOW)
    unreachable(world)

    recalled = open_trust(world, tmp_path).recall(NOW + later)

    assert recalled is not None
    assert (recalled.desire, recalled.expired) == (desire, expired)


def test_nothing_is_recalled_where_nothing_was_accepted(trust: TufTrust) -> None:
    assert trust.recall(NOW) is None
    assert trust.versions() == TrustVersions(director=0, director_root=1, image_root=1)


# ---------------------------------------------------------------- the state file
def truncated(folder: Path) -> None:
    path = folder / "trust" / "trust.json"
    path.write_bytes(path.read_bytes()[:-1])


def emptied(folder: Path) -> None:
    (folder / "trust" / "trust.json").write_bytes(b"")


def deleted(folder: Path) -> None:
    (folder / "trust" / "trust.json").unlink()


LOSSES = pytest.mark.parametrize("lose", [truncated, emptied, deleted], ids=lambda lose: lose.__name__)
Lose = Callable[[Path], None]


@LOSSES
def test_a_lost_state_begins_anew_from_the_pinned_roots_and_says_so(
    world: TufWorld, trust: TufTrust, tmp_path: Path, lose: Lose
) -> None:
    bundle = world.publish()
    trust.verify(world.assign(bundle), NOW)
    steps = [world.director.rotate("root"), world.director.rotate("timestamp")]
    world.image.rotate("targets")
    world.sign_image()
    message = world.assign(bundle, root=steps)
    accepted = trust.verify(message, NOW)
    lose(tmp_path)

    again = open_trust(world, tmp_path)

    assert again.lost
    assert again.recall(NOW) is None
    assert again.versions() == TrustVersions(director=2, director_root=1, image_root=1)  # a server signs above 2
    assert again.verify(message, NOW) == accepted
    assert open_trust(world, tmp_path).lost == ""


@LOSSES
@pytest.mark.parametrize("rotated", [False, True], ids=["same root", "a root later"])
def test_a_lost_state_opens_no_way_back_for_the_director(
    world: TufWorld, trust: TufTrust, tmp_path: Path, lose: Lose, rotated: bool
) -> None:
    old = world.assign(world.publish())
    step = [world.director.rotate("timestamp")] if rotated else []
    trust.verify(world.assign(world.publish(version=2), root=step), NOW)
    lose(tmp_path)

    with pytest.raises(Refusal) as refused:
        open_trust(world, tmp_path).verify(old, NOW)

    assert refused.value.reason is RejectReason.REPLAYED


@LOSSES
def test_a_lost_state_opens_no_way_back_for_the_image_repository(
    world: TufWorld, trust: TufTrust, tmp_path: Path, lose: Lose
) -> None:
    old = world.publish(version=1)
    world.raise_floor("digits", 2)
    trust.verify(world.assign(world.publish(version=2)), NOW)
    world.image.files = world.image.history[0]  # from before the floor
    lose(tmp_path)

    with pytest.raises(Refusal) as refused:
        open_trust(world, tmp_path).verify(world.assign(old), NOW)

    assert refused.value.reason is RejectReason.REPLAYED


def test_marks_do_not_go_back_when_only_roots_are_learned_after_a_loss(
    world: TufWorld, trust: TufTrust, tmp_path: Path
) -> None:
    old = world.assign(world.publish())
    step = world.director.rotate("timestamp")
    trust.verify(world.assign(world.publish(version=2), root=[step]), NOW)
    deleted(tmp_path)
    again = open_trust(world, tmp_path)
    with pytest.raises(Refusal):
        again.verify(msgspec.structs.replace(old, root=(step,), timestamp=b"{}"), NOW)
    assert again.versions().director_root == 2
    deleted(tmp_path)

    with pytest.raises(Refusal) as refused:
        open_trust(world, tmp_path).verify(old, NOW)

    assert refused.value.reason is RejectReason.REPLAYED


@LOSSES
def test_a_lost_state_keeps_its_floors_and_the_clocks(
    world: TufWorld, trust: TufTrust, tmp_path: Path, lose: Lose
) -> None:
    old, new = world.publish(version=1), world.publish(version=3)
    world.raise_floor("digits", 3)
    trust.verify(world.assign(new), NOW)
    world.raise_floor("digits", 1)
    lose(tmp_path)

    again = open_trust(world, tmp_path)

    assert again.clock_floor == NOW
    assert said_of(again.verify(world.assign(old), NOW)) == {"digits": RejectReason.BELOW_FLOOR}


def test_without_state_and_marks_the_servers_present_word_is_taken(
    world: TufWorld, trust: TufTrust, tmp_path: Path
) -> None:
    message = world.assign(world.publish())
    trust.verify(message, NOW)
    deleted(tmp_path)
    (tmp_path / "trust-marks.json").write_bytes(b"torn")

    again = open_trust(world, tmp_path)

    assert (again.lost, again.clock_floor) == ("", 0)
    assert again.verify(message, NOW).director_version == 1


def test_a_state_of_another_agent_is_trouble(world: TufWorld, trust: TufTrust, tmp_path: Path) -> None:
    trust.verify(world.assign(), NOW)
    path = tmp_path / "trust" / "trust.json"
    body = path.read_bytes().partition(b"\n")[2].replace(b'"format":1', b'"format":9')
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)

    with pytest.raises(Trouble, match="format 9"):
        open_trust(world, tmp_path)


def test_the_state_of_another_enrolment_is_not_used(world: TufWorld, trust: TufTrust, tmp_path: Path) -> None:
    trust.verify(world.assign(), NOW)

    assert open_trust(TufWorld(), tmp_path).versions().director == 0


def test_a_damaged_first_root_is_trouble(world: TufWorld, tmp_path: Path) -> None:
    with pytest.raises(Trouble, match="Director"):
        open_trust(world, tmp_path, director_root=world.director.roots[0].replace(b"cons", b"CONS"))


def test_nothing_is_left_in_the_scratch_folder(world: TufWorld, trust: TufTrust, tmp_path: Path) -> None:
    trust.verify(world.assign(world.publish()), NOW)
    with pytest.raises(Refusal):
        trust.verify(without_targets(world), NOW)

    assert list((tmp_path / "scratch").iterdir()) == []


KILLED = """
    import os, pickle, signal, sys
    from pathlib import Path
    from agent.adapters.trust import TufTrust

    where, step, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    parts, message, files, now = pickle.loads((where / "case").read_bytes())
    trust = TufTrust(**parts, folder=where / "trust", scratch=where / "scratch",
                     image=lambda name, cap: files.get(name), is_stored=lambda sha256: False)
    original = getattr(os, step)
    def die(source, *rest, **kinds):
        global count
        if step == "fsync" or "trust.json" in str(source):  # python-tuf renames too, in its throw-away copy
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(source, *rest, **kinds)
    setattr(os, step, die)
    trust.verify(message, now)
"""


@pytest.mark.parametrize(
    ("kill", "survives"),
    [(("fsync", "1"), 1), (("replace", "1"), 1), (("fsync", "2"), 2)],
    ids=["before the content is flushed", "before it takes the name", "before the folder is flushed"],
)
def test_a_kill_in_mid_commit_leaves_the_old_state_or_the_new(
    world: TufWorld, trust: TufTrust, tmp_path: Path, kill: tuple[str, str], survives: int
) -> None:
    trust.verify(world.assign(world.publish()), NOW)
    message = world.assign(world.publish(version=2))
    roots = {"director_root": world.director.roots[0], "image_root": world.image.roots[0]}
    (tmp_path / "case").write_bytes(pickle.dumps(({"device": "cam-7", **roots}, message, world.image.files, NOW)))

    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), *kill],
        check=False,
        cwd=Path(__file__).parents[3],
    )

    assert ended.returncode == -signal.SIGKILL
    again = open_trust(world, tmp_path)
    recalled = again.recall(NOW)
    assert recalled is not None
    assert recalled.desire.director_version == survives
    assert [path.name for path in (tmp_path / "trust").iterdir()] == ["trust.json"]
    assert again.verify(message, NOW).director_version == 2


def test_versions_answer_while_a_verification_waits_for_the_server(world: TufWorld, tmp_path: Path) -> None:
    seen: list[TrustVersions] = []

    def slow(name: str, cap: int) -> bytes | None:
        seen.append(trust.versions())
        return world.image_file(name, cap)

    trust = open_trust(world, tmp_path, image=slow)
    trust.verify(world.assign(world.publish()), NOW)

    assert seen[0] == TrustVersions(director=0, director_root=1, image_root=1)
