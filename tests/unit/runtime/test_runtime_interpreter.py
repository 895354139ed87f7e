"""The loaded model, on both runtimes, with the models of examples/digits."""

import importlib.util
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.manifest import TensorSpec, decode_manifest
from protocol.states import RuntimeName
from runtime.interpreter import (
    DTYPES,
    ModelUnloadable,
    RuntimeMissing,
    available,
    import_runtime,
    open_model,
)

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "examples" / "digits"
MODEL = DIGITS / "v2" / "model.tflite"
IMAGE_BYTES = 64

both_runtimes = pytest.mark.parametrize("runtime", [name.value for name in RuntimeName])

# Loads the models it is given one after the other and prints what came of each; a crash ends it early.
LOAD_EACH = """
import sys
from runtime.interpreter import ModelUnloadable, open_model
for path in sys.argv[2:]:
    try:
        open_model(path, runtime=sys.argv[1])
        print("loaded")
    except ModelUnloadable as error:
        assert path in str(error)
        print("unloadable")
"""


def test_both_runtimes_are_installed_where_the_tests_run() -> None:
    assert available() == (RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME)


def test_auto_takes_litert_first() -> None:
    assert import_runtime() is RuntimeName.LITERT
    with open_model(MODEL) as model:
        assert model.runtime is RuntimeName.LITERT


@both_runtimes
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_tensors_are_those_of_the_manifest(runtime: str, version: str) -> None:
    manifest = decode_manifest((DIGITS / version / "manifest.json").read_bytes())
    with open_model(DIGITS / version / "model.tflite", runtime=runtime) as model:
        assert (model.runtime.value, model.inputs, model.outputs) == (runtime, manifest.inputs, manifest.outputs)


@both_runtimes
def test_names_come_from_the_signature_and_quantisation_from_the_tensor(runtime: str) -> None:
    with open_model(MODEL, runtime=runtime) as model:
        assert model.outputs == (
            TensorSpec(name="scores", dtype="INT8", shape=(1, 10), scale=1 / 256, zero_point=-128),
        )


@both_runtimes
def test_every_kind_of_buffer_fills_and_gives_the_same_answer(runtime: str) -> None:
    image = np.arange(IMAGE_BYTES, dtype=np.int8)
    answers = []
    with open_model(MODEL, runtime=runtime) as model:
        for data in (image.tobytes(), bytearray(image.tobytes()), memoryview(image), memoryview(image.reshape(8, 8))):
            model.fill(0, bytes(IMAGE_BYTES))
            model.fill(0, data)
            model.invoke()
            answers.append(model.read(0))
        assert answers == [model.array(0).tobytes()] * 4


@both_runtimes
@settings(deadline=None)  # each example loads a model
@given(length=st.integers(0, 3 * IMAGE_BYTES).filter(lambda n: n != IMAGE_BYTES))
def test_a_wrong_length_is_refused_and_changes_nothing(runtime: str, length: int) -> None:
    with open_model(MODEL, runtime=runtime) as model:
        model.fill(0, bytes(range(IMAGE_BYTES)))
        model.invoke()
        before = model.read(0)
        with pytest.raises(ValueError, match=f"input 'image' takes 64 bytes, got {length}"):
            model.fill(0, b"\x7f" * length)
        model.invoke()
        assert model.read(0) == before


@both_runtimes
def test_outputs_are_copies_that_do_not_hinder_the_next_invoke(runtime: str) -> None:
    with open_model(MODEL, runtime=runtime) as model:
        model.fill(0, bytes(IMAGE_BYTES))
        model.invoke()
        kept, copy = model.array(0), model.array(0).copy()
        model.fill(0, b"\x7f" * IMAGE_BYTES)
        model.invoke()
        assert (kept == copy).all()


@both_runtimes
def test_two_threads_with_a_model_each_do_not_disturb_each_other(runtime: str) -> None:
    images = [bytes(IMAGE_BYTES), bytes(range(IMAGE_BYTES))]
    answers: list[set[bytes]] = [set(), set()]

    def work(number: int) -> None:
        with open_model(MODEL, runtime=runtime) as model:
            for _ in range(200):
                model.fill(0, images[number])
                model.invoke()
                answers[number].add(model.read(0))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found) for found in answers] == [1, 1]


@both_runtimes
@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_model_is_unloadable(tmp_path: Path, runtime: str, content: bytes) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    with pytest.raises(ModelUnloadable, match=r"m\.tflite"):
        open_model(path, runtime=runtime)


@both_runtimes
def test_a_missing_file_and_a_folder_are_unloadable(tmp_path: Path, runtime: str) -> None:
    for path in (tmp_path, tmp_path / "nothing.tflite"):
        with pytest.raises(ModelUnloadable, match="there is no such file"):
            open_model(path, runtime=runtime)


def damaged_models(folder: Path, truncations: int) -> list[Path]:
    source = MODEL.read_bytes()
    contents = [source[: len(source) * k // truncations] for k in range(truncations)]
    contents += [source[:4] + b"NOPE" + source[8:], b"\xff" * 8 + source[8:]]
    paths = [folder / f"{number}.tflite" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def load_in_child(runtime: str, paths: list[Path]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LOAD_EACH, runtime, *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_litert_finds_every_truncated_and_corrupted_model_unloadable(tmp_path: Path) -> None:
    paths = damaged_models(tmp_path, truncations=16)
    child = load_in_child("litert", paths)
    assert (child.returncode, child.stdout.split()) == (0, ["unloadable"] * len(paths))


def test_tflite_runtime_refuses_a_damaged_model_or_crashes_but_never_loads_it(tmp_path: Path) -> None:
    """It does not verify the flatbuffer; this is why new models are loaded in a child first."""
    outcomes = set()
    for path in damaged_models(tmp_path, truncations=6):
        child = load_in_child("tflite-runtime", [path])
        outcomes.add("unloadable" if child.stdout == "unloadable\n" else child.returncode)
    assert outcomes <= {"unloadable", -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}


def test_an_unknown_runtime_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="'onnx' is not known; choose one of auto, litert, tflite-runtime"):
        open_model(MODEL, runtime="onnx")


def test_without_a_runtime_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available() == ()
    for runtime in ("auto", "litert"):
        with pytest.raises(RuntimeMissing, match=r"pip install 'edgewarden\[runtime\]'"):
            open_model(MODEL, runtime=runtime)


def test_tflite_runtime_is_not_usable_with_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", "2.1.0")
    assert available() == (RuntimeName.LITERT,)


def test_dtypes_are_one_to_one() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES)
