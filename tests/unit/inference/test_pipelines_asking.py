"""Between source and sink: frames become tensors, a model that is missing or busy is waited for, nothing piles up."""

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from inference_parts import servable
from PIL import Image
from pipelines_parts import IMAGES, eventually, quick, running, serving, settings

from agent.core.pipelines import ImagePreprocess, JsonPreprocess, Preprocess, RawPreprocess
from agent.inference.pipelines.building import build
from agent.inference.pipelines.flow import BadFrame, Frame, Mailbox, Outcome, ready_frame
from agent.inference.pipelines.group import LOCK, NoRoom, NotPushed, Pipelines, UnknownPipeline
from agent.inference.pipelines.preparing import prepare
from agent.inference.tensors import BadTensor, Signature
from protocol.manifest import TensorSpec

IMAGE = IMAGES.tobytes()


def signature(*inputs: TensorSpec) -> Signature:
    return Signature(model="m", version=1, inputs=inputs, outputs=())


INT8 = TensorSpec(name="x", dtype="INT8", shape=(1, 2, 2, 1), scale=0.1, zero_point=-10)
COLOUR = TensorSpec(name="x", dtype="UINT8", shape=(1, 2, 3, 3))
FLOAT = TensorSpec(name="y", dtype="FP32", shape=(2,))
REAL, TENSOR, RAW = JsonPreprocess(), JsonPreprocess(values="tensor"), RawPreprocess()


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """Return the beginning of a PNG that says it has 10^10 pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    packed = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


GIVEN = {
    "raw bytes as they are": (b"\1\2\3\4", RAW, (INT8,), [b"\1\2\3\4"]),
    "real numbers are quantised": (b"[0, 0.1, 1, -1]", REAL, (INT8,), [np.int8([-10, -9, 0, -20]).tobytes()]),
    "numbers of the tensor are not": (b"[[1, 2], [3, 4]]", TENSOR, (INT8,), [b"\1\2\3\4"]),
    "an array per input, in any order": (
        b'{"y": [1, 2], "x": [0, 0, 0, 0]}',
        REAL,
        (INT8, FLOAT),
        [np.int8([-10] * 4).tobytes(), np.float32([1, 2]).tobytes()],
    ),
    "a picture in another size": (
        png(np.full((20, 30, 3), 77, np.uint8)),
        ImagePreprocess(),
        (COLOUR,),
        [bytes([77] * 18)],
    ),
    "a grey picture for colours": (
        png(np.full((4, 4), 9, np.uint8)),
        ImagePreprocess(),
        (COLOUR,),
        [bytes([9] * 18)],
    ),
    "a camera's picture": (np.full((8, 8, 3), 200, np.uint8), ImagePreprocess(), (COLOUR,), [bytes([200] * 18)]),
    "a picture is quantised": (
        png(np.full((4, 4), 255, np.uint8)),
        ImagePreprocess(),
        (INT8,),
        [np.int8([0] * 4).tobytes()],
    ),
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_frame_becomes_the_models_inputs(case: str) -> None:
    data, how, inputs, expected = GIVEN[case]
    assert expected == [bytes(one) for one in prepare(data, how, signature(*inputs))]


WRONG = {
    "too few bytes": (b"\1", RAW, (INT8,), BadTensor, "4 bytes, the frame has 1"),
    "one frame for two inputs": (b"\1", RAW, (INT8, FLOAT), BadTensor, "2 inputs"),
    "no JSON": (b"{", REAL, (INT8,), BadFrame, "not JSON"),
    "JSON that is deeper than deep": (b"[" * 100_000, REAL, (INT8,), BadFrame, "not JSON"),
    "words": (b'["a", "b", "c", "d"]', REAL, (INT8,), BadFrame, "numbers"),
    "ragged": (b"[[1], [2, 3]]", REAL, (INT8,), BadFrame, "numbers"),
    "null": (b"null", REAL, (INT8,), BadFrame, "numbers"),
    "too many numbers": (b"[1, 2, 3, 4, 5]", REAL, (INT8,), BadTensor, "4 numbers are expected for x"),
    "a number outside of the type": (b"[1, 2, 3, 400]", TENSOR, (INT8,), BadTensor, "outside of INT8"),
    "a number far outside of the type": (b"[1, 2, 3, 1e300]", TENSOR, (INT8,), BadTensor, "outside of INT8"),
    "a tensor's number that becomes infinite": (b"[1, 1e300]", TENSOR, (FLOAT,), BadTensor, "outside of FP32"),
    "a real number that becomes infinite": (b"[1, 1e300]", REAL, (FLOAT,), BadFrame, "outside of FP32"),
    "half a step": (b"[1, 2, 3, 0.5]", TENSOR, (INT8,), BadTensor, "outside of INT8"),
    "other inputs": (b'{"z": [1]}', REAL, (INT8,), BadTensor, "takes x"),
    "no picture": (b"GIF87a but not really", ImagePreprocess(), (COLOUR,), BadFrame, "not a picture"),
    "half a picture": (png(np.zeros((99, 99, 3), np.uint8))[:60], ImagePreprocess(), (COLOUR,), BadFrame, "picture"),
    "a picture for a model that takes none": (b"", ImagePreprocess(), (FLOAT,), BadTensor, "no picture"),
    "a bomb": (bomb(), ImagePreprocess(), (COLOUR,), BadFrame, "over the cap|exceeds limit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_frame_that_cannot_be_used_is_refused_with_the_reason(case: str) -> None:
    data, how, inputs, error, said = WRONG[case]
    assert isinstance(how, Preprocess)
    with pytest.raises(error, match=said):
        prepare(data, how, signature(*inputs))


# ---------------------------------------------------------------- waiting
def test_where_only_the_latest_counts_a_newer_frame_pushes_out_the_older() -> None:
    outcomes: list[Outcome] = []
    box = Mailbox(9, latest=True)
    for name in "abc":
        assert box.put(Frame(name=name, read=lambda: b"", settle=outcomes.append), 0.0)
    assert (2, [Outcome.DROPPED] * 2, 1) == (box.dropped, outcomes, len(box))
    taken = box.take(0.0)
    assert taken is not None
    assert "c" == taken.name


def test_where_every_frame_counts_the_source_waits_for_room() -> None:
    box = Mailbox(2, latest=False)
    assert [True, True, False] == [box.put(ready_frame(name, b""), 0.01) for name in "abc"]
    threading.Timer(0.1, lambda: box.take(0.0)).start()
    assert box.put(ready_frame("d", b""), 5.0)
    assert 0 == box.dropped


def test_a_model_that_is_not_served_is_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        pipeline = quick(build(settings({"kind": "http"}, model="faces"), one))
        pipeline.start()
        try:
            eventually(lambda: pipeline.state == "waiting")
            assert "'faces' is not served here" in pipeline.describe()["error"]
        finally:
            pipeline.finish()


def test_a_model_that_comes_later_is_asked_then_and_a_swap_loses_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        one.withdraw("digits")
        pipeline = quick(build(settings({"kind": "http"}), one))
        pipeline.start()
        try:
            eventually(lambda: pipeline.state == "waiting")
            assert pipeline.offer(ready_frame("early", IMAGE))
            one.serve(servable(tmp_path, "v1", 1))
            eventually(lambda: pipeline.answered == 1)
            one.serve(servable(tmp_path, "v2", 2))
            assert pipeline.offer(ready_frame("late", IMAGE))
            eventually(lambda: pipeline.answered == 2)
            assert (0, 0) == (pipeline.failed, pipeline.bad)
        finally:
            pipeline.finish()


def test_a_fault_of_a_source_is_told_and_the_source_tried_again(tmp_path: Path) -> None:
    class Faulty:
        def run(self, _: object) -> None:
            raise ZeroDivisionError("ouch")

    with serving(tmp_path) as one:
        pipeline = quick(build(settings({"kind": "http"}), one))
        pipeline._source = Faulty()
        pipeline.start()
        eventually(lambda: pipeline.health.restarts >= 3)
        pipeline.finish()
        assert "ZeroDivisionError: ouch" == pipeline.health.error


# ---------------------------------------------------------------- several
def test_frames_are_pushed_to_pipelines_that_take_them(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        pushed = build(settings({"kind": "http"}, name="pushed", queue=1), one)
        other = build(settings({"kind": "directory", "path": "/none"}, name="other"), one)
        group = Pipelines([pushed, other])
        group.push("pushed", IMAGE)
        with pytest.raises(NoRoom):
            group.push("pushed", IMAGE)
        with pytest.raises(NotPushed, match="directory"):
            group.push("other", IMAGE)
        with pytest.raises(UnknownPipeline, match="pushed, other"):
            group.push("third", IMAGE)
        assert 'edgewarden_pipeline_frames{pipeline="pushed"} 1' in list(group.metrics())


def test_two_processes_do_not_run_the_same_pipelines_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        first, second = (Pipelines([build(settings({"kind": "http"}), one)], tmp_path) for _ in range(2))
        first.start()
        eventually(lambda: first.find("door").state == "running")
        second.start()
        assert "starting" == second.find("door").state
        first.finish()
        eventually(lambda: second.find("door").state == "running")
        second.finish()
        assert (tmp_path / LOCK).exists()


def test_a_pipeline_that_never_started_can_be_stopped(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        group = Pipelines([build(settings({"kind": "http"}), one)], tmp_path)
        group.finish()


def test_numbers_of_outputs_are_in_the_result_if_wanted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(tmp_path / "s", {"kind": "http"}, {"kind": "file", "path": str(out)}, outputs=True) as pipeline:
        pipeline.offer(ready_frame("x", IMAGE))
        eventually(lambda: pipeline.deliveries[0].delivered == 1)
    assert '"outputs":{' in out.read_text()
