"""The release team's commands over HTTP, against the REST API as it is served."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from web_world import Web, running_web

from fleet_server.cli.__main__ import app
from protocol.bundle import digest_of
from protocol.manifest import Golden, Manifest, Needs, TensorSpec, encode_manifest
from protocol.states import RuntimeName


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    server = tmp_path / "server"
    server.mkdir()
    with running_web(server) as running:
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("EDGEWARDEN_SERVER", running.url)
        monkeypatch.setenv("EDGEWARDEN_PASSWORD", "correct horse")
        yield running


def edgewarden(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def bundle_folder(at: Path, model: str) -> Path:
    """A bundle folder as the converters leave it."""
    at.mkdir()
    members = {"model.tflite": b"weights", "golden.npz": b"golden"}
    tensor = TensorSpec(name="x", dtype="INT8", shape=(-1, 2), scale=0.5, zero_point=0)
    manifest = Manifest(
        model=model,
        variant="int8",
        inputs=(tensor,),
        outputs=(msgspec.structs.replace(tensor, name="y"),),
        classes=("zero", "one"),
        needs=Needs(memory=1_000_000, runtimes=(RuntimeName.LITERT,)),
        golden=Golden(samples=1, tolerance=1.0),
        members={name: digest_of(data) for name, data in members.items()},
    )
    (at / "manifest.json").write_bytes(encode_manifest(manifest))
    for name, data in members.items():
        (at / name).write_bytes(data)
    return at


def test_two_people_run_a_family_from_its_delegation_to_a_yank(web: Web, tmp_path: Path) -> None:
    ann, bob = tmp_path / "ANN", tmp_path / "BOB"
    edgewarden("keys", "init", "--dir", ann, "--no-passphrase", "--owner", "ann")
    edgewarden("keys", "make", "bob", "--dir", bob, "--no-passphrase")
    edgewarden("keys", "make", "ann-vision", "--dir", ann, "--no-passphrase", "--owner", "ann")
    mark = edgewarden("keys", "status", "--dir", ann).rpartition(" ")[2]
    publics = (ann / "ann-vision.pub", bob / "bob.pub")

    def pass_on(*command: object) -> str:
        edgewarden(*command, "--keys", ann, "--prepare", tmp_path / "change")
        shown = edgewarden("keys", "sign", tmp_path / "change", "--keys", bob, "--yes", "--fingerprint", mark)
        edgewarden("keys", "upload", tmp_path / "change", "--keys", ann)
        return shown

    assert "delegates vision: models/vision/*" in pass_on("keys", "delegate", "vision", *publics, "--threshold", 2)
    out = tmp_path / "OUT"
    command = ("models", "publish", bundle_folder(tmp_path / "seer", "seer"), "--family", "vision", "--keys", ann)
    assert "vision 2: 1 of 2 signatures; 1 more from: bob (" in edgewarden(*command, code=1)
    edgewarden(*command, "--prepare", out)
    edgewarden("keys", "sign", out, "--keys", bob, "--yes")
    edgewarden("keys", "upload", out)
    assert [v["family"] for v in json.loads(edgewarden("models", "list", "--json"))] == ["vision"]

    pass_on("models", "yank", "seer", 1, "--reason", "sees nothing")
    pass_on("models", "floor", "seer", 1)
    (listed,) = json.loads(edgewarden("models", "list", "--json"))
    assert listed["hindrance"] == "seer 1 (int8) was yanked: sees nothing"
    assert "was yanked: sees nothing" in edgewarden("deploy", "seer", 1, "--all", code=1)


def test_the_servers_keys_are_rotated_and_it_says_what_expires(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "KEYS"
    edgewarden("keys", "init", "--dir", keys, "--no-passphrase")
    before = web.parts.image.online_keys()
    edgewarden("keys", "rotate", "online", "--keys", keys)
    assert web.parts.image.online_keys() != before
    rows = json.loads(edgewarden("keys", "status", "--json"))
    assert {row["name"]: row["version"] for row in rows if row["name"].endswith("-root")} == {
        "director-root": 2,
        "image-root": 2,
    }
    assert "sign it again" not in edgewarden("status")
    monkeypatch.setattr("fleet_server.core.expiry.OFFLINE_WARN_DAYS", 100)
    assert "image-targets expires in" in edgewarden("status")
