"""Models broken in ways a signature cannot see, on both runtimes: each fails in the trial child, with a reason.

Damage that leaves the file a valid flatbuffer is the worst: it is found by loading and running only.
"""

import io
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from dataplane_parts import manifest_of, members, write_ewb
from endless_model import endless_members

from agent.adapters.trial import TrialChild
from agent.channel import TrialVerdict
from agent.ports import Target
from protocol.manifest import MANIFEST_NAME, Manifest
from protocol.release import Assignment, release_of
from protocol.states import RejectReason

CUSTOM, MAX_POOL_2D, RESIZE_NEAREST_NEIGHBOR = 32, 17, 97  # BuiltinOperator
INT32 = 2  # TensorType
SIDE = 40_000  # pixels: squared, 1.6 GB
RUNTIMES = ("litert", "tflite-runtime")
DIGITS = members("v2")["model.tflite"]


def edited(tmp_path: Path, edit: Callable[[schema.ModelT], None]) -> bytes:
    """Return the digits model after an edit of its flatbuffer."""
    path = tmp_path / "digits.tflite"
    path.write_bytes(DIGITS)
    model = flatbuffer_utils.read_model(str(path))
    edit(model)
    flatbuffer_utils.write_model(model, str(path))
    return path.read_bytes()


def unchanged(_: schema.ModelT) -> None:
    """Leave the model as it is."""


def future_version(model: schema.ModelT) -> None:
    """Ask for a version of an operator that no runtime has yet."""
    model.operatorCodes[0].version = 99


def custom_operator(model: schema.ModelT) -> None:
    """Ask for an operator that its maker alone has."""
    code = model.operatorCodes[0]
    code.builtinCode = code.deprecatedBuiltinCode = CUSTOM
    code.customCode = b"Sharpen"


def other_operator(model: schema.ModelT) -> None:
    """Do with the inputs of a convolution what can only be done with one."""
    code = model.operatorCodes[0]
    code.builtinCode = code.deprecatedBuiltinCode = MAX_POOL_2D


def huge_arena(model: schema.ModelT) -> None:
    """Make a picture of 1.6 GB that nobody looks at: its size stands in the model, loading takes the memory."""
    graph = model.subgraphs[0]
    code, size, sides, picture = schema.OperatorCodeT(), schema.TensorT(), schema.BufferT(), schema.TensorT()
    code.builtinCode = code.deprecatedBuiltinCode = RESIZE_NEAREST_NEIGHBOR
    code.version = 2  # the first that takes INT8
    sides.data = np.array([SIDE, SIDE], np.int32).tobytes()
    size.name, size.shape, size.type, size.buffer = b"size", [2], INT32, len(model.buffers)
    given = graph.tensors[graph.inputs[0]]
    picture.name, picture.shape, picture.type = b"picture", [1, SIDE, SIDE, 1], given.type
    picture.quantization, picture.buffer = given.quantization, 0
    resize = schema.OperatorT()
    resize.opcodeIndex = len(model.operatorCodes)
    resize.inputs, resize.outputs = [graph.inputs[0], len(graph.tensors)], [len(graph.tensors) + 1]
    resize.builtinOptionsType = schema.BuiltinOptions.ResizeNearestNeighborOptions
    resize.builtinOptions = schema.ResizeNearestNeighborOptionsT()
    model.operatorCodes.append(code)
    model.buffers.append(sides)
    graph.tensors += [size, picture]
    graph.operators.append(resize)


def weights_flipped(model: bytes) -> bytes:
    """Flip one bit in every hundredth byte of the largest buffer: the file stays a flatbuffer, and loads."""
    weights = max((buffer.data for buffer in schema.ModelT.InitFromPackedBuf(model, 0).buffers), key=_size)
    start, damaged = model.index(bytes(weights)), bytearray(model)
    for place in range(start, start + len(weights), 100):
        damaged[place] ^= 0x40
    return bytes(damaged)


def _size(data: object) -> int:
    return 0 if data is None else len(data)  # type: ignore[arg-type]  # a numpy array


def offsets_flipped(model: bytes) -> bytes:
    """Flip the high bits of the offsets that the flatbuffer begins with: they lead out of the file."""
    damaged = bytearray(model)
    for place in range(11, 200, 4):
        damaged[place] ^= 0x7F
    return bytes(damaged)


def tried(
    tmp_path: Path, manifest: Manifest, content: dict[str, bytes], runtime: str, **limits: object
) -> TrialVerdict:
    path = write_ewb(tmp_path / "candidate.ewb", manifest, content)
    folder = tmp_path / "unpacked"
    folder.mkdir()
    target = Target(release=release_of(manifest), assignment=Assignment(rollout="r"), sha256="0" * 64, length=1)
    return TrialChild(runtime=runtime, **limits).run(str(path), str(folder), target)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        pytest.param(future_version, "CONV_2D", id="operator-of-the-future"),
        pytest.param(custom_operator, "Sharpen", id="custom-operator"),
        pytest.param(other_operator, "failed to prepare", id="wrong-operator"),
        pytest.param(huge_arena, "memory", id="huge-arena"),
    ],
)
def test_a_model_that_this_runtime_cannot_prepare_fails(
    tmp_path: Path, edit: Callable[[schema.ModelT], None], said: str, runtime: str
) -> None:
    content = {**members("v2"), "model.tflite": edited(tmp_path, edit)}
    verdict = tried(tmp_path, manifest_of("v2", 2), content, runtime)
    assert (verdict.passed, verdict.reason) == (False, RejectReason.SELFTEST_FAILED.value), verdict
    assert verdict.detail
    assert said in verdict.detail


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_writing_the_flatbuffer_anew_is_not_what_fails(tmp_path: Path, runtime: str) -> None:
    content = {**members("v2"), "model.tflite": edited(tmp_path, unchanged)}
    assert tried(tmp_path, manifest_of("v2", 2), content, runtime).passed


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda model: model[: len(model) // 2], id="half-of-it"),
        pytest.param(lambda model: bytes(len(model)), id="zeros"),
        pytest.param(lambda model: model[:64] + bytes(255 - byte for byte in model[64:]), id="every-bit-flipped"),
        pytest.param(weights_flipped, id="bits-of-the-weights-flipped"),
        pytest.param(offsets_flipped, id="bits-of-the-offsets-flipped"),
    ],
)
def test_a_damaged_file_fails_on_either_runtime(
    tmp_path: Path, damage: Callable[[bytes], bytes], runtime: str
) -> None:
    verdict = tried(tmp_path, manifest_of("v2", 2), {**members("v2"), "model.tflite": damage(DIGITS)}, runtime)
    assert (verdict.passed, verdict.reason) == (False, RejectReason.SELFTEST_FAILED.value), verdict
    assert verdict.detail


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("limits", "said"),
    [
        pytest.param({"cpu_seconds": 1}, "the trial used up its 1 s of CPU time", id="cpu"),
        pytest.param({"wall_seconds": 1.5}, "the trial was ended: it was not done within 1.5 s", id="wall-clock"),
    ],
)
def test_a_model_that_never_ends_is_ended(tmp_path: Path, limits: dict[str, object], said: str, runtime: str) -> None:
    source = tmp_path / "endless"
    source.mkdir()
    manifest = endless_members(source, 2)
    content = {path.name: path.read_bytes() for path in source.iterdir() if path.name != MANIFEST_NAME}
    golden = io.BytesIO()
    np.savez(golden, in_0=np.ones((1, 1), np.float32), out_0=np.ones((1, 1), np.float32))
    manifest = msgspec.structs.replace(manifest, golden=msgspec.structs.replace(manifest.golden, samples=1))
    verdict = tried(tmp_path, manifest, {**content, manifest.golden.member: golden.getvalue()}, runtime, **limits)
    assert (verdict.passed, verdict.detail) == (False, said)
