"""Two people, files carried by hand, families, rotation and an HSM: the commands as people give them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from pkcs11.util.ec import encode_named_curve_parameters
from test_trust_delegations import Device
from trust_world import World, folder_of

from fleet_server.cli.errors import CannotSign
from fleet_server.cli.key_folder import KeyFolder
from fleet_server.cli.signers import KeyHolder
from fleet_server.cli.trust_table import fingerprint_of

SOFTHSM = "/usr/lib/softhsm/libsofthsm2.so"


def must(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.output)


def refused(result: Any) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return str(result.stderr)


@pytest.fixture
def bob(ready: World, run: Any) -> Path:
    """Bob's key folder: one key, and no roots yet."""
    folder = ready.folder / "BOB"
    must(run("keys", "make", "bob", "--dir", folder, "--no-passphrase"))
    return folder


# ---------------------------------------------------------------- two people
def test_two_people_sign_one_after_the_other_and_files_are_all_that_travels(
    ready: World, run: Any, bob: Path
) -> None:
    change, keys = ready.folder / "change.json", ready.keys.path
    must(run("keys", "add", "image-targets", bob / "bob.pub", "--threshold", 2, "--keys", keys, "--prepare", change))
    early = refused(run("keys", "upload", change))
    assert "image-targets 2: 1 of 2 signatures; 1 more from: bob (" in early

    mark = fingerprint_of(ready.keys)
    assert "begins from other roots" in refused(
        run("keys", "sign", change, "--keys", bob, "--yes", "--fingerprint", "f")
    )
    shown = must(run("keys", "sign", change, "--keys", bob, "--fingerprint", mark, typed="y\n"))
    assert "image-targets: new key bob (" in shown
    assert "image-targets: 2 of 2 must sign" in shown
    assert f"complete; next: edgewarden keys upload {change}" in shown.replace("\n", " ")
    must(run("keys", "upload", change, "--keys", keys))

    bundle, out = folder_of(ready, "digits"), ready.folder / "OUT"
    alone = refused(run("publish", bundle, "--keys", keys))
    assert "image-targets 3: 1 of 2 signatures; 1 more from: bob (" in alone
    assert "--prepare OUT" in alone
    assert ready.releases.bundles() == []
    must(run("publish", bundle, "--keys", keys, "--prepare", out))
    assert "digits 1 (int8)" in must(run("keys", "sign", out, "--keys", bob, "--yes"))
    for _ in range(2):  # uploading again does no harm
        must(run("keys", "upload", out, "--keys", keys))
    assert Device(ready).sees("models/main/digits-1-int8.ewb")


def test_a_machine_without_network_signs_from_a_file(
    ready: World, run: Any, bob: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched, change, keys = ready.folder / "fetched.json", ready.folder / "change.json", ready.keys.path
    must(run("keys", "fetch", fetched))
    honest = type(ready.client).get
    monkeypatch.setattr(type(ready.client), "get", lambda *_: pytest.fail("this machine has no network"))
    command = ("keys", "rotate", "image-root", "--new", bob / "bob.pub", "--keys", keys, "--offline", fetched)
    assert "needs the server" not in must(run(*command, "--prepare", change))
    mark = fingerprint_of(ready.keys)
    must(run("keys", "sign", change, "--keys", bob, "--yes", "--fingerprint", mark))
    monkeypatch.setattr(type(ready.client), "get", honest)
    must(run("keys", "upload", change, "--keys", keys))
    assert [row["version"] for row in rows(run, "--dir", keys)] == [2, 1, 1]
    Device(ready).look_up()


def test_without_a_server_a_change_must_be_written_to_a_file(ready: World, run: Any) -> None:
    fetched = ready.folder / "fetched.json"
    must(run("keys", "fetch", fetched))
    said = refused(run("keys", "renew", "--keys", ready.keys.path, "--offline", fetched))
    assert "needs the server; write a file with --prepare instead" in said


def test_a_change_that_someone_overtook_is_not_signed_any_more(ready: World, run: Any, bob: Path) -> None:
    change, keys = ready.folder / "change.json", ready.keys.path
    must(run("keys", "add", "image-targets", bob / "bob.pub", "--keys", keys, "--prepare", change))
    must(run("keys", "renew", "image-root", "--keys", keys))
    must(run("keys", "fetch", ready.folder / "now.json"))
    broken = json.loads(change.read_text())
    broken["base"] = json.loads((ready.folder / "now.json").read_text())
    change.write_text(json.dumps(broken))
    assert "image-root: the file has version 2, 3 is next" in refused(
        run("keys", "sign", change, "--keys", keys, "-y")
    )


def test_a_tampered_change_is_shown_for_what_it_is_and_not_taken(ready: World, run: Any) -> None:
    change, keys = ready.folder / "change.json", ready.keys.path
    must(run("keys", "renew", "image-targets", "--keys", keys, "--prepare", change))
    broken = json.loads(change.read_text())
    broken["base"]["files"] = dict.fromkeys(broken["base"]["files"], "e30=")
    change.write_text(json.dumps(broken))
    other = KeyFolder(ready.folder / "OTHER")
    for repository in ("image", "director"):
        other.keep_root(repository, 1, ready.keys.roots(repository)[0])
    assert "not TUF metadata" in refused(run("keys", "sign", change, "--keys", other.path, "--yes"))


def test_who_holds_no_key_that_is_asked_for_is_told_so(ready: World, run: Any, bob: Path) -> None:
    change = ready.folder / "change.json"
    must(run("keys", "renew", "image-targets", "--keys", ready.keys.path, "--prepare", change))
    said = refused(run("keys", "sign", change, "--keys", bob, "-y", "--fingerprint", fingerprint_of(ready.keys)))
    assert f"no key of {bob} is asked for here" in said


# ---------------------------------------------------------------- changes
def test_a_family_is_delegated_and_publishes_yanks_and_raises_its_floor(ready: World, run: Any, bob: Path) -> None:
    keys, change = ready.keys.path, ready.folder / "change.json"
    must(run("keys", "delegate", "vision", bob / "bob.pub", "--keys", keys, "--prepare", change))
    must(run("keys", "sign", change, "--keys", bob, "--yes", "--fingerprint", fingerprint_of(ready.keys)))
    must(run("keys", "upload", change))
    for n in (1, 2):
        bundle = folder_of(ready, f"seer-{n}", model="seer", content=b"%d" % n)
        assert f"published seer {n}" in must(run("publish", bundle, "--keys", bob, "--family", "vision"))
    ear = folder_of(ready, "ear", model="ear")
    assert "holds no key that signs for family main" in refused(run("publish", ear, "--keys", bob))
    must(run("yank", "seer", 1, "--reason", "blind", "--keys", bob))
    must(run("floor", "seer", 2, "--keys", bob))
    cases = {
        "yanked twice": (("yank", "seer", 1, "--reason", "again"), "is yanked already"),
        "nothing to yank": (("yank", "seer", 9, "--reason", "x"), "seer 9 is not published"),
        "a floor that does not grow": (("floor", "seer", 2), "the floor of seer is 2 already; it only grows"),
        "a floor over everything": (("floor", "seer", 3), "floor 3 is above 2"),
        "a floor of nothing": (("floor", "nose", 1), "no version of nose is published"),
        "delegated twice": (("keys", "delegate", "vision", bob / "bob.pub"), "vision is delegated already"),
        "a reserved name": (("keys", "delegate", "main", bob / "bob.pub"), "no name for a family"),
        "no such role": (("keys", "renew", "visoin"), "there is no role 'visoin'; the roles are image-root, "),
        "the last key": (("keys", "revoke", "vision", "bob"), "vision: 0 keys cannot give 1 signatures"),
        "nobody's key": (("keys", "revoke", "vision", "eve"), "'eve' names 0 of its keys, not one; they are: bob ("),
    }
    for name, (command, words) in cases.items():
        assert words in refused(run(*command, "--keys", bob)), name
    assert {row["name"] for row in rows(run)} >= {"vision", "image-targets", "image-root", "director-root"}
    assert ready.image.hindrance(ready.releases.bundles("seer")[0].sha256) == "seer 1 (int8) was yanked: blind"


@pytest.mark.parametrize("role", ["image-root", "image-targets", "director-root"])
def test_a_key_is_rotated_in_one_command_and_the_new_one_signs_from_then_on(
    world: World, run: Any, role: str
) -> None:
    secret, keys = world.folder / "secret", world.keys.path
    secret.write_text("pass\n")
    must(run("keys", "init", "--dir", keys, "--passphrase-file", secret, "--owner", "ann"))
    must(run("keys", "rotate", role, "--keys", keys, "--passphrase-file", secret))
    assert b"ENCRYPTED" in (keys / f"{role}-2.pem").read_bytes()
    (keys / f"{role}.pem").unlink()
    must(run("keys", "renew", "--keys", keys, "--passphrase-file", secret))
    must(run("publish", folder_of(world, "digits"), "--keys", keys, "--passphrase-file", secret))
    assert Device(world).sees("models/main/digits-1-int8.ewb")
    (row,) = [row for row in rows(run, "--dir", keys) if row["name"] == role]
    assert [holder.split(" (")[0] for holder in row["holders"]] == ["ann"]


def test_the_servers_own_keys_are_rotated_in_one_command(ready: World, run: Any) -> None:
    device, before = Device(ready), ready.director.online_keys()
    device.look_up()
    must(run("keys", "rotate", "online", "--keys", ready.keys.path))
    device.look_up()
    assert ready.director.online_keys() != before
    assert len(ready.director.roots()) == 2


def test_a_key_is_never_written_over(ready: World, run: Any, bob: Path) -> None:
    again = run("keys", "make", "bob", "--dir", bob, "--no-passphrase")
    assert "has a key bob already; keys are never written over" in refused(again)
    assert "key name '../bob' is not legal" in refused(run("keys", "make", "../bob", "--dir", bob, "--no-passphrase"))


# ---------------------------------------------------------------- status
def test_status_tells_the_days_the_signers_and_the_command(ready: World, run: Any) -> None:
    of_server = {row["name"]: row for row in rows(run)}
    assert of_server["image-targets"]["command"] == "edgewarden keys renew image-targets --keys KEYS"
    assert of_server["image-timestamp"]["command"] == ""
    assert of_server["image-root"]["days_left"] in (364, 365)
    shown = must(run("keys", "status", "--dir", ready.keys.path))
    assert f"fingerprint of the first roots: {fingerprint_of(ready.keys)}" in shown


def test_status_warns_of_what_expires_soon(ready: World, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet_server.core.expiry.OFFLINE_WARN_DAYS", 100)
    for options in ((), ("--dir", ready.keys.path)):
        shown = " ".join(must(run("keys", "status", *options)).split())
        assert "sign it again with: edgewarden keys renew image-targets --keys KEYS" in shown
        assert "renew image-root" not in shown


def rows(run: Any, *options: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(must(run("keys", "status", "--json", *options)))
    return found


# ---------------------------------------------------------------- keys elsewhere
@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SoftHSM token with the P-256 keys 7, 8 and 9; its PIN is in the file returned."""
    (tmp_path / "tokens").mkdir()
    config, pin = tmp_path / "softhsm2.conf", tmp_path / "pin"
    config.write_text(
        f"directories.tokendir = {tmp_path / 'tokens'}\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    pin.write_text("1234\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(config))
    monkeypatch.setenv("PYKCS11LIB", SOFTHSM)
    make = ["softhsm2-util", "--init-token", "--free", "--label", "release", "--pin", "1234", "--so-pin", "5678"]
    subprocess.run(make, check=True, capture_output=True, env=dict(os.environ))
    library = pkcs11.lib(SOFTHSM)
    library.reinitialize()
    with library.get_token(token_label="release").open(user_pin="1234", rw=True) as session:
        curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        domain = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
        for number in (7, 8, 9):
            domain.generate_keypair(id=bytes([number]), label=f"key {number}", store=True)
    return pin


def test_all_release_keys_on_an_hsm(world: World, run: Any, token: Path) -> None:
    keys = world.keys.path
    for number, name in ((7, "image-root"), (8, "image-targets"), (9, "director-root")):
        uri = f"hsm:{number}?label=release"
        must(run("keys", "import", uri, "--name", name, "--dir", keys, "--passphrase-file", token))
    must(run("keys", "init", "--dir", keys, "--passphrase-file", token))
    assert list(keys.glob("*.pem")) == []
    must(run("publish", folder_of(world, "digits"), "--keys", keys, "--passphrase-file", token))
    must(run("keys", "renew", "--keys", keys, "--passphrase-file", token))
    assert Device(world).sees("models/main/digits-1-int8.ewb")


def test_a_key_that_cannot_be_used_is_named(run: Any, token: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong-pin"
    wrong.write_text("9999")
    folder = tmp_path / "K"
    must(run("keys", "import", "hsm:7?label=release", "--name", "k", "--dir", folder, "--passphrase-file", token))
    (held,) = KeyFolder(folder).held()
    with pytest.raises(CannotSign, match=r"hsm:7\?label=release: PinIncorrect"):
        KeyHolder(held.uri, held.public, wrong.read_bytes).sign(b"data")
    cases = {
        "hsm:6?label=release": "could not find ECDSA key",
        "hsm:7?label=other": "No PKCS#11 token found for label other",
        "hsm:seven": "invalid literal",
        "awskms:alias/release": "pip install 'securesystemslib[awskms]'",
        "gcpkms:projects/p": "pip install 'securesystemslib[gcpkms]'",
        "azurekms:vault/key": "pip install 'securesystemslib[azurekms]'",
        "vault:key": "no such kind of key; known are file:, hsm:, awskms:, gcpkms:, azurekms:",
        f"file:{tmp_path}/absent.pem": "absent.pem is not there",
    }
    for uri, words in cases.items():
        said = refused(run("keys", "import", uri, "--name", "n", "--dir", folder, "--passphrase-file", token))
        assert words in said, uri
        assert uri in said or "absent" in said, uri
