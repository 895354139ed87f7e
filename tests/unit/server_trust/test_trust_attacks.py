"""What somebody with some of the keys tries against a delegated family, and the sentence that refuses it."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from securesystemslib.signer import CryptoSigner
from test_trust_delegations import Person, change_of, delegated
from trust_world import World, no_passphrase, now_ms, source
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, TargetFile, Targets

from fleet_server.api_types import Publication
from fleet_server.cli.signing import now_utc
from fleet_server.publishing import Refused
from protocol.release import EMPTY_SHA256


class Attacked(World):
    """Vision is Ann's, with seer 1, seer 2 (yanked) and a floor of 2; audio is the release team's."""

    ann: Person


class Attack:
    """The next metadata of ``targets`` and of ``vision``, properly signed after it was spoilt."""

    def __init__(self, world: World, ann: Person) -> None:
        self.world = world
        self.signers = {
            "targets": [world.keys.signer("image-targets", no_passphrase)],
            "vision": [ann.keys.signer("ann", no_passphrase)],
        }
        self.sent: dict[str, Metadata[Targets]] = {}

    def next(self, role: str) -> Targets:
        if role not in self.sent:
            metadata = Metadata[Targets].from_bytes(self.world.image.metadata(f"{role}.json") or b"")
            metadata.signed.version += 1
            metadata.signed.expires = now_utc() + timedelta(days=30)
            self.sent[role] = metadata
        return self.sent[role].signed

    @property
    def roles(self) -> dict[str, DelegatedRole]:
        delegations = self.next("targets").delegations
        assert delegations is not None
        assert delegations.roles is not None
        return delegations.roles

    def send(self) -> None:
        data = {}
        for role, metadata in self.sent.items():
            metadata.signatures.clear()
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            data[role] = metadata.to_bytes()
        publication = Publication(targets=data.pop("targets", None), delegated=data)
        self.world.publishing.publish(publication, now_ms())


SEER, EAR = "models/vision/seer-1-int8.ewb", "models/audio/ear-1-int8.ewb"
FLOOR = "models/vision/seer.floor"


def two_versions_up(a: Attack) -> None:
    a.next("vision").version += 1


def the_same_version_again(a: Attack) -> None:
    a.next("vision").version -= 1


def of_a_stranger(a: Attack) -> None:
    a.next("vision")
    a.signers["vision"] = [CryptoSigner.generate_ed25519()]


def of_the_release_team_instead_of_the_family(a: Attack) -> None:
    a.next("vision")
    a.signers["vision"] = a.signers["targets"]


def of_the_family_instead_of_the_release_team(a: Attack) -> None:
    a.next("targets")
    a.signers["targets"] = a.signers["vision"]


def for_another_family(a: Attack) -> None:
    audio = Metadata[Targets].from_bytes(a.world.image.metadata("targets.json") or b"").signed.targets[EAR]
    a.next("vision").targets[EAR] = audio


def by_the_release_team_for_a_delegated_family(a: Attack) -> None:
    vision = a.next("vision").targets.pop(SEER)
    a.next("targets").targets[SEER] = vision


def floor_lowered(a: Attack) -> None:
    a.next("vision").targets[FLOOR].unrecognized_fields["custom"]["floor"] = 1


def floor_removed(a: Attack) -> None:
    del a.next("vision").targets[FLOOR]


def floor_above_everything(a: Attack) -> None:
    a.next("vision").targets[FLOOR].unrecognized_fields["custom"]["floor"] = 99


def floor_with_a_file(a: Attack) -> None:
    a.next("vision").targets[FLOOR].length = 1


def floor_with_more_in_it(a: Attack) -> None:
    a.next("vision").targets[FLOOR].unrecognized_fields["custom"]["note"] = "x"


def release_changed(a: Attack) -> None:
    a.next("vision").targets[SEER].unrecognized_fields["custom"]["release"]["title"] = "Better"


def bytes_changed(a: Attack) -> None:
    a.next("vision").targets[SEER].hashes["sha256"] = "0" * 64


def release_removed(a: Attack) -> None:
    del a.next("vision").targets[SEER]


def yank_taken_back(a: Attack) -> None:
    del a.next("vision").targets["models/vision/seer-2-int8.ewb"].unrecognized_fields["custom"]["yanked"]


def yank_with_another_reason(a: Attack) -> None:
    a.next("vision").targets["models/vision/seer-2-int8.ewb"].unrecognized_fields["custom"]["yanked"] = "no reason"


def yank_without_a_reason(a: Attack) -> None:
    a.next("vision").targets[SEER].unrecognized_fields["custom"]["yanked"] = True


def something_unknown_in_custom(a: Attack) -> None:
    a.next("vision").targets[SEER].unrecognized_fields["custom"]["exec"] = "/bin/sh"


def a_path_of_its_own(a: Attack) -> None:
    path = "models/vision/seer.sh"
    a.next("vision").targets[path] = TargetFile(0, {"sha256": EMPTY_SHA256}, path)


def delegating_further(a: Attack) -> None:
    a.next("vision").delegations = Delegations({}, {})


def expired(a: Attack) -> None:
    a.next("vision").expires = now_utc() - timedelta(days=1)


def lives_too_long(a: Attack) -> None:
    a.next("vision").expires = now_utc() + timedelta(days=91)


def delegation_removed(a: Attack) -> None:
    del a.roles["vision"]


def delegation_not_terminating(a: Attack) -> None:
    a.roles["vision"].terminating = False


def delegation_of_everything(a: Attack) -> None:
    a.roles["vision"].paths = ["models/*/*"]


def delegation_with_more_paths(a: Attack) -> None:
    a.roles["vision"].paths = ["models/vision/*", "models/audio/*"]


def delegation_by_hash(a: Attack) -> None:
    a.roles["vision"].paths = None
    a.roles["vision"].path_hash_prefixes = [""]


def delegation_that_nobody_can_sign_for(a: Attack) -> None:
    a.roles["vision"].threshold = 2


@pytest.mark.parametrize("name", ["targets", "timestamp", "main", "../up", "online"])
def test_no_family_takes_a_name_that_means_something_else(attacked: Attacked, name: str) -> None:
    change = change_of(attacked)
    delegations = change.role("targets").delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles[name] = DelegatedRole(name, [], 1, True, [f"models/{name}/*"])
    change.sign(attacked.keys, no_passphrase)
    with pytest.raises(Refused, match=r"no name for a delegated family|not TUF metadata"):
        attacked.publishing.publish(change.publication(), now_ms())


def delegation_without_metadata(a: Attack) -> None:
    key = a.signers["vision"][0].public_key
    a.roles["audio"] = DelegatedRole("audio", [key.keyid], 1, True, ["models/audio/*"])


def metadata_of_a_family_that_nobody_delegated(a: Attack) -> None:
    a.next("vision")
    a.sent["audio"] = a.sent.pop("vision")
    a.signers["audio"] = a.signers["vision"]


REFUSED: list[tuple[Callable[[Attack], None], str]] = [
    (two_versions_up, "family vision: version 6 came, 5 is next"),
    (the_same_version_again, "family vision: version 4 came, 5 is next"),
    (of_a_stranger, "family vision: not signed as targets 3 requires"),
    (of_the_release_team_instead_of_the_family, "family vision: not signed as targets 3 requires"),
    (of_the_family_instead_of_the_release_team, "Image targets: not signed as root 1 requires"),
    (for_another_family, f"{EAR}: the keys of family vision do not sign for family audio"),
    (by_the_release_team_for_a_delegated_family, "family vision is delegated; its own keys must sign this"),
    (floor_lowered, "the floor falls from 2 to 1; it only grows"),
    (floor_removed, f"{FLOOR}: was published and is missing now"),
    (floor_above_everything, "floor 99 is above 2, the highest published version"),
    (floor_with_a_file, "a floor has length 0"),
    (floor_with_more_in_it, "custom.note is nothing that this server knows"),
    (release_changed, f"{SEER}: was published and never changes"),
    (bytes_changed, f"{SEER}: was published and never changes"),
    (release_removed, f"{SEER}: was published and is missing now"),
    (yank_taken_back, "was yanked, which stays"),
    (yank_with_another_reason, "was yanked, which stays"),
    (yank_without_a_reason, "custom.yanked must be a reason"),
    (something_unknown_in_custom, "custom.exec is nothing that this server knows"),
    (a_path_of_its_own, "neither the path of a bundle nor of a floor"),
    (delegating_further, "it delegates further"),
    (expired, "family vision: expired at"),
    (lives_too_long, "more than 90 days ahead"),
    (delegation_removed, "delegation vision: it was there and is missing now"),
    (delegation_not_terminating, "it must be terminating"),
    (delegation_of_everything, r"its path must be models/vision/\*"),
    (delegation_with_more_paths, r"its path must be models/vision/\*"),
    (delegation_by_hash, r"its path must be models/vision/\*"),
    (delegation_that_nobody_can_sign_for, "1 keys cannot give 2 signatures"),
    (delegation_without_metadata, "family audio: its metadata did not come"),
    (metadata_of_a_family_that_nobody_delegated, "'audio': the Image targets do not delegate such a family"),
]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    """One world for all: a refusal leaves it as it was."""
    ready = Attacked(tmp_path_factory.mktemp("attacked"))
    ready.ready()
    ready.publish(source("ear"), family="audio")
    ann = Person(ready, "ann")
    delegated(ready, ann)
    for content in (b"one", b"two"):
        ann.publish(source("seer", content=content), family="vision")
    change = ann.change()
    change.yank("seer", 2, "blind")
    change.raise_floor("seer", 2)
    change.sign(ann.keys, no_passphrase)
    ready.publishing.publish(change.complete(), now_ms())
    ready.ann = ann
    return ready


@pytest.mark.parametrize(("spoil", "reason"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_it_is_refused_with_its_reason_and_leaves_no_trace(
    attacked: Attacked, spoil: Callable[[Attack], None], reason: str
) -> None:
    world = attacked
    before = (world.image.metadata("timestamp.json"), world.releases.bundles())
    attack = Attack(world, world.ann)
    spoil(attack)
    with pytest.raises(Refused, match=reason):
        attack.send()
    assert (world.image.metadata("timestamp.json"), world.releases.bundles()) == before
    assert not (world.folder / "image/pending.json").exists()


def test_the_same_metadata_unspoilt_is_taken(tmp_path_factory: pytest.TempPathFactory) -> None:
    ready = World(tmp_path_factory.mktemp("unspoilt")).ready()
    ann = Person(ready, "ann")
    delegated(ready, ann)
    attack = Attack(ready, ann)
    attack.next("vision")
    attack.next("targets")
    attack.send()
    assert [fact.version for fact in ready.image.roles() if fact.name in ("image-targets", "vision")] == [3, 2]
