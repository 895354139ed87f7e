"""What is understood once and used again, on the hot path: it must never outlive what it was true of."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_parts import IMAGE, engine, servable

from agent.inference.engine import Engine
from agent.inference.parsing import HttpError, parse_head
from agent.inference.prediction import FEW_CLASSES, Predictor
from agent.inference.reading import REMEMBERED, decode_call
from agent.inference.routes import Routes
from agent.inference.tensors import BadTensor, Signature
from protocol.manifest import Calibrator, TensorSpec
from runtime.calibrator import probabilities, top_class
from runtime.interpreter import DTYPES

PAIR = Signature(
    model="pair",
    version=1,
    inputs=(TensorSpec(name="a", dtype="INT8", shape=(2,)), TensorSpec(name="b", dtype="INT16", shape=(2,))),
    outputs=(TensorSpec(name="y", dtype="INT8", shape=(1,)),),
)
SWAPPED_ORDER = {
    "parameters": {"binary_data_output": True, "priority": 2, "timeout": 7},
    "inputs": [
        {"name": "b", "shape": [2], "datatype": "INT16", "parameters": {"binary_data_size": 4}},
        {"name": "a", "shape": [2], "datatype": "INT8", "parameters": {"binary_data_size": 2}},
    ],
}


def body(request: dict, blobs: bytes) -> tuple[memoryview, int]:
    head = json.dumps(request).encode()
    return memoryview(head + blobs), len(head)


def fresh() -> Signature:
    return Signature(model=PAIR.model, version=1, inputs=PAIR.inputs, outputs=PAIR.outputs)


# ---------------------------------------------------------------- requests
def test_a_request_that_is_known_is_read_as_when_it_was_new() -> None:
    signature = fresh()
    first = decode_call(*body(SWAPPED_ORDER, b"bbbbaa"), signature)
    again = decode_call(*body(SWAPPED_ORDER, b"BBBBAA"), signature)
    assert 1 == len(signature.layouts)
    assert [b"aa", b"bbbb"] == [bytes(one) for one in first.inputs]
    assert [b"AA", b"BBBB"] == [bytes(one) for one in again.inputs]
    assert first._replace(inputs=()) == again._replace(inputs=())
    assert (2, 7) == (again.priority, again.timeout_us)


@pytest.mark.parametrize("blobs", [b"", b"bbbba", b"bbbbaaa"])
def test_a_known_request_with_other_blobs_is_refused_as_if_it_were_new(blobs: bytes) -> None:
    signature = fresh()
    decode_call(*body(SWAPPED_ORDER, b"bbbbaa"), signature)
    with pytest.raises(BadTensor) as known:
        decode_call(*body(SWAPPED_ORDER, blobs), signature)
    with pytest.raises(BadTensor) as new:
        decode_call(*body(SWAPPED_ORDER, blobs), fresh())
    assert str(new.value) == str(known.value)


def test_a_request_with_an_id_or_with_values_is_never_taken_for_another() -> None:
    signature = fresh()
    values = {"inputs": [{"name": "a", "shape": [2], "datatype": "INT8", "data": [1, 2]}, SWAPPED_ORDER["inputs"][0]]}
    assert "x" == decode_call(*body({"id": "x", **SWAPPED_ORDER}, b"bbbbaa"), signature).id
    assert b"\x01\x02" == decode_call(*body(values, b"bbbb"), signature).inputs[0]
    assert {} == signature.layouts


def test_only_so_many_requests_are_kept() -> None:
    signature = fresh()
    for priority in range(3 * REMEMBERED):
        request = {**SWAPPED_ORDER, "parameters": {"priority": priority}}
        assert priority == decode_call(*body(request, b"bbbbaa"), signature).priority
        assert len(signature.layouts) <= REMEMBERED


# ---------------------------------------------------------------- heads and plans
INFER = parse_head(
    b"POST /v2/models/digits/infer HTTP/1.1\r\nInference-Header-Content-Length: 0\r\nContent-Length: 64"
)


def routes(serving: Engine) -> Routes:
    return Routes(serving, managed=True, body_cap=2**20)


def test_equal_heads_are_understood_once() -> None:
    data = b"GET /v2 HTTP/1.1\r\nHost: localhost"
    assert parse_head(data) is parse_head(bytes(bytearray(data)))


def test_a_plan_that_lasts_asks_what_serves_by_then(tmp_path: Path) -> None:
    serving = engine()
    serving.serve(servable(tmp_path, "v1", 1))
    plan = routes(serving).plan(INFER, over_tcp=False)
    assert plan.lasting
    assert b'"model_version":"1"' in plan.answer(memoryview(IMAGE)).body[0]
    serving.serve(servable(tmp_path, "v2", 2))
    assert b'"model_version":"2"' in plan.answer(memoryview(IMAGE)).body[0]
    serving.withdraw("digits")
    with pytest.raises(HttpError, match="not served here") as refused:
        plan.answer(memoryview(IMAGE))
    assert 404 == refused.value.status
    serving.close()


@pytest.mark.parametrize("line", [b"GET /v2/models/digits", b"POST /v2/models/digits/feedback", b"GET /metrics"])
def test_a_plan_made_for_what_serves_now_does_not_last(tmp_path: Path, line: bytes) -> None:
    serving = engine()
    serving.serve(servable(tmp_path, "v1", 1))
    assert not routes(serving).plan(parse_head(line + b" HTTP/1.1"), over_tcp=False).lasting
    serving.close()


# ---------------------------------------------------------------- predictions
@pytest.mark.parametrize("dtype", ["INT8", "UINT8"])
@pytest.mark.parametrize("temperature", [None, 0.05, 0.7, 3.0, 0.001], ids=str)
def test_looking_up_what_bytes_are_worth_gives_what_computing_gives(dtype: str, temperature: float | None) -> None:
    spec = TensorSpec(name="s", dtype=dtype, shape=(1, -1), scale=1 / 256, zero_point=-128 if dtype == "INT8" else 0)
    calibrator = None if temperature is None else Calibrator(temperature=temperature, samples=1)
    predictor = Predictor(spec, calibrator)

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.binary(min_size=1, max_size=2 * FEW_CLASSES))
    def agree(data: bytes) -> None:
        label, confidence = top_class(probabilities(np.frombuffer(data, DTYPES[dtype]), spec, calibrator))
        found = predictor.predict(data)
        assert label == found.label
        assert confidence == pytest.approx(found.confidence)

    agree()
