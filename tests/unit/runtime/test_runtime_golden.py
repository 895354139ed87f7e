"""Golden samples, on both runtimes, with the bundles of examples/digits."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protocol.manifest import Golden, Manifest, decode_manifest
from protocol.states import RuntimeName
from runtime.arrays import BadArrays, read_arrays
from runtime.golden import GoldenMismatch, GoldenUnreadable, check_golden, difference
from runtime.interpreter import open_model

DIGITS = Path(__file__).parents[3] / "examples" / "digits"
GOLDEN = DIGITS / "v2" / "golden.npz"

both_runtimes = pytest.mark.parametrize("runtime", [name.value for name in RuntimeName])


def manifest_of(version: str) -> Manifest:
    return decode_manifest((DIGITS / version / "manifest.json").read_bytes())


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    return read_arrays(path, 1024**2)


@both_runtimes
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_example_bundles_agree_within_one_step(runtime: str, version: str) -> None:
    with open_model(DIGITS / version / "model.tflite", runtime=runtime) as model:
        result = check_golden(model, DIGITS / version / "golden.npz", manifest_of(version).golden)
    assert (result.samples, result.worst <= 1.0) == (20, True)


@both_runtimes
def test_another_version_does_not_pass_for_this_one(runtime: str) -> None:
    with (
        open_model(DIGITS / "v1" / "model.tflite", runtime=runtime) as model,
        pytest.raises(GoldenMismatch, match="output 'scores' is off by"),
    ):
        check_golden(model, GOLDEN, manifest_of("v2").golden)


@both_runtimes
def test_a_model_with_damaged_weights_loads_but_does_not_pass(tmp_path: Path, runtime: str) -> None:
    content = bytearray((DIGITS / "v2" / "model.tflite").read_bytes())
    middle = len(content) // 2  # inside the second convolution's weights, which are most of the file
    content[middle : middle + 512] = bytes(byte ^ 0x40 for byte in content[middle : middle + 512])
    damaged = tmp_path / "model.tflite"
    damaged.write_bytes(content)
    with open_model(damaged, runtime=runtime) as model, pytest.raises(GoldenMismatch):
        check_golden(model, GOLDEN, manifest_of("v2").golden)


@both_runtimes
def test_a_mismatch_names_sample_output_and_difference(tmp_path: Path, runtime: str) -> None:
    arrays = arrays_of(GOLDEN)
    arrays["out_0"][7, 3] += 40
    path = tmp_path / "golden.npz"
    np.savez(path, **arrays)
    with (
        open_model(DIGITS / "v2" / "model.tflite", runtime=runtime) as model,
        pytest.raises(GoldenMismatch) as caught,
    ):
        check_golden(model, path, manifest_of("v2").golden)
    fault = caught.value
    assert (fault.sample, fault.output, fault.tolerance) == (7, "scores", 1.0)
    assert fault.difference == pytest.approx(40, abs=1)


def test_a_difference_up_to_the_tolerance_agrees(tmp_path: Path) -> None:
    arrays = arrays_of(GOLDEN)
    arrays["out_0"][0, 0] += 3
    path = tmp_path / "golden.npz"
    np.savez(path, **arrays)
    with open_model(DIGITS / "v2" / "model.tflite", runtime="litert") as model:
        assert check_golden(model, path, Golden(samples=20, tolerance=3.0)).worst == 3.0
        with pytest.raises(GoldenMismatch):
            check_golden(model, path, Golden(samples=20, tolerance=2.0))


def drop_output(arrays: dict[str, np.ndarray]) -> None:
    del arrays["out_0"]


def shorten_output(arrays: dict[str, np.ndarray]) -> None:
    arrays["out_0"] = arrays["out_0"][:-1]


def flatten_image(arrays: dict[str, np.ndarray]) -> None:
    arrays["in_0"] = arrays["in_0"][:, :4]


def change_type(arrays: dict[str, np.ndarray]) -> None:
    arrays["in_0"] = arrays["in_0"].astype(np.float32)


def empty_all(arrays: dict[str, np.ndarray]) -> None:
    for name in arrays:
        arrays[name] = arrays[name][:0]


def drop_sample(arrays: dict[str, np.ndarray]) -> None:
    for name in arrays:
        arrays[name] = arrays[name][1:]


def make_scalar(arrays: dict[str, np.ndarray]) -> None:
    arrays["in_0"] = np.int8(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_output, "array out_0 .* is missing"),
        (shorten_output, r"the arrays hold \[19, 20\] samples"),
        (flatten_image, r"array in_0 is int8 \(20, 4, 8, 1\); tensor 'image' takes samples of int8 \(1, 8, 8, 1\)"),
        (change_type, "array in_0 is float32"),
        (empty_all, r"the arrays hold \[0\] samples"),
        (drop_sample, "19 samples, the manifest says 20"),
        (make_scalar, r"array in_0 is int8 \(\)"),
    ],
)
def test_samples_that_do_not_belong_to_the_model_are_unreadable(
    tmp_path: Path, damage: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    arrays = arrays_of(GOLDEN)
    damage(arrays)
    path = tmp_path / "golden.npz"
    np.savez(path, **arrays)
    with open_model(DIGITS / "v2" / "model.tflite") as model, pytest.raises(GoldenUnreadable, match=message):
        check_golden(model, path, manifest_of("v2").golden)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with open_model(DIGITS / "v2" / "model.tflite") as model, pytest.raises(GoldenUnreadable, match="no such file"):
        check_golden(model, tmp_path / "golden.npz", manifest_of("v2").golden)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return (self.path.touch, ())


def test_pickled_arrays_are_refused_and_never_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    np.savez(tmp_path / "g.npz", in_0=np.array([Trap(sprung)], dtype=object))
    with pytest.raises(BadArrays, match="never loaded"):
        read_arrays(tmp_path / "g.npz", 1024**2)
    assert not sprung.exists()


def test_arrays_over_the_cap_are_refused_before_they_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", in_0=np.zeros(10_000_000, np.int8))
    with pytest.raises(BadArrays, match="over the cap of 1000000"):
        read_arrays(tmp_path / "bomb.npz", 1_000_000)


def test_a_header_that_promises_more_than_the_member_holds_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|i1", "fortran_order": False, "shape": (2**40, 2**20)})
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("in_0.npy", buffer.getvalue() + b"\0" * 16)
    with pytest.raises(BadArrays, match=f"promises {2**60} bytes"):
        read_arrays(tmp_path / "liar.npz", 1024**2)


def test_too_many_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", **{f"a{k}": np.zeros(1) for k in range(65)})
    with pytest.raises(BadArrays, match="65 arrays are over the cap"):
        read_arrays(tmp_path / "many.npz", 1024**2)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(30)], ids=["empty", "text", "half a zip"])
def test_what_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(BadArrays, match=r"x\.npz"):
        read_arrays(path, 1024**2)


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("in_0.npy", b"plain text")
    with pytest.raises(BadArrays, match=r"in_0\.npy"):
        read_arrays(tmp_path / "x.npz", 1024**2)


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        ([-128, 127], [127, 127], 255.0),
        ([0.5, 0.25], [0.5, 0.5], 0.25),
        ([np.nan, 0.0], [0.0, 0.0], np.inf),
        ([np.inf, 0.0], [np.inf, 0.0], np.inf),
        ([], [], 0.0),
    ],
)
def test_difference_is_the_largest_gap_and_what_is_no_number_is_infinitely_far(
    answer: list[float], expected: list[float], found: float
) -> None:
    kind = np.int8 if all(isinstance(value, int) for value in answer) else np.float32
    assert difference(np.array(answer, kind), np.array(expected, kind)) == found
