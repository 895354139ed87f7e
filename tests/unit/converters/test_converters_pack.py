"""Packing real models, on both runtimes: what a bundle says is what was measured."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from converters import trial
from converters.inspection import inspect
from converters.pack import Agreement, Order, Packed, choose_golden, pack, write_file, write_folder
from converters.refusal import Refused
from protocol.bundle import digest_of
from protocol.manifest import UNPUBLISHED, Calibrator, decode_manifest
from protocol.states import RuntimeName
from runtime.arrays import read_arrays
from runtime.calibrator import probabilities, top_class
from runtime.golden import check_golden
from runtime.interpreter import open_model
from runtime.preprocess import quantise

DIGITS = Path(__file__).parents[3] / "examples" / "digits"
MODELS = Path(__file__).parent / "models"

both_runtimes = pytest.mark.parametrize("runtime", [name.value for name in RuntimeName])


def write_samples(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    np.savez(path, x=x, y=y)
    return path


def write_classes(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return path


def held_out() -> tuple[np.ndarray, np.ndarray]:
    arrays = read_arrays(DIGITS / "heldout.npz", 1024**2)
    return (arrays["images"] / 16).astype(np.float32), arrays["truth"].astype(np.int64)


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    folder = tmp_path_factory.mktemp("order")
    x, y = held_out()
    return Order(
        model=DIGITS / "v2" / "model.tflite",
        samples=write_samples(folder / "samples.npz", x, y),
        classes=write_classes(folder / "classes.txt", [str(digit) for digit in range(10)]),
        name="digits",
        title="a title",
        device_classes=("x86_64",),
        lineage={"recipe": "by hand"},
    )


@pytest.fixture(scope="module")
def packed(order: Order) -> Packed:
    return pack(order)


def float_order(folder: Path, model: str) -> Order:
    """Return an order for one of the tiny float models; the first class wins in the first sample, and so on."""
    x = np.tile(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], np.float32), (4, 1))
    return Order(
        model=MODELS / f"{model}.tflite",
        samples=write_samples(folder / "samples.npz", x, np.tile([0, 1, 2], 4)),
        classes=write_classes(folder / "classes.txt", ["left", "right", "up"]),
        name="tiny",
        variant="fp32",
    )


# ---------------------------------------------------------------- what the manifest says
def test_a_bundle_is_not_published_yet_and_says_what_it_was_told(packed: Packed) -> None:
    manifest = packed.manifest
    assert (manifest.model, manifest.version, manifest.variant) == ("digits", UNPUBLISHED, "int8")
    assert (manifest.title, manifest.needs.device_classes) == ("a title", ("x86_64",))
    assert manifest.classes == tuple(str(digit) for digit in range(10))


def test_the_members_are_the_model_as_given_and_the_golden_samples(packed: Packed, order: Order) -> None:
    assert packed.members["model.tflite"] == order.model.read_bytes()
    assert packed.manifest.members == {name: digest_of(content) for name, content in packed.members.items()}
    assert set(packed.members) == {"model.tflite", "golden.npz"}


def test_lineage_has_the_samples_hash_the_tools_and_what_the_recipe_said(packed: Packed, order: Order) -> None:
    lineage = packed.manifest.lineage
    assert lineage["samples_sha256"] == hashlib.sha256(order.samples.read_bytes()).hexdigest()
    assert lineage["recipe"] == "by hand"
    assert {"ai-edge-litert", "tflite-runtime", "numpy", "edgewarden"} <= set(lineage)


def test_it_ran_on_both_runtimes_and_memory_was_measured_in_whole_mebibytes(packed: Packed) -> None:
    needs = packed.manifest.needs
    assert needs.runtimes == (RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME)
    assert 1024**2 <= needs.memory <= 32 * 1024**2
    assert needs.memory % 1024**2 == 0


def test_the_runtimes_agree_on_nearly_all_samples(packed: Packed) -> None:
    agreement = packed.agreement
    assert (agreement.samples, len(agreement.agreeing) >= 380, agreement.worst < 10) == (400, True, True)


@both_runtimes
def test_reference_statistics_are_what_the_device_computes(packed: Packed, runtime: str) -> None:
    """The same samples through `runtime/`, one by one, as the data plane does it."""
    manifest = packed.manifest
    reference, calibrator = manifest.reference, manifest.calibrator
    assert reference is not None
    x, y = held_out()
    answers = answer_each(x, calibrator, runtime)
    assert reference.samples == sum(reference.confidence) == sum(reference.classes) == 400
    assert reference.classes == tuple(sum(best == k for best, _ in answers) for k in range(10))
    assert reference.right == sum(best == truth for (best, _), truth in zip(answers, y, strict=True))


def answer_each(x: np.ndarray, calibrator: Calibrator | None, runtime: str) -> list[tuple[int, float]]:
    answers = []
    with open_model(DIGITS / "v2" / "model.tflite", runtime=runtime) as model:
        for image in quantise(x, model.inputs[0]):
            model.fill(0, image.tobytes())
            model.invoke()
            answers.append(top_class(probabilities(model.array(0), model.outputs[0], calibrator)))
    return answers


def test_the_calibrator_makes_mean_confidence_meet_accuracy(packed: Packed) -> None:
    calibrator, reference = packed.manifest.calibrator, packed.manifest.reference
    assert calibrator is not None
    assert reference is not None
    x, _ = held_out()
    confidence = np.mean([confidence for _, confidence in answer_each(x, calibrator, "litert")])
    assert confidence == pytest.approx(reference.right / reference.samples, abs=0.02)
    assert calibrator.samples == 400


@both_runtimes
def test_golden_samples_pass_on_both_runtimes(packed: Packed, tmp_path: Path, runtime: str) -> None:
    write_folder(packed, tmp_path)
    golden = packed.manifest.golden
    assert (golden.samples, golden.tolerance) == (20, 1.0)
    with open_model(tmp_path / "model.tflite", runtime=runtime) as model:
        assert check_golden(model, tmp_path / golden.member, golden).samples == 20


def test_packing_again_gives_the_same_members(packed: Packed, order: Order) -> None:
    again = pack(order)
    assert again.members == packed.members
    assert again.manifest.reference == packed.manifest.reference


# ---------------------------------------------------------------- golden samples
@pytest.mark.parametrize(
    ("truth", "candidates", "wanted", "expected"),
    [
        ([0, 0, 0, 1, 2], [0, 1, 2, 3, 4], 3, [0, 3, 4]),
        ([0, 0, 0, 1, 2], [0, 1, 2, 3, 4], 4, [0, 1, 3, 4]),
        ([0, 0, 0, 1, 2], [0, 1, 2, 3, 4], 32, [0, 1, 2, 3, 4]),
        ([0, 0, 0, 1, 2], [1, 2, 4], 2, [1, 4]),
        ([3, 3, 3], [0, 1, 2], 2, [0, 1]),
    ],
    ids=["one of each", "then a second", "all there are", "only candidates", "one class"],
)
def test_golden_samples_are_spread_over_the_classes(
    truth: list[int], candidates: list[int], wanted: int, expected: list[int]
) -> None:
    assert choose_golden(np.array(truth), np.array(candidates), wanted) == expected


def test_a_class_that_no_sample_shows_is_reported(order: Order, tmp_path: Path) -> None:
    x, y = held_out()
    few = write_samples(tmp_path / "few.npz", x[y < 7], y[y < 7])
    packed = pack(Order(model=order.model, samples=few, classes=order.classes, name="digits"))
    assert packed.absent_classes == ("7", "8", "9")
    assert packed.manifest.golden.samples == 20


# ---------------------------------------------------------------- float models
def test_a_float_model_is_packed_with_a_tolerance_for_floats(tmp_path: Path) -> None:
    packed = pack(float_order(tmp_path, "float_softmax"))
    assert (packed.manifest.variant, packed.manifest.outputs[0].scale) == ("fp32", None)
    assert (packed.manifest.golden.samples, packed.manifest.golden.tolerance) == (8, 1e-3)
    assert packed.manifest.reference is not None
    assert packed.manifest.reference.right == 12


def test_a_given_tolerance_is_kept(tmp_path: Path) -> None:
    order = float_order(tmp_path, "float_softmax")
    packed = pack(Order(model=order.model, samples=order.samples, classes=order.classes, name="tiny", tolerance=0.25))
    assert packed.manifest.golden.tolerance == 0.25


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("float_logits", r"float_logits\.tflite: output 'scores' holds values .* end the model with a softmax"),
        ("two_inputs", r"two_inputs\.tflite: the model has 2 inputs"),
        ("batch_of_two", r"batch_of_two\.tflite: input 'values' has shape \(2, 4\); a batch of 1"),
    ],
)
def test_a_model_that_cannot_be_measured_as_a_classifier_is_refused(tmp_path: Path, model: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        pack(float_order(tmp_path, model))


# ---------------------------------------------------------------- runtimes that disagree, crash or hang
def test_runtimes_that_disagree_refuse_the_model(order: Order, tmp_path: Path) -> None:
    """With no tolerance at all, the few samples on which the runtimes round differently are allowed, more are not."""
    strict = Order(model=order.model, samples=order.samples, classes=order.classes, name="digits", tolerance=0.0)
    x, y = held_out()
    agreement: Agreement = pack(strict).agreement
    differing = np.setdiff1d(np.arange(len(y)), agreement.agreeing)
    assert len(differing) > 0
    only_differing = np.resize(differing, 20)
    samples = write_samples(tmp_path / "differing.npz", x[only_differing], y[only_differing])
    with pytest.raises(Refused, match="only 0 of 20 samples have answers on litert and tflite-runtime"):
        pack(Order(model=order.model, samples=samples, classes=order.classes, name="digits", tolerance=0.0))


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_model_that_crashes_takes_only_the_child_with_it(
    order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "crash", "echo last words >&2; kill -SEGV $$"))
    with pytest.raises(Refused, match=r"ended its process on litert \(signal 11\): last words"):
        pack(order)


def test_a_model_that_hangs_is_refused(order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "hang", "exec sleep 30"))
    monkeypatch.setattr(trial, "TIME_LIMIT", 0.2)
    with pytest.raises(Refused, match="did not get through the samples in 0 s on litert"):
        pack(order)


def test_a_truncated_model_is_refused(order: Order, tmp_path: Path) -> None:
    truncated = tmp_path / "half.tflite"
    truncated.write_bytes(order.model.read_bytes()[:5000])
    with pytest.raises(Refused, match=r"half\.tflite: litert cannot load it"):
        pack(Order(model=truncated, samples=order.samples, classes=order.classes, name="digits"))


# ---------------------------------------------------------------- written and read again
def test_folder_and_file_say_the_same(packed: Packed, tmp_path: Path) -> None:
    write_folder(packed, tmp_path / "deep" / "folder")
    write_file(packed, tmp_path / "digits.ewb")
    assert inspect(tmp_path / "deep" / "folder") == inspect(tmp_path / "digits.ewb") == packed.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "digits.ewb"]


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_example_bundles_are_whole(version: str) -> None:
    manifest = inspect(DIGITS / version)
    assert (manifest.model, manifest.version, len(manifest.classes)) == ("digits", UNPUBLISHED, 10)
    assert manifest == decode_manifest((DIGITS / version / "manifest.json").read_bytes())
