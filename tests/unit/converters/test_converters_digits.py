"""The example of examples/digits: its README states what is measured here."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from protocol.metrics import Proportion
from protocol.states import RuntimeName
from runtime.arrays import read_arrays

DIGITS = Path(__file__).parents[3] / "examples" / "digits"
BOUNDS = {"v1": (0.88, 0.93), "v2": (0.97, 1.0), "v3": (0.65, 0.75)}  # what the demo counts on


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"digits_{name}", DIGITS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("runtime", list(RuntimeName))
@pytest.mark.parametrize("version", sorted(BOUNDS))
def test_held_out_accuracy_is_what_the_readme_says(version: str, runtime: RuntimeName) -> None:
    share: Proportion = load_script("evaluate").held_out_accuracy(version, runtime)
    low, high = BOUNDS[version]
    assert share.value is not None
    assert low <= share.value <= high
    row = f"| {version} | {runtime.value} | {share.successes} | {share.n} | {share.value:.1%} |"
    assert row in (DIGITS / "README.md").read_text(encoding="utf-8")


def test_the_held_out_images_are_raw_pixels_with_every_class() -> None:
    arrays = read_arrays(DIGITS / "heldout.npz", 1024**2)
    images, truth = arrays["images"], arrays["truth"]
    assert (images.dtype.name, images.shape, int(images.max())) == ("uint8", (400, 8, 8, 1), 16)
    assert (truth.dtype.name, truth.shape, sorted(set(truth.tolist()))) == ("uint8", (400,), list(range(10)))


def test_the_example_is_small_enough_to_commit() -> None:
    files = [path for path in DIGITS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 400 * 1024
    assert all((DIGITS / version / "model.tflite").stat().st_size <= 30 * 1024 for version in BOUNDS)
