"""A stock python-tuf `Updater` is the judge of everything both repositories sign."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import msgspec
import pytest
from trust_world import DAY, World, birth, no_passphrase, now_ms, source
from tuf.api.exceptions import DownloadHTTPError, ExpiredMetadataError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from fleet_server.adapters.image_repository import ImageFolder
from fleet_server.api_types import DeployRequest
from fleet_server.cli.changes import Change
from fleet_server.cli.signing import fetch_verified, now_utc
from fleet_server.ports import SignedDesire
from protocol.codec import decode_desired_state, encode
from protocol.release import Assignment, DeviceConfig, DirectorScope, from_custom


class Files(FetcherInterface):
    def __init__(self, files: dict[str, bytes | None]) -> None:
        self.files = files

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self.files.get(urlparse(url).path.lstrip("/"))
        if data is None:
            raise DownloadHTTPError("not there", 404)
        return iter([data])


class ImageFiles(dict[str, bytes | None]):
    def __init__(self, image: ImageFolder) -> None:
        self.image = image

    def get(self, name: str, default: object = None) -> bytes | None:
        return self.image.metadata(name)


def updater(folder: Path, root: bytes, files: dict[str, bytes | None]) -> Updater:
    folder.mkdir(exist_ok=True)
    return Updater(str(folder), "mem://x/", fetcher=Files(files), bootstrap=root)


def image_updater(world: World) -> Updater:
    first = world.image.first_root()
    assert first is not None
    return updater(world.folder / "client-image", first, ImageFiles(world.image))


def director_updater(world: World, desire: SignedDesire) -> Updater:
    message = decode_desired_state(encode(desire.message(world.director.roots()[1:])))
    files: dict[str, bytes | None] = {f"{n + 2}.root.json": root for n, root in enumerate(message.root)}
    files |= {
        "timestamp.json": message.timestamp,
        f"{desire.version}.snapshot.json": message.snapshot,
        f"{desire.version}.targets.json": message.targets,
    }
    return updater(world.folder / f"client-{desire.device}", world.director.roots()[0], files)


def target_of(client: Updater, path: str) -> TargetFile:
    info = client.get_targetinfo(path)
    assert info is not None
    return info


def test_both_repositories_name_a_deployed_bundle_with_the_same_release_length_and_hash(ready: World) -> None:
    (published,) = ready.publish(source())
    ready.enrol("cam-1")
    ready.rollouts.deploy(DeployRequest(model="digits", version=1, all=True), "ann", now_ms())

    desire = ready.desired.current["cam-1"]
    image, director = image_updater(ready), director_updater(ready, desire)
    image.refresh()
    director.refresh()
    released, wanted = target_of(image, published.path), target_of(director, published.path)

    assert (released.length, released.hashes) == (wanted.length, wanted.hashes)
    assert released.custom["release"] == wanted.custom["release"]
    assert from_custom(wanted.custom["release"]) == ready.releases.bundles()[0].release
    assert wanted.custom["assignment"] == msgspec.to_builtins(Assignment(rollout="order-1"))


def test_an_empty_desired_state_still_names_its_device_and_when_it_was_issued(ready: World) -> None:
    ready.enrol("cam-1")
    client = director_updater(ready, ready.desired.current["cam-1"])
    client.refresh()
    custom = client._trusted_set.targets.unrecognized_fields["custom"]
    scope = msgspec.convert(custom, DirectorScope)
    assert scope.device == "cam-1"
    assert scope.issued == ready.desired.current["cam-1"].issued_at


def test_a_client_follows_every_publication(ready: World) -> None:
    paths = []
    for content in (b"one", b"two", b"three"):
        (published,) = ready.publish(source(content=content))
        paths.append(published.path)
        client = image_updater(ready)
        client.refresh()
        assert [p for p in paths if client.get_targetinfo(p) is not None] == paths


def test_a_server_that_starts_again_serves_and_continues_what_it_had(ready: World) -> None:
    ready.publish(source(content=b"one"))
    before = (ready.image.online_keys(), ready.director.roots(), ready.image.metadata("timestamp.json"))
    ready.restart()
    assert (ready.image.online_keys(), ready.director.roots(), ready.image.metadata("timestamp.json")) == before
    (second,) = ready.publish(source(content=b"two"))
    client = image_updater(ready)
    client.refresh()
    assert second.version == 2
    assert client.get_targetinfo(second.path) is not None


def test_what_a_cut_publication_left_over_is_neither_served_nor_in_the_way(ready: World) -> None:
    (ready.folder / "image/metadata/2.targets.json").write_bytes(b"cut sho")
    image_updater(ready).refresh()
    (published,) = ready.publish(source())
    client = image_updater(ready)
    client.refresh()
    assert client.get_targetinfo(published.path) is not None


def test_snapshot_and_timestamp_are_renewed_at_half_of_their_life_and_not_before(ready: World) -> None:
    start = now_ms()
    cases = {"one day old": (DAY, False), "four days old": (4 * DAY, True)}
    for name, (age, renewed) in cases.items():
        before = ready.image.metadata("timestamp.json")
        ready.image.renew(start + age)
        assert (ready.image.metadata("timestamp.json") != before) == renewed, name
    image_updater(ready).refresh()


def test_a_desired_state_lives_seven_days(ready: World) -> None:
    desire = ready.director.sign("cam-1", 1, (), DeviceConfig(window_seconds=2), now_ms() - 7 * DAY - 1000)
    with pytest.raises(ExpiredMetadataError):
        director_updater(ready, desire).refresh()


def test_a_device_gets_the_root_steps_after_the_one_it_reported(ready: World) -> None:
    ready.registry.put("fresh", "current")
    ready.registry.births["fresh"] = birth(director_root=1)
    ready.registry.births["current"] = birth(director_root=2)
    change = Change(base=fetch_verified(ready.client, ready.keys), now=now_utc())
    change.renew("director-root")
    change.sign(ready.keys, no_passphrase)
    ready.publishing.publish(change.complete(), now_ms())
    ready.publish(source())
    ready.rollouts.deploy(DeployRequest(model="digits", version=1, all=True), "ann", now_ms())

    assert [len(ready.uplink.retained[d].root) for d in ("fresh", "current")] == [1, 0]
    client = director_updater(ready, ready.desired.current["fresh"])
    client.refresh()
    assert client._trusted_set.root.version == 2
    image_updater(ready).refresh()


def test_signing_keys_and_their_folders_are_open_to_their_owner_only(ready: World) -> None:
    for name in ("director", "image", "authority", "KEYS"):
        assert (ready.folder / name).stat().st_mode & 0o777 == 0o700, name
        for key in (*(ready.folder / name).glob("*.key"), *(ready.folder / name).glob("*.pem")):
            secret = b"PRIVATE" in key.read_bytes()
            assert not secret or key.stat().st_mode & 0o777 == 0o600, key.name
