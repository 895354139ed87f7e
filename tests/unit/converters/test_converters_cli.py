"""``edgewarden-convert`` as a person meets it: its output, and a clear refusal for every kind of bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from converters.__main__ import program
from runtime.arrays import read_arrays

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "examples" / "digits"

Inputs = dict[str, Path]  # model, samples, classes


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    arrays = read_arrays(DIGITS / "heldout.npz", 1024**2)
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=(arrays["images"][:40] / 16).astype(np.float32), y=arrays["truth"][:40].astype(np.int64))
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"{digit}\n" for digit in range(10)), encoding="utf-8")
    model = tmp_path / "digits.tflite"
    model.write_bytes((DIGITS / "v1" / "model.tflite").read_bytes())
    return {"model": model, "samples": samples, "classes": classes}


def run_pack(inputs: Inputs, output: Path, *more: str) -> Result:
    given = ["--samples", str(inputs["samples"]), "--classes", str(inputs["classes"]), "--model", "digits"]
    return CliRunner().invoke(program, ["pack", str(inputs["model"]), *given, "-o", str(output), *more])


def run_inspect(path: Path, *more: str) -> Result:
    return CliRunner().invoke(program, ["inspect", str(path), *more])


# ---------------------------------------------------------------- what works
def test_pack_writes_a_folder_and_a_file_and_inspect_shows_both(inputs: Inputs, tmp_path: Path) -> None:
    folder, bundle = tmp_path / "out", tmp_path / "digits.ewb"
    result = run_pack(inputs, folder, "--title", "Digits [1]", "--bundle", str(bundle), "--lineage", "recipe=by hand")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "Ran on litert and tflite-runtime: " in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["golden.npz", "manifest.json", "model.tflite"]
    shown = [run_inspect(path) for path in (folder, bundle)]
    assert [result.exit_code for result in shown] == [0, 0]
    assert shown[0].stdout == shown[1].stdout
    for word in ("Digits [1]", "digits (not published) int8", "recipe = by hand", "n = 40"):
        assert word in shown[0].stdout


def test_json_is_the_manifest_and_what_was_found(inputs: Inputs, tmp_path: Path) -> None:
    result = run_pack(inputs, tmp_path / "out", "--json")
    report = json.loads(result.stdout)
    assert (report["folder"], report["bundle"], report["samples"]) == (str(tmp_path / "out"), None, 40)
    assert report["agreeing"] >= 38
    assert report["manifest"] == json.loads(run_inspect(tmp_path / "out", "--json").stdout)


def test_the_program_runs_as_a_module_and_loads_neither_tensorflow_nor_a_server() -> None:
    probe = "import sys, converters.__main__; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"tensorflow", "litestar", "fleet_server", "agent"} & set(modules.stdout.split())
    shown = subprocess.run(
        [sys.executable, "-m", "converters", "inspect", str(DIGITS / "v1")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "digits, first training run" in shown.stdout


# ---------------------------------------------------------------- what is refused by pack
def with_samples(inputs: Inputs, **changes: np.ndarray) -> None:
    arrays = read_arrays(inputs["samples"], 1024**2)
    np.savez(inputs["samples"], **{**arrays, **changes})


def not_a_model(inputs: Inputs) -> None:
    inputs["model"].write_text("not a model", encoding="utf-8")


def empty_model(inputs: Inputs) -> None:
    inputs["model"].write_bytes(b"")


def missing_model(inputs: Inputs) -> None:
    inputs["model"].unlink()


def missing_samples(inputs: Inputs) -> None:
    inputs["samples"].unlink()


def missing_classes(inputs: Inputs) -> None:
    inputs["classes"].unlink()


def wrong_shape(inputs: Inputs) -> None:
    with_samples(inputs, x=np.zeros((40, 8, 8), np.float32))


def too_few_classes(inputs: Inputs) -> None:
    inputs["classes"].write_text("\n".join("0123456789"[:9]), encoding="utf-8")
    with_samples(inputs, y=np.zeros(40, np.int64))


def too_many_classes(inputs: Inputs) -> None:
    inputs["classes"].write_text("\n".join("0123456789x"), encoding="utf-8")


def same_class_twice(inputs: Inputs) -> None:
    inputs["classes"].write_text("\n".join("0123456788"), encoding="utf-8")


def empty_class_name(inputs: Inputs) -> None:
    inputs["classes"].write_text("0\n\n2\n", encoding="utf-8")


def classes_in_another_encoding(inputs: Inputs) -> None:
    inputs["classes"].write_bytes("größer\n".encode("latin-1"))


def pickled_samples(inputs: Inputs) -> None:
    np.savez(inputs["samples"], x=np.array([{}], dtype=object), y=np.array([0]))


def empty_samples(inputs: Inputs) -> None:
    with_samples(inputs, x=np.zeros((0, 8, 8, 1), np.float32), y=np.zeros(0, np.int64))


def too_few_samples(inputs: Inputs) -> None:
    with_samples(inputs, x=np.zeros((7, 8, 8, 1), np.float32), y=np.zeros(7, np.int64))


def nan_samples(inputs: Inputs) -> None:
    x = np.zeros((40, 8, 8, 1), np.float32)
    x[3, 1, 1, 0] = np.nan
    with_samples(inputs, x=x)


def text_samples(inputs: Inputs) -> None:
    with_samples(inputs, x=np.full((40, 8, 8, 1), "7"))


def no_truth(inputs: Inputs) -> None:
    np.savez(inputs["samples"], x=np.zeros((40, 8, 8, 1), np.float32))


def truth_of_other_length(inputs: Inputs) -> None:
    with_samples(inputs, y=np.zeros(39, np.int64))


def truth_that_is_real(inputs: Inputs) -> None:
    with_samples(inputs, y=np.full(40, 0.5))


def truth_without_a_name(inputs: Inputs) -> None:
    with_samples(inputs, y=np.full(40, 10))


def not_an_npz(inputs: Inputs) -> None:
    inputs["samples"].write_text("x,y", encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "file", "message"),
    [
        (not_a_model, "model", "litert cannot load it"),
        (empty_model, "model", "0 bytes"),
        (missing_model, "model", "there is no such file"),
        (missing_samples, "samples", "there is no such file"),
        (missing_classes, "classes", "there is no such file"),
        (wrong_shape, "samples", "x: a sample has shape (8, 8), input 'image' takes (8, 8, 1)"),
        (too_few_classes, "classes", "9 class names, but output 'scores'"),
        (too_many_classes, "classes", "11 class names, but output 'scores'"),
        (same_class_twice, "classes", "must be different"),
        (empty_class_name, "classes", "none empty"),
        (classes_in_another_encoding, "classes", "not UTF-8"),
        (pickled_samples, "samples", "pickle"),
        (empty_samples, "samples", "x: 0 samples are too few"),
        (too_few_samples, "samples", "x: 7 samples are too few"),
        (nan_samples, "samples", "x: 1 samples contain NaN or infinity, the first is number 3"),
        (text_samples, "samples", "x: numbers with the samples along the first axis are expected"),
        (no_truth, "samples", "array y is missing; there are ['x']"),
        (truth_of_other_length, "samples", "y: 40 whole numbers are expected, not int64 (39,)"),
        (truth_that_is_real, "samples", "y: 40 whole numbers are expected, not float64"),
        (truth_without_a_name, "samples", "y: classes 10…10 occur, but there are names for 0…9"),
        (not_an_npz, "samples", "not a readable .npz"),
    ],
)
def test_pack_refuses_bad_input_and_names_file_and_field(
    inputs: Inputs, tmp_path: Path, spoil: Callable[[Inputs], None], file: str, message: str
) -> None:
    spoil(inputs)
    result = run_pack(inputs, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(inputs[file]) in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "Int 8"], "manifest.json: variant 'Int 8' is not legal"),
        (["--lineage", "no pair"], "--lineage 'no pair': KEY=VALUE is expected"),
        (["--tolerance", "-1"], "--tolerance"),
    ],
)
def test_pack_refuses_bad_options(inputs: Inputs, tmp_path: Path, options: list[str], message: str) -> None:
    result = run_pack(inputs, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_folder_that_cannot_be_written_is_a_clear_error(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way", encoding="utf-8")
    result = run_pack(inputs, tmp_path / "out")
    assert (result.exit_code, str(tmp_path / "out") in result.stderr) == (2, True)


# ---------------------------------------------------------------- what is refused by inspect
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "bundle"
    target.mkdir()
    for path in (DIGITS / "v1").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def change_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.tflite").read_bytes())
    content[-1] ^= 1
    (folder / "model.tflite").write_bytes(content)


def lose_a_member(folder: Path) -> None:
    (folder / "golden.npz").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def add_a_field(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "colour": "red"}), encoding="utf-8")


def inflate_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b" " * (1024 * 1024 + 1))


@pytest.mark.parametrize(
    ("spoil", "file", "message"),
    [
        (change_a_byte, "model.tflite", "the manifest says"),
        (lose_a_member, "golden.npz", "the manifest lists this file, but it is missing"),
        (lose_the_manifest, "manifest.json", "this is not a bundle folder"),
        (add_a_field, "manifest.json", "colour"),
        (inflate_the_manifest, "manifest.json", "over the cap"),
    ],
)
def test_inspect_refuses_a_folder_that_is_not_what_its_manifest_says(
    folder: Path, spoil: Callable[[Path], None], file: str, message: str
) -> None:
    spoil(folder)
    result = run_inspect(folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert str(folder / file) in result.stderr
    assert message in result.stderr


def test_inspect_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "x.ewb").write_bytes(b"nothing")
    for path, message in (
        (tmp_path / "x.ewb", "not a readable bundle"),
        (tmp_path / "none", "no such file or folder"),
    ):
        result = run_inspect(path)
        assert (result.exit_code, str(path) in result.stderr, message in result.stderr) == (2, True, True)
