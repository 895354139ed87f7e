import json

import numpy as np
import pytest

from agent.inference.answering import encode_answer
from agent.inference.parsing import Head, HttpError, check_local, parse_head
from agent.inference.reading import decode_call
from agent.inference.tensors import BadTensor, Call, NotARequest, Signature
from protocol.manifest import TensorSpec

PAIR = Signature(
    model="pair",
    version=3,
    inputs=(TensorSpec(name="x", dtype="FP32", shape=(1, 2)), TensorSpec(name="on", dtype="BOOL", shape=(1,))),
    outputs=(TensorSpec(name="y", dtype="FP32", shape=(1, 2)), TensorSpec(name="n", dtype="INT32", shape=(1,))),
)
X = {"name": "x", "datatype": "FP32", "shape": [1, 2]}
ON = {"name": "on", "datatype": "BOOL", "shape": [1], "data": [True]}
FLOATS = np.array([1.5, -2], np.float32).tobytes()


def decode(request: dict, blobs: bytes = b"", **changes: object) -> Call:
    text = json.dumps({**request, **changes}).encode()
    return decode_call(memoryview(text + blobs), len(text) if blobs else None, PAIR)


@pytest.mark.parametrize(
    "data",
    [pytest.param([1.5, -2], id="flat"), pytest.param([[1.5, -2]], id="nested"), pytest.param(None, id="blob")],
)
def test_inputs_come_in_the_models_order_however_they_were_sent(data: object) -> None:
    x = {**X, "parameters": {"binary_data_size": 8}} if data is None else {**X, "data": data}
    call = decode({"inputs": [ON, x]}, FLOATS if data is None else b"")
    assert [bytes(one) for one in call.inputs] == [FLOATS, b"\x01"]


def test_blobs_follow_the_order_of_the_request_not_of_the_model() -> None:
    on = {"name": "on", "datatype": "BOOL", "shape": [1], "parameters": {"binary_data_size": 1}}
    x = {**X, "parameters": {"binary_data_size": 8}}
    call = decode({"inputs": [on, x]}, b"\x01" + FLOATS)
    assert [bytes(one) for one in call.inputs] == [FLOATS, b"\x01"]


@pytest.mark.parametrize(
    ("request_changes", "error", "said"),
    [
        pytest.param({"inputs": [ON]}, BadTensor, "input x is missing; pair takes x, on", id="missing"),
        pytest.param({"inputs": [ON, ON]}, BadTensor, "'on' stands twice", id="twice"),
        pytest.param({"inputs": [ON, {**X, "data": [True, False]}]}, BadTensor, "not of type FP32", id="booleans"),
        pytest.param({"inputs": [{**ON, "data": [1]}]}, BadTensor, "not of type BOOL", id="number-for-boolean"),
        pytest.param({"inputs": [{**X, "data": [1, None]}]}, BadTensor, "not of type FP32", id="null"),
        pytest.param(
            {"inputs": [{**X, "data": [10**400, 1]}]}, (NotARequest, BadTensor), "JSON|not of type", id="astronomic"
        ),
        pytest.param(
            {"inputs": [{**X, "parameters": {"binary_data_size": "8"}}]}, BadTensor, "whole number", id="size-as-text"
        ),
        pytest.param(
            {"inputs": [{**X, "parameters": {"shared_memory_region": "r"}}]}, NotARequest, "not offered", id="shm"
        ),
        pytest.param({"outputs": [{"name": "z"}]}, BadTensor, "unknown output 'z'; pair gives y, n", id="output"),
        pytest.param(
            {"outputs": [{"name": "y", "parameters": {"classification": 0}}]},
            BadTensor,
            "above 0",
            id="classes",
        ),
        pytest.param({"id": "i" * 129}, NotARequest, "at most 128", id="long-id"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(
    request_changes: dict, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        decode({"inputs": [ON, {**X, "data": [1, 2]}]}, **request_changes)


def test_a_raw_body_needs_a_model_with_one_input() -> None:
    with pytest.raises(NotARequest, match="pair has 2"):
        decode_call(memoryview(FLOATS), 0, PAIR)


def test_outputs_are_encoded_as_they_were_asked_for() -> None:
    call = decode(
        {"inputs": [ON, {**X, "data": [1, 2]}]},
        outputs=[{"name": "n"}, {"name": "y", "parameters": {"binary_data": True}}],
    )
    text, blob = encode_answer(call, "r1", [FLOATS, np.array([7], np.int32).tobytes()], PAIR)
    assert blob == FLOATS
    assert json.loads(text) == {
        "model_name": "pair",
        "model_version": "3",
        "id": "r1",
        "outputs": [
            {"name": "n", "shape": [1], "datatype": "INT32", "data": [7]},
            {"name": "y", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
        ],
    }


def test_the_cap_leaves_room_for_the_longest_json() -> None:
    longest = json.dumps({"inputs": [{**X, "data": [-1.2345678901234567e-38] * 2}, ON]}, indent=8)
    assert len(longest) < PAIR.body_cap < 100_000


# ---------------------------------------------------------------- heads
def head(*lines: str, request: str = "POST /v2 HTTP/1.1") -> Head:
    return parse_head("\r\n".join([request, *lines]).encode("latin-1"))


@pytest.mark.parametrize(
    ("request_line", "connection", "keeps"),
    [
        ("GET /v2 HTTP/1.1", "", True),
        ("GET /v2 HTTP/1.1", "Connection: close", False),
        ("GET /v2 HTTP/1.0", "", False),
        ("GET /v2 HTTP/1.0", "Connection: Keep-Alive", True),
    ],
)
def test_keep_alive_follows_version_and_wish(request_line: str, connection: str, keeps: bool) -> None:
    assert head(*filter(None, [connection]), request=request_line).keep_alive is keeps


def test_path_segments_are_decoded_and_the_query_is_ignored() -> None:
    assert head(request="GET /v2/models/a%2Fb/ready?x=1 HTTP/1.1").path == ("v2", "models", "a/b", "ready")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (" folded: x", 400),
        ("name : x", 400),
        ("X: a\rb", 400),
        ("X: a\nContent-Length: 5", 400),
        ("Content-Length: +5", 400),
        ("Content-Length: 5, 5", 400),
        ("Content-Length: ٣".encode().decode("latin-1"), 400),
        ("Transfer-Encoding: identity", 501),
    ],
)
def test_what_has_been_used_to_smuggle_requests_is_refused(line: str, status: int) -> None:
    with pytest.raises(HttpError) as refused:
        head(line)
    assert (refused.value.status, refused.value.close) == (status, True)


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        ("localhost", None, True),
        ("LOCALHOST:8000", None, True),
        ("127.0.0.1:8000", "http://localhost:3000", True),
        ("[::1]:8000", None, True),
        ("127.0.0.1.evil.example", None, False),
        ("evil.example:8000", None, False),
        ("localhost:80:80", None, False),
        ("", None, False),
        ("localhost", "https://evil.example", False),
        ("localhost", "null", False),
    ],
)
def test_only_this_machine_is_answered(host: str, origin: str | None, allowed: bool) -> None:
    lines = [f"Host: {host}"] + ([f"Origin: {origin}"] if origin else [])
    if allowed:
        check_local(head(*lines))
    else:
        with pytest.raises(HttpError) as refused:
            check_local(head(*lines))
        assert refused.value.status == 403
