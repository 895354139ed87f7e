"""Families with keys of their own, several signers, rotation, revocation; a stock python-tuf client is the judge."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgspec
import pytest
from securesystemslib.signer import Key
from trust_world import DAY, World, no_passphrase, now_ms, source
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater

from fleet_server.adapters.image_repository import ImageFolder
from fleet_server.api_types import DeployRequest, MakeOnlineKeys, OnlineKeysView, Publication, RollbackRequest
from fleet_server.cli.changes import Change
from fleet_server.cli.key_folder import KeyFolder
from fleet_server.cli.session import ApiError
from fleet_server.cli.signing import fetch_verified, now_utc
from fleet_server.publishing import Refused
from fleet_server.rollouts import BadOrder


# ---------------------------------------------------------------- a stock client
class Files(FetcherInterface):
    """What devices are served, asked by a stock client."""

    def __init__(self, world: World, device: str | None = None) -> None:
        self.world = world
        self.device = device

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = urlparse(url).path.lstrip("/")
        data = self._of_director(name) if self.device else self.world.image.metadata(name)
        if data is None:
            raise DownloadHTTPError(f"no {name}", 404)
        return iter([data])

    def _of_director(self, name: str) -> bytes | None:
        version, _, rest = name.partition(".")
        if rest == "root.json":
            roots = self.world.director.roots()
            return roots[int(version) - 1] if int(version) <= len(roots) else None
        desire = self.world.desired.current[str(self.device)]
        files = {"timestamp": desire.timestamp, "snapshot": desire.snapshot, "targets": desire.targets}
        return files[name.split(".")[-2]]


class Device:
    """A client that keeps its state, from the first root on."""

    def __init__(self, world: World, *, device: str | None = None) -> None:
        first = world.director.roots()[0] if device else world.image.first_root()
        assert first is not None
        self.first, self.files = first, Files(world, device)
        self.folder = world.folder / f"client-{device or 'image'}"
        self.folder.mkdir()

    def look_up(self, *paths: str) -> list[TargetFile | None]:
        client = Updater(str(self.folder), "mem://x/", fetcher=self.files, bootstrap=self.first)
        client.refresh()
        return [client.get_targetinfo(path) for path in paths]

    def sees(self, *paths: str) -> bool:
        return None not in self.look_up(*paths)


# ---------------------------------------------------------------- people
class Person:
    """Somebody with a key folder."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.keys = KeyFolder(world.folder / name)
        self.public: Key = self.keys.make_key(name, None, name)
        for repository, roots in (("image", world.keys.roots("image")), ("director", world.keys.roots("director"))):
            self.keys.keep_root(repository, 1, roots[0])

    def publish(self, *sources: Any, **options: Any) -> Any:
        return self.world.publisher(self.keys, **options).publish(sources)

    def change(self) -> Change:
        return change_of(self.world, self.keys)


def change_of(world: World, keys: KeyFolder | None = None) -> Change:
    return Change(base=fetch_verified(world.client, keys or world.keys), now=now_utc())


def carry_out(world: World, change: Change, *signers: KeyFolder) -> None:
    change.settle()
    for keys in signers or (world.keys,):
        change.sign(keys, no_passphrase)
    world.publishing.publish(change.complete(), now_ms())


def delegated(world: World, *people: Person, threshold: int = 1, family: str = "vision") -> None:
    change = change_of(world)
    change.delegate(family, [person.public for person in people], threshold)
    carry_out(world, change, world.keys, *(person.keys for person in people))


# ---------------------------------------------------------------- families
def test_a_family_publishes_with_its_own_keys_and_a_stock_client_finds_it(ready: World) -> None:
    ann = Person(ready, "ann")
    delegated(ready, ann)
    (seen,) = ann.publish(source("seer"), family="vision")
    (heard,) = ready.publish(source("digits"))
    device = Device(ready)
    assert device.sees(seen.path, heard.path)
    assert (seen.path, heard.path) == ("models/vision/seer-1-int8.ewb", "models/main/digits-1-int8.ewb")
    assert ready.image.metadata("vision.json") == ready.image.metadata("2.vision.json")
    assert (device.folder / "vision.json").read_bytes() == ready.image.metadata("vision.json")


def test_what_a_family_published_before_moves_under_its_keys_and_stays_as_it_was(ready: World) -> None:
    device = Device(ready)
    (early,) = ready.publish(source("seer"), family="vision")
    (before,) = device.look_up(early.path)
    ann = Person(ready, "ann")
    delegated(ready, ann)
    assert device.look_up(early.path) == [before]
    assert early.path not in Metadata[Targets].from_bytes(ready.image.metadata("targets.json") or b"").signed.targets
    (late,) = ann.publish(source("seer", content=b"two"), family="vision")
    assert late.version == 2
    assert device.sees(early.path, late.path)
    ready.restart()
    assert device.sees(early.path, late.path)


def test_two_of_three_must_sign_for_a_family_that_says_so(ready: World) -> None:
    ann, bob, eve = (Person(ready, name) for name in ("ann", "bob", "eve"))
    delegated(ready, ann, bob, eve, threshold=2)
    change = ann.change()
    change.renew("vision")
    change.sign(ann.keys, no_passphrase)
    (missing,) = change.missing()
    assert missing.startswith("vision 2: 1 of 2 signatures; 1 more from: bob (")
    assert "eve (" in missing
    with pytest.raises(Refused, match="family vision: not signed as targets 2 requires"):
        ready.publishing.publish(change.publication(), now_ms())
    change.sign(eve.keys, no_passphrase)
    ready.publishing.publish(change.complete(), now_ms())
    Device(ready).look_up()


def test_a_revoked_key_of_a_family_signs_no_longer_and_the_rest_signs_again(ready: World) -> None:
    ann, bob = Person(ready, "ann"), Person(ready, "bob")
    delegated(ready, ann, bob)
    (first,) = bob.publish(source("seer"), family="vision")
    change = change_of(ready)
    change.revoke_key("vision", "bob")
    carry_out(ready, change, ready.keys, ann.keys)
    with pytest.raises(ApiError, match="not signed as targets 3 requires"):
        _publish_regardless(bob)
    (second,) = ann.publish(source("seer", content=b"two"), family="vision")
    assert Device(ready).sees(first.path, second.path)


def _publish_regardless(person: Person) -> None:
    """Sign as someone who does not care what the targets say."""
    world = person.world
    following = Metadata[Targets].from_bytes(world.image.metadata("vision.json") or b"")
    following.signed.version += 1
    following.sign(person.keys.signer(person.name, no_passphrase))
    world.client.post("/models/publish", Publication(delegated={"vision": following.to_bytes()}), object)


def test_a_change_that_leaves_enough_signatures_is_not_signed_again_by_the_family(ready: World) -> None:
    ann, bob = Person(ready, "ann"), Person(ready, "bob")
    delegated(ready, ann)
    change = change_of(ready)
    change.add_keys("vision", [bob.public])
    carry_out(ready, change)
    bob.publish(source("seer"), family="vision")
    assert Device(ready).sees("models/vision/seer-1-int8.ewb")


def test_models_are_counted_and_named_once_over_all_families(ready: World) -> None:
    ann = Person(ready, "ann")
    delegated(ready, ann)
    ready.publish(source("digits"))
    with pytest.raises(ApiError, match="model digits belongs to family main"):
        ann.publish(source("digits", content=b"two"), family="vision")


# ---------------------------------------------------------------- roots and release keys
@pytest.mark.parametrize("role", ["image-root", "image-targets", "director-root"])
def test_a_key_is_replaced_and_clients_follow_from_the_first_root(ready: World, role: str) -> None:
    (one,) = ready.publish(source())
    ready.enrol("cam-1")
    image, director = Device(ready), Device(ready, device="cam-1")
    assert image.sees(one.path)
    director.look_up()
    ann = Person(ready, "ann")
    for step in ("add", "revoke"):
        change = change_of(ready)
        if step == "add":
            change.add_keys(role, [ann.public])
        else:
            change.revoke_key(role, change.keys_of(role)[0].keyid)
        carry_out(ready, change, ready.keys, ann.keys)
    keys = ann.keys if role == "image-targets" else ready.keys
    (two,) = ready.publisher(keys).publish([source(content=b"two")])
    assert image.sees(one.path, two.path)
    ready.rollouts.deploy(DeployRequest(model="digits", version=2, all=True), "ann", now_ms())
    assert director.sees(two.path)


def test_m_of_n_for_both_roots_and_the_release_keys(ready: World) -> None:
    bob = Person(ready, "bob")
    for role in ("image-root", "director-root", "image-targets"):
        change = change_of(ready)
        change.add_keys(role, [bob.public], threshold=2)
        carry_out(ready, change, ready.keys, bob.keys)
    with pytest.raises(Exception, match=r"image-targets 3: 1 of 2 signatures; 1 more from: bob"):
        ready.publish(source())
    for role in ("image-root", "director-root"):
        change = change_of(ready)
        change.renew(role)
        change.sign(ready.keys, no_passphrase)
        with pytest.raises(Refused, match="not signed as root"):
            ready.publishing.publish(change.publication(), now_ms())
        carry_out(ready, change, bob.keys)
    Device(ready).look_up()


def test_a_revoked_release_key_publishes_nothing_any_more(ready: World) -> None:
    ann = Person(ready, "ann")
    change = change_of(ready)
    old = change.keys_of("image-targets")[0].keyid
    change.add_keys("image-targets", [ann.public])
    change.revoke_key("image-targets", old)
    carry_out(ready, change, ready.keys, ann.keys)
    stale = Metadata[Targets].from_bytes(ready.image.metadata("targets.json") or b"")
    stale.signed.version += 1
    stale.sign(ready.keys.signer("image-targets", no_passphrase))
    with pytest.raises(Refused, match="not signed as root 2 requires"):
        ready.publishing.publish(Publication(targets=stale.to_bytes()), now_ms())


def test_a_root_that_leaves_the_targets_invalid_comes_with_new_targets_or_not_at_all(ready: World) -> None:
    ann = Person(ready, "ann")
    change = change_of(ready)
    old = change.keys_of("image-targets")[0].keyid
    change.add_keys("image-targets", [ann.public])
    change.revoke_key("image-targets", old)
    for keys in (ready.keys, ann.keys):
        change.sign(keys, no_passphrase)
    with pytest.raises(Refused, match="Image targets: not signed as root 2 requires"):
        ready.publishing.publish(change.publication(), now_ms())
    carry_out(ready, change, ready.keys, ann.keys)


# ---------------------------------------------------------------- the server's own keys
def test_new_online_keys_are_used_from_the_roots_on_that_name_them(ready: World) -> None:
    (one,) = ready.publish(source())
    ready.enrol("cam-1")
    ready.rollouts.deploy(DeployRequest(model="digits", version=1, all=True), "ann", now_ms())
    image, director = Device(ready), Device(ready, device="cam-1")
    assert (image.sees(one.path), director.sees(one.path)) == (True, True)
    before, wanted = ready.image.online_keys(), ready.desired.current["cam-1"].version

    shown = ready.client.post("/trust/online-keys", MakeOnlineKeys(), OnlineKeysView)
    assert ready.image.online_keys() != before
    assert (image.sees(one.path), director.sees(one.path)) == (True, True)
    ready.restart()  # they wait on disk
    change = change_of(ready)
    change.name_online_keys(shown)
    carry_out(ready, change)

    assert ready.desired.current["cam-1"].version == wanted + 1
    for restarted in (False, True):
        if restarted:
            ready.restart()
        assert (image.sees(one.path), director.sees(one.path)) == (True, True)
        assert not list(ready.folder.glob("*/*.next.pem"))


def test_a_stolen_online_key_signs_nothing_that_a_client_takes_after_the_change(ready: World) -> None:
    stolen = ImageFolder(ready.folder / "image")._signers
    change = change_of(ready)
    change.name_online_keys(ready.client.post("/trust/online-keys", MakeOnlineKeys(), OnlineKeysView))
    carry_out(ready, change)
    device = Device(ready)
    device.look_up()
    image = ready.image
    image.renew(now_ms() + 6 * DAY)
    forged = stolen.sign(image._timestamp)  # type: ignore[type-var]  # there is one: it was renewed above
    honest = image.metadata
    image.metadata = lambda name: forged if name == "timestamp.json" else honest(name)  # type: ignore[method-assign]  # forged
    with pytest.raises(Exception, match="timestamp was signed by 0/1 keys"):
        device.look_up()


# ---------------------------------------------------------------- power cuts and backups
def test_a_publication_that_was_cut_short_is_finished_at_the_next_start(
    ready: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = Person(ready, "ann")
    change = change_of(ready)
    old = change.keys_of("image-targets")[0].keyid
    change.add_keys("image-targets", [ann.public])
    change.revoke_key("image-targets", old)
    change.settle()
    for keys in (ready.keys, ann.keys):
        change.sign(keys, no_passphrase)

    def cut(*_: object) -> None:
        raise OSError("the power went")

    monkeypatch.setattr(ImageFolder, "_sign_online", cut)
    with pytest.raises(OSError, match="the power went"):
        ready.publishing.publish(change.complete(), now_ms())
    monkeypatch.undo()
    ready.restart()
    ready.publishing.catch_up(now_ms())
    Device(ready).look_up()
    assert ready.publisher(ann.keys).publish([source()])[0].version == 1


def test_a_server_restored_from_a_backup_signs_above_what_devices_hold(ready: World, tmp_path: Path) -> None:
    backup = {path: path.read_bytes() for path in (ready.folder / "image").rglob("*") if path.is_file()}
    device = Device(ready)
    for n in range(1, 4):
        ready.image.renew(now_ms() + 4 * n * DAY)
    device.look_up()
    for path in (ready.folder / "image").rglob("*.json"):
        path.unlink()
    for path, data in backup.items():
        path.write_bytes(data)
    ready.restart()
    ready.image.renew(now_ms() + 20 * DAY)
    device.look_up()


# ---------------------------------------------------------------- yanked, and below the floor
def test_a_yanked_version_stays_named_and_is_not_deployed_any_more(ready: World) -> None:
    one, two = (ready.publish(source(content=content))[0] for content in (b"one", b"two"))
    ready.registry.put("cam-1")
    ready.rollouts.deploy(DeployRequest(model="digits", version=2, all=True), "ann", now_ms())
    change = change_of(ready)
    change.yank("digits", 2, "reads 3 as 8")
    carry_out(ready, change)

    (target,) = Device(ready).look_up(two.path)
    assert target is not None
    assert target.custom["yanked"] == "reads 3 as 8"
    with pytest.raises(BadOrder, match=r"digits 2 \(int8\) was yanked: reads 3 as 8"):
        ready.rollouts.deploy(DeployRequest(model="digits", version=2, all=True), "ann", now_ms())
    assert ready.rollouts.renew(now_ms() + 5 * DAY) == 1
    assert ready.desired.current["cam-1"].assigned[0].bundle.path == two.path
    ready.desired.committed["cam-1", "digits"] = [1, 2]
    ready.rollouts.rollback(RollbackRequest(model="digits", all=True), "ann", now_ms())
    assert ready.desired.current["cam-1"].assigned[0].bundle.path == one.path


def test_a_rollback_passes_over_what_was_yanked(ready: World) -> None:
    for content in (b"one", b"two", b"three"):
        ready.publish(source(content=content))
    ready.registry.put("cam-1")
    ready.rollouts.deploy(DeployRequest(model="digits", version=3, all=True), "ann", now_ms())
    ready.desired.committed["cam-1", "digits"] = [1, 2, 3]
    change = change_of(ready)
    change.yank("digits", 2, "bad")
    carry_out(ready, change)
    with pytest.raises(BadOrder, match="was yanked: bad"):
        ready.rollouts.rollback(RollbackRequest(model="digits", to=2, all=True), "ann", now_ms())
    order = ready.rollouts.rollback(RollbackRequest(model="digits", all=True), "ann", now_ms())
    assert order.targets == {"cam-1": 1}


def test_one_variant_may_be_yanked_and_the_others_still_go_out(ready: World) -> None:
    ready.publish(source(), source(variant="fp32"))
    ready.registry.put("cam-1")
    change = change_of(ready)
    change.yank("digits", 1, "slow", "fp32")
    carry_out(ready, change)
    ready.rollouts.deploy(DeployRequest(model="digits", version=1, all=True), "ann", now_ms())
    assert ready.desired.current["cam-1"].assigned[0].bundle.release.variant == "int8"


def test_below_the_floor_nothing_is_deployed(ready: World) -> None:
    ann = Person(ready, "ann")
    delegated(ready, ann)
    for content in (b"one", b"two"):
        ann.publish(source("seer", content=content), family="vision")
    change = ann.change()
    change.raise_floor("seer", 2)
    carry_out(ready, change, ann.keys)
    (floor,) = Device(ready).look_up("models/vision/seer.floor")
    assert floor is not None
    assert floor.custom == {"floor": 2}
    ready.registry.put("cam-1")
    with pytest.raises(BadOrder, match=r"seer 1 \(int8\) is below the floor 2"):
        ready.rollouts.deploy(DeployRequest(model="seer", version=1, all=True), "ann", now_ms())
    ready.restart()
    assert ready.rollouts.deploy(DeployRequest(model="seer", version=2, all=True), "ann", now_ms()).targets


def test_every_role_is_told_with_its_days_and_whoever_must_act(ready: World) -> None:
    ann = Person(ready, "ann")
    delegated(ready, ann)
    facts = {fact.name: fact for fact in ready.image.roles()}
    assert set(facts) == {"image-root", "image-targets", "vision", "image-snapshot", "image-timestamp"}
    assert (facts["vision"].version, facts["vision"].threshold, facts["vision"].keys) == (1, 1, 1)
    assert msgspec.json.decode(ready.image.metadata("vision.json") or b"")["signed"]["version"] == 1
