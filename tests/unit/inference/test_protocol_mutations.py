"""Whatever is sent, the answer is right or an error of the protocol, and the connection's thread lives on."""

import json
import socket
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inference_parts import IMAGE
from protocol_world import World, world

from agent.inference.grpc_server.messages import message

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
STATUSES = {200, 400, 403, 404, 405, 408, 413, 415, 431, 500, 501, 503, 505}
CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
SCORES = 10

DESCRIBED = json.dumps(
    {
        "id": "m",
        "inputs": [
            {"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "parameters": {"binary_data_size": 64}}
        ],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True, "classification": 2}}],
        "parameters": {"priority": 1, "timeout": 0, "binary_data_output": True, "sequence_id": 1},
    }
).encode()
VALID = (
    b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n"
    + f"Inference-Header-Content-Length: {len(DESCRIBED)}\r\nContent-Length: {len(DESCRIBED) + 64}\r\n\r\n".encode()
    + DESCRIBED
    + IMAGE
)
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as one:
        yield one


@pytest.fixture(autouse=True)
def no_faults(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    faults = [record.message for record in caplog.records if "fault of this server" in record.message]
    assert [] == faults


def exchange(plane: World, data: bytes) -> list[tuple[int, bytes]]:
    """Send bytes and no more; return every answer that came before the server closed the connection."""
    host, port = plane.http.split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(65536):
                received += chunk
        except ConnectionError:
            pass  # the server had answered and left before everything was sent
    return list(answers(received))


def answers(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 100:
            data = rest
            continue
        lengths = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
        length = int(lengths[0].split(b":")[1])
        yield status, rest[:length]
        data = rest[length:]


def check(plane: World, data: bytes) -> None:
    for status, body in exchange(plane, data):
        assert status in STATUSES, status
        if status != 200:
            assert ["error"] == list(json.loads(body))
            assert status != 500, body
    assert [200] == [status for status, _ in exchange(plane, LIVE)]


def mutated(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Replace pieces: (where, how many bytes, by what)."""
    for where, length, piece in edits:
        place = where % (len(data) + 1)
        data = data[:place] + piece + data[place + length :]
    return data


edits = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(0, 20), st.binary(max_size=12)), min_size=1, max_size=4
)


@QUICK
@given(data=st.binary(max_size=400))
def test_random_bytes(plane: World, data: bytes) -> None:
    check(plane, data)


@QUICK
@given(edits=edits)
def test_a_mutated_request(plane: World, edits: list[tuple[int, int, bytes]]) -> None:
    check(plane, mutated(VALID, edits))


@QUICK
@given(value=json_values)
@example(value={"inputs": [{"name": "image", "shape": [1, 8, 8, 1], "datatype": "INT8", "data": [[]] * 64}]})
@example(value={"inputs": [{"name": "image", "shape": [2**70], "datatype": "INT8", "data": []}]})
@example(value={"inputs": [], "parameters": {"timeout": 2**70}})
@example(value={"inputs": [{"name": "image", "shape": [1, 8, 8, 1], "datatype": "INT8", "data": [2**70] * 64}]})
def test_random_json(plane: World, value: object) -> None:
    body = json.dumps(value).encode()
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    check(plane, head.encode() + body)


@QUICK
@given(
    model=st.sampled_from(["digits", "every-type", "rgb"]),
    name=st.sampled_from(["image", "picture", "uint64", "fp16", "x"]),
    datatype=st.sampled_from(["INT8", "BYTES", "UINT64", "FP16", "BOOL", "BF16", ""]),
    shape=st.lists(st.integers(-2, 9) | st.integers(), max_size=4),
    data=st.none() | st.lists(json_values, max_size=6),
    parameters=st.dictionaries(
        st.sampled_from(["binary_data_size", "classification", "shared_memory_region", "x"]), json_values, max_size=2
    ),
    blob=st.binary(max_size=80),
)
def test_tensors_that_nearly_fit(
    plane: World,
    *,
    model: str,
    name: str,
    datatype: str,
    shape: list[int],
    data: list[object] | None,
    parameters: dict[str, object],
    blob: bytes,
) -> None:
    tensor = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
    if data is not None:
        tensor["data"] = data
    outputs = [{"name": "scores", "parameters": parameters}]
    text = json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text) + len(blob)}\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    check(plane, head.encode() + text + blob)


@QUICK
@given(values=st.lists(st.integers(-128, 127), min_size=64, max_size=64))
def test_a_right_request_gets_the_models_own_answer(plane: World, values: list[int]) -> None:
    image = np.array(values, np.int8).tobytes()
    expected = np.frombuffer(plane.engine.find("digits").run("r", (image,))[0], np.int8).tolist()
    tensor = {"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "data": values}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    ((status, answer),) = exchange(plane, head.encode() + body)
    assert (200, expected) == (status, json.loads(answer)["outputs"][0]["data"])


# ---------------------------------------------------------------- gRPC
def grpc_request() -> bytes:
    request = message("ModelInferRequest")(model_name="digits", id="m", raw_input_contents=[IMAGE])
    request.inputs.add(name="image", datatype="INT8", shape=[1, 8, 8, 1])
    request.outputs.add(name="scores").parameters["classification"].int64_param = 2
    request.parameters["priority"].uint64_param = 1
    return request.SerializeToString()


@pytest.fixture(scope="module")
def channel(plane: World) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(plane.grpc) as one:
        yield one


@QUICK
@given(
    edits=edits,
    method=st.sampled_from(["ModelInfer", "ModelMetadata", "ModelStatistics", "RepositoryIndex", "ModelReady"]),
)
def test_mutated_messages(channel: grpc.Channel, edits: list[tuple[int, int, bytes]], method: str) -> None:
    call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
    try:
        call(mutated(grpc_request(), edits), timeout=10)
        code = "OK"
    except grpc.RpcError as error:
        code = error.code().name
    assert code in CODES
    assert channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(grpc_request(), timeout=10)
