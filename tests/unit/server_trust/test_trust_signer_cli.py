"""The offline signer: keys, roots, publishing, and what it refuses to sign."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trust_world import World, bundle_bytes, folder_of, no_passphrase, source
from tuf.api.metadata import Metadata, Targets

from fleet_server.api_types import OnlineKeysView
from fleet_server.cli.errors import KeysExist, KeysMissing, NotInitialised, NotTrusted, WrongPassphrase
from fleet_server.cli.key_folder import IMAGE_TARGETS, KeyFolder
from fleet_server.cli.publish import BadSource, read_source
from fleet_server.cli.session import ApiError
from fleet_server.cli.signing import fetch_verified, now_utc, sign_first


# ---------------------------------------------------------------- commands
def test_init_makes_keys_signs_both_roots_and_makes_the_server_ready(world: World, run: Any) -> None:
    result = run("keys", "init", "--dir", world.keys.path, "--no-passphrase")
    assert result.exit_code == 0, result.output
    assert world.image.first_root() == world.keys.roots("image")[0]
    assert list(world.director.roots()) == world.keys.roots("director")
    for name in ("image-root", "image-targets", "director-root"):
        assert (world.keys.path / f"{name}.pem").stat().st_mode & 0o777 == 0o600


def test_init_never_writes_over_keys(world: World, run: Any) -> None:
    run("keys", "init", "--dir", world.keys.path, "--no-passphrase")
    before = (world.keys.path / "image-root.pem").read_bytes()
    result = run("keys", "init", "--dir", world.keys.path, "--no-passphrase")
    assert (result.exit_code, (world.keys.path / "image-root.pem").read_bytes()) == (1, before)
    assert "never written over" in result.stderr


def test_init_makes_no_keys_for_a_server_that_has_roots_of_others(ready: World, run: Any) -> None:
    result = run("keys", "init", "--dir", ready.folder / "MORE", "--no-passphrase")
    assert (result.exit_code, (ready.folder / "MORE").exists()) == (1, False)
    assert "has trust roots already" in result.stderr


def test_init_works_without_a_network_from_a_file_of_online_keys(world: World, run: Any) -> None:
    file, secret = world.folder / "online.json", world.folder / "secret"
    secret.write_text("correct horse\n")
    assert run("keys", "online", file).exit_code == 0
    options = ("--dir", world.keys.path, "--online-keys", file, "--passphrase-file", secret)
    assert run("keys", "init", *options).exit_code == 0
    assert world.image.first_root() is None
    assert b"ENCRYPTED" in (world.keys.path / "image-root.pem").read_bytes()
    for _ in range(2):
        assert run("keys", "upload", "--dir", world.keys.path).exit_code == 0
    assert world.image.first_root() is not None


def test_a_passphrase_is_asked_for_twice_when_made_and_once_when_used(world: World, run: Any) -> None:
    made = run("keys", "init", "--dir", world.keys.path, typed="pass\npass\n")
    assert made.exit_code == 0, made.output
    bundle = folder_of(world, "digits")
    wrong = run("publish", bundle, "--keys", world.keys.path, typed="other\n")
    right = run("publish", bundle, "--keys", world.keys.path, "--json", typed="pass\n")
    assert wrong.exit_code == 1
    assert "the passphrase does not open" in wrong.stderr
    assert right.exit_code == 0, right.output
    assert '"version":1' in right.stdout


def test_publish_gives_the_next_version_and_says_so_as_json(world: World, run: Any) -> None:
    world.ready()
    for version in (1, 2):
        bundle = folder_of(world, f"digits-{version}", content=b"%d" % version)
        result = run("publish", bundle, "--keys", world.keys.path, "--title", "Digits", "--json")
        (published,) = json.loads(result.stdout)
        assert (published["model"], published["version"]) == ("digits", version)
    assert {b.release.title for b in world.releases.bundles()} == {"Digits"}


def test_publish_takes_bundle_files_and_families(world: World, run: Any) -> None:
    world.ready()
    file = world.folder / "digits.ewb"
    file.write_bytes(bundle_bytes(source(), 0))
    result = run("publish", file, "--keys", world.keys.path, "--family", "vision")
    assert result.exit_code == 0, result.output
    assert "published digits 1 (int8)" in result.stdout
    assert world.releases.bundles()[0].path == "models/vision/digits-1-int8.ewb"


def test_status_shows_what_expires(world: World, run: Any) -> None:
    world.ready()
    rows = json.loads(run("keys", "status", "--dir", world.keys.path, "--json").stdout)
    assert [(r["name"], r["version"], r["days_left"] in (89, 90, 364, 365)) for r in rows] == [
        ("image-root", 1, True),
        ("director-root", 1, True),
        ("image-targets", 1, True),
    ]
    assert "image-targets" in run("keys", "status", "--dir", world.keys.path).stdout


def test_renew_signs_everything_again(world: World, run: Any) -> None:
    world.ready()
    assert run("keys", "renew", "--dir", world.keys.path).exit_code == 0
    assert len(world.director.roots()) == 2
    rows = json.loads(run("keys", "status", "--dir", world.keys.path, "--json").stdout)
    assert [row["version"] for row in rows] == [2, 2, 2]


def test_errors_are_one_sentence_on_stderr(world: World, run: Any) -> None:
    empty = world.folder / "empty"
    empty.mkdir()
    bundle = folder_of(world, "digits")
    cases = {
        "no keys": (("publish", bundle, "--keys", empty), "keys init"),
        "no manifest": (("publish", empty, "--keys", empty), f"{empty} has no manifest.json"),
        "no such file": (("publish", world.folder / "absent.ewb", "--keys", empty), "absent.ewb"),
        "no status": (("keys", "status", "--dir", empty), "has no image root"),
        "no passphrase file": (
            ("keys", "init", "--dir", empty, "--passphrase-file", "/absent"),
            "cannot read the passphrase file",
        ),
    }
    for name, (command, words) in cases.items():
        result = run(*command)
        assert result.exit_code == 1, name
        assert words in result.stderr, name
        assert "Traceback" not in result.output, name


def test_publishing_to_a_server_without_roots_says_who_must_act(world: World, run: Any) -> None:
    strange = World(world.folder / "other").ready()
    result = run("publish", folder_of(world, "digits"), "--keys", strange.keys.path)
    assert result.exit_code == 1
    assert "no trust roots yet" in result.stderr


# ---------------------------------------------------------------- what is never signed
def test_keys_with_a_passphrase_open_with_that_passphrase_only(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path)
    folder.make_keys(b"right")
    assert folder.signer(IMAGE_TARGETS, lambda: b"right").public_key.keytype == "ed25519"
    with pytest.raises(WrongPassphrase):
        folder.signer(IMAGE_TARGETS, lambda: b"wrong")
    with pytest.raises(KeysExist):
        folder.make_keys(b"right")
    with pytest.raises(KeysMissing):
        KeyFolder(tmp_path / "elsewhere").signer(IMAGE_TARGETS, no_passphrase)


def test_nothing_is_signed_on_top_of_targets_of_other_keys(ready: World) -> None:
    other = World(ready.folder / "other").ready()
    with pytest.raises(NotTrusted, match="not signed as root 1"):
        fetch_verified(other.client, ready.keys)


def test_nothing_is_signed_on_top_of_changed_targets(ready: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.publish(source())
    honest = ready.client.get_bytes
    monkeypatch.setattr(ready.client, "get_bytes", lambda path: honest(path).replace(b'"digits"', b'"fidget"'))
    with pytest.raises(NotTrusted):
        fetch_verified(ready.client, ready.keys)


def test_nothing_is_signed_on_top_of_targets_older_than_seen(ready: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.publish(source())
    status = msgspec.structs.replace(ready.client._status(), targets_version=1)
    monkeypatch.setattr(ready.client, "_status", lambda: status)
    with pytest.raises(NotTrusted, match="shows targets 1, but 2 was seen"):
        fetch_verified(ready.client, ready.keys)


def test_a_server_that_numbers_targets_wrongly_is_not_believed(ready: World, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ready.image.metadata("1.targets.json")
    status = msgspec.structs.replace(ready.client._status(), targets_version=2)
    monkeypatch.setattr(ready.client, "_status", lambda: status)
    monkeypatch.setattr(ready.client, "get_bytes", lambda path: honest)
    with pytest.raises(NotTrusted, match="say that they are 1"):
        fetch_verified(ready.client, ready.keys)


def test_expired_targets_can_still_be_published_on(ready: World, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = ready.keys.signer(IMAGE_TARGETS, no_passphrase)
    expired = Metadata(Targets(version=1, expires=now_utc().replace(year=2020)))
    expired.sign(signer)
    monkeypatch.setattr(ready.client, "get_bytes", lambda path: expired.to_bytes())
    assert fetch_verified(ready.client, ready.keys).targets.version == 1


def test_a_server_without_roots_is_not_published_to(world: World) -> None:
    world.keys.make_keys(None)
    sign_first(world.keys, world.client.get("/trust/online-keys", OnlineKeysView), no_passphrase, now_utc())
    with pytest.raises(NotInitialised):
        fetch_verified(world.client, world.keys)


def test_when_someone_else_published_in_between_it_is_done_once_more_on_top(ready: World) -> None:
    colleague = KeyFolder(ready.folder / "COLLEAGUE")
    for name in (
        "image-root.pem",
        "image-targets.pem",
        "director-root.pem",
        "image/1.root.json",
        "image/targets.json",
    ):
        target = colleague.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ready.keys.path / name).read_bytes())
    colleague.keep_root("director", 1, ready.keys.roots("director")[0])
    publisher = ready.publisher(colleague)
    ready.client.before_publish.append(lambda: publisher.publish([source(content=b"theirs")]))
    (mine,) = ready.publish(source(content=b"mine"))
    assert mine.version == 2
    assert [b.release.version for b in ready.releases.bundles()] == [1, 2]


def test_a_refusal_that_has_another_cause_is_not_tried_again(ready: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(path: str, body: Any, kind: Any) -> Any:
        tried.append(path)
        raise ApiError(409, "refused", "for a reason")

    monkeypatch.setattr(ready.client, "post", refuse)
    with pytest.raises(ApiError, match="for a reason"):
        ready.publish(source())
    assert len(tried) == 1


def test_sources_that_cannot_be_published_are_named(ready: World) -> None:
    damaged = folder_of(ready, "damaged")
    (damaged / "model.tflite").write_bytes(b"other")
    numbered = folder_of(ready, "numbered", version=5)
    gap = folder_of(ready, "gap")
    (gap / "golden.npz").unlink()
    cases = {
        "a member that is not what the manifest lists": ([damaged], "damaged: model.tflite"),
        "a manifest that has another version already": ([numbered], "numbered: its manifest has version 5"),
        "a member that is missing": ([gap], "golden.npz"),
        "twice the same variant": ([numbered, damaged], "publish one after the other"),
    }
    for name, (paths, words) in cases.items():
        with pytest.raises(BadSource, match=words):
            ready.publish(*(read_source(path) for path in paths))
        assert ready.releases.bundles() == [], name
