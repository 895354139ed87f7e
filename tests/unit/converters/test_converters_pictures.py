"""``pack --picture-mean --picture-scale``: the bundle says how a picture becomes its input, or refuses to."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from converters.__main__ import program
from runtime.arrays import read_arrays

DIGITS = Path(__file__).parents[3] / "examples" / "digits"


def run_pack(folder: Path, *more: str) -> Result:
    arrays = read_arrays(DIGITS / "heldout.npz", 1024**2)
    np.savez(folder / "samples.npz", x=(arrays["images"][:20] / 16).astype(np.float32), y=arrays["truth"][:20])
    (folder / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)), encoding="utf-8")
    given = ["--samples", str(folder / "samples.npz"), "--classes", str(folder / "classes.txt"), "--model", "digits"]
    model = str(DIGITS / "v1" / "model.tflite")
    return CliRunner().invoke(program, ["pack", model, *given, "-o", str(folder / "out"), *more])


def test_the_manifest_says_how_and_inspect_shows_it(tmp_path: Path) -> None:
    result = run_pack(
        tmp_path, "--picture-mean", "2", "--picture-scale", "0.00390625", "--picture-resize", "crop", "--json"
    )
    assert (0, "") == (result.exit_code, result.stderr)
    preprocess = json.loads((tmp_path / "out" / "manifest.json").read_text())["preprocess"]
    assert {"mean": [2.0], "scale": [0.00390625], "resize": "crop"} == preprocess
    shown = CliRunner().invoke(program, ["inspect", str(tmp_path / "out")]).stdout
    assert "(pixel - 2) * 0.00390625, crop" in shown


def test_without_the_options_the_manifest_says_nothing(tmp_path: Path) -> None:
    assert 0 == run_pack(tmp_path).exit_code
    assert "preprocess" not in json.loads((tmp_path / "out" / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--picture-mean", "1"), "given together"),
        (("--picture-scale", "1"), "given together"),
        (("--picture-mean", "1", "--picture-scale", "0"), "no scale may be 0"),
        (("--picture-mean", "nan", "--picture-scale", "1"), "must be numbers"),
        (("--picture-mean", "1", "--picture-mean", "2", "--picture-scale", "1"), "need 1 numbers each"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = run_pack(tmp_path, *options)
    assert (2, True) == (result.exit_code, said in result.stderr), result.stderr


def test_the_examples_are_what_they_were() -> None:
    """Their manifests have no such block, and none is written for them."""
    for version in ("v1", "v2", "v3"):
        manifest = DIGITS / version / "manifest.json"
        from protocol.manifest import decode_manifest, encode_manifest

        data = manifest.read_bytes()
        assert hashlib.sha256(data).digest() == hashlib.sha256(encode_manifest(decode_manifest(data))).digest()
