"""The Open Inference Protocol as clients meet it: stock tritonclient, curl, and clients that do it wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from dataplane_parts import PATIENCE, UnixClient, heldout, store
from tritonclient.utils import InferenceServerException

HEAD = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\n"
IMAGE = {"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "data": [0] * 64}


@dataclass(frozen=True)
class Serve:
    process: "subprocess.Popen[str]"
    unix: Path
    port: int

    def tcp(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def raw(self, data: bytes) -> tuple[int, str, bytes]:
        """Send bytes over TCP; return status, head and body of the answer."""
        with self.tcp() as sock:
            sock.sendall(data)
            return read_answer(sock)


def read_answer(sock: socket.socket) -> tuple[int, str, bytes]:
    with sock.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        head = "".join(iter(lambda: stream.readline().decode(), "\r\n"))
        length = next(line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length"))
        return status, head, stream.read(int(length))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "agent.inference", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    folder = tmp_path_factory.mktemp("serve")
    model = store(folder, "v2", 2)
    unix, port = folder / "i.sock", free_port()
    process = start(model.folder, "--unix", str(unix), "--http", f"127.0.0.1:{port}", "--max-body", "1000000")
    assert process.stdout
    while "try:" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    yield Serve(process, unix, port)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert not unix.exists()


# ---------------------------------------------------------------- tritonclient
@pytest.fixture
def client(serve: Serve) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{serve.port}") as client:
        yield client


def image_input(*, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("image", [1, 8, 8, 1], "INT8")
    tensor.set_data_from_numpy(heldout()[0][:1], binary_data=binary)
    return tensor


def test_tritonclient_reads_health_metadata_config_and_index(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "2")
    assert not client.is_model_ready("digits", "1")
    assert client.get_server_metadata()["name"] == "edgewarden"
    assert client.get_model_metadata("digits") == {
        "name": "digits",
        "versions": ["2"],
        "platform": "tflite_litert",
        "inputs": [{"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1]}],
        "outputs": [{"name": "scores", "datatype": "INT8", "shape": [1, 10]}],
    }
    assert client.get_model_config("digits", "2")["input"][0]["data_type"] == "TYPE_INT8"
    assert client.get_model_repository_index() == [{"name": "digits", "version": "2", "state": "READY", "reason": ""}]


def test_tritonclient_gets_the_same_scores_by_every_encoding(client: triton.InferenceServerClient) -> None:
    def wanted(*, binary: bool) -> list[triton.InferRequestedOutput]:
        return [triton.InferRequestedOutput("scores", binary_data=binary)]

    answers = [
        client.infer("digits", [image_input()], request_id="r1"),
        client.infer("digits", [image_input(binary=False)], model_version="2"),
        client.infer("digits", [image_input()], outputs=wanted(binary=False)),
        client.infer("digits", [image_input(binary=False)], outputs=wanted(binary=True)),
    ]
    scores = [answer.as_numpy("scores").tolist() for answer in answers]
    assert scores == [scores[0]] * 4
    assert np.argmax(scores[0]) == heldout()[1][0]
    assert answers[0].get_response()["id"] == "r1"
    made = [answer.get_response()["id"] for answer in answers[1:]]
    assert len(set(made)) == 3


def test_tritonclient_statistics_count_requests(client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("digits")["model_stats"][0]["inference_count"]
    client.infer("digits", [image_input()])
    after = client.get_inference_statistics("digits", "2")["model_stats"][0]
    assert after["inference_count"] == before + 1
    assert after["inference_stats"]["compute_infer"]["ns"] > 0
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "digits"


def test_tritonclient_async_requests_are_answered(client: triton.InferenceServerClient) -> None:
    pending = [client.async_infer("digits", [image_input()]) for _ in range(8)]
    assert [one.get_result().as_numpy("scores").shape for one in pending] == [(1, 10)] * 8


def test_tritonclient_errors_name_the_reason(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match=r"\[404\] model 'faces' is not served here.*digits"):
        client.infer("faces", [image_input()])
    with pytest.raises(InferenceServerException, match=r"\[404\].*version 2 is served"):
        client.infer("digits", [image_input()], model_version="1")
    with pytest.raises(InferenceServerException, match=r"\[404\] model 'faces' is not known here.*digits"):
        client.load_model("faces")
    with pytest.raises(InferenceServerException, match=r"\[501\] systemsharedmemory is not offered"):
        client.get_system_shared_memory_status()


def test_metrics_have_tritons_names(serve: Serve) -> None:
    text = serve.raw(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")[2].decode()
    for name in ("request_success", "request_failure", "count", "request_duration_us"):
        assert f'nv_inference_{name}{{model="digits",version="2"' in text


# ---------------------------------------------------------------- wrong input
def infer(**changes: object) -> bytes:
    """Return an infer request of a valid image with these fields of the tensor changed (None: left out)."""
    tensor = {name: value for name, value in {**IMAGE, **changes}.items() if value is not None}
    return post(json.dumps({"inputs": [tensor]}).encode())


def post(body: bytes, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return HEAD + f"Content-Length: {len(body)}\r\n{lines}\r\n".encode() + body


def binary(size: int, sent: int) -> bytes:
    tensor = {"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [tensor]}).encode()
    return post(text + bytes(sent), f"Inference-Header-Content-Length: {len(text)}")


@pytest.mark.parametrize(
    ("request_bytes", "status", "said"),
    [
        pytest.param(infer(), 200, '"model_version":"2"', id="right"),
        pytest.param(infer(name="picture"), 400, "unknown input 'picture'; digits takes image", id="unknown-input"),
        pytest.param(post(b'{"inputs": []}'), 400, "input image is missing", id="missing-input"),
        pytest.param(infer(shape=[1, 64]), 400, "shape [1, 8, 8, 1] is expected, got [1, 64]", id="shape"),
        pytest.param(infer(datatype="FP32"), 400, "datatype INT8 is expected, got FP32", id="datatype"),
        pytest.param(infer(data=[0] * 63), 400, "64 elements are expected, got shape [63]", id="too-few"),
        pytest.param(infer(data=[0] * 63 + [300]), 400, "from 0 to 300, outside of INT8", id="out-of-range"),
        pytest.param(infer(data=[0.5] * 64), 400, "not of type INT8", id="fractions"),
        pytest.param(infer(data=["a"] * 64), 400, "not of type INT8", id="words"),
        pytest.param(infer(data=[[0, 1], [2]]), 400, "not a regular array", id="ragged"),
        pytest.param(infer(data=None), 400, "neither data nor binary_data_size", id="no-data"),
        pytest.param(infer(name=7), 400, "Expected `str`, got `int`", id="wrong-json-type"),
        pytest.param(binary(64, 64), 200, '"data":[', id="binary-right"),
        pytest.param(binary(63, 63), 400, "64 bytes are expected (INT8 [1, 8, 8, 1]), got 63", id="binary-size"),
        pytest.param(binary(64, 60), 400, "64 binary bytes are announced, the body has 60", id="binary-short"),
        pytest.param(binary(64, 70), 400, "6 bytes are left over", id="binary-long"),
        pytest.param(post(bytes(63), "Inference-Header-Content-Length: 0"), 400, "64 bytes are expected", id="raw"),
        pytest.param(post(b"{}", "Inference-Header-Content-Length: 9"), 400, "is 9, but the body has 2", id="split"),
        pytest.param(post(b"{nope"), 400, "not an inference request", id="bad-json"),
        pytest.param(post(b"[" * 20_000), 400, "", id="deep-json"),
        pytest.param(post(b"\xff\xfe"), 400, "not an inference request", id="not-text"),
        pytest.param(post(b""), 400, "not an inference request", id="empty-body"),
        pytest.param(HEAD + b"Content-Length: 99999999999\r\n\r\n", 413, "at most", id="huge-length"),
        pytest.param(HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", 413, "every cap", id="absurd-length"),
        pytest.param(HEAD + b"Content-Length: -1\r\n\r\n", 400, "not a number", id="negative-length"),
        pytest.param(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n", 400, "twice", id="two-lengths"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501, "Content-Length", id="chunked"),
        pytest.param(HEAD + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\nxx", 415, "gzip", id="coding"),
        pytest.param(HEAD + b"X: " + b"y" * 20_000 + b"\r\n\r\n", 431, "over the cap", id="huge-header"),
        pytest.param(HEAD + b"no colon\r\n\r\n", 400, "not legal", id="bad-header"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "not an HTTP request", id="tls"),
        pytest.param(b"GET /v2 HTTP/2.0\r\n\r\n", 505, "HTTP/1.1", id="version"),
        pytest.param(b"GET v2 HTTP/1.1\r\n\r\n", 400, "must be a path", id="target"),
        pytest.param(b"GET /v2 HTTP/1.1\r\n\r\n", 400, "Host header is missing", id="no-host"),
        pytest.param(b"GET /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403, "evil.example", id="rebinding"),
        pytest.param(
            b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\n\r\n", 403, "evil", id="origin"
        ),
        pytest.param(b"GET /v3 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 404, "starts at /v2", id="unknown-path"),
        pytest.param(b"GET /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, "POST", id="method"),
        pytest.param(
            b"POST /v2/models/digits/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
            403,
            "Unix socket only",
            id="feedback-over-tcp",
        ),
        pytest.param(
            b"GET /v2/models/%00/x HTTP/1.1\r\nHost: localhost\r\n\r\n", 404, "a model has no 'x'", id="odd-path"
        ),
    ],
)
def test_each_wrong_request_has_its_status_and_says_why(
    serve: Serve, request_bytes: bytes, status: int, said: str
) -> None:
    answered, _, body = serve.raw(request_bytes)
    assert (answered, said in body.decode()) == (status, True), body
    if status != 200:
        assert list(json.loads(body)) == ["error"]
    assert serve.raw(infer())[0] == 200  # the server is none the worse for it


def test_a_connection_goes_on_after_a_refusal_that_was_understood(serve: Serve) -> None:
    with serve.tcp() as sock:
        for request, status in ((infer(shape=[64]), 400), (infer(), 200), (infer(name="x"), 400), (infer(), 200)):
            sock.sendall(request)
            assert read_answer(sock)[0] == status


def test_pipelined_requests_are_answered_in_order(serve: Serve) -> None:
    with serve.tcp() as sock:
        sock.sendall(infer() + infer(shape=[64]) + infer())
        with sock.makefile("rb") as stream:
            assert [int(_next(stream)) for _ in range(3)] == [200, 400, 200]


def _next(stream: object) -> bytes:
    status = stream.readline().split()[1]
    length = 0
    while (line := stream.readline()) != b"\r\n":
        if line.lower().startswith(b"content-length"):
            length = int(line.split(b":")[1])
    stream.read(length)
    return status


def test_a_large_refused_body_still_lets_the_client_read_why(serve: Serve) -> None:
    body = bytes(3_000_000)
    with serve.tcp() as sock:
        sock.sendall(post(body))
        status, head, answer = read_answer(sock)
    assert status == 413
    assert "Connection: close" in head
    assert "at most" in json.loads(answer)["error"]


def test_curl_is_told_to_continue(serve: Serve) -> None:
    with serve.tcp() as sock:
        body = infer().split(b"\r\n\r\n", 1)[1]
        sock.sendall(HEAD + f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert read_answer(sock)[0] == 200


def test_feedback_is_taken_on_the_unix_socket_by_index_or_name(serve: Serve) -> None:
    client = UnixClient(serve.unix)
    ids = [client.ask("POST", "/v2/models/digits/infer", {"inputs": [IMAGE]})[1]["id"] for _ in range(3)]
    path = "/v2/models/digits/feedback"
    assert client.ask("POST", path, {"id": ids[0], "truth": 3})[0] == 200
    assert client.ask("POST", path, {"id": ids[1], "truth": "3"}) == (200, {"id": ids[1], "truth": 3})
    assert client.ask("POST", path, {"id": ids[2], "truth": 10})[0] == 400
    assert client.ask("POST", path, {"id": ids[2]})[0] == 400
    client.close()


# ---------------------------------------------------------------- serve as a command
def ended(*arguments: str) -> tuple[int, str]:
    process = start(*arguments)
    errors = process.communicate(timeout=PATIENCE)[1]
    return process.returncode, errors


def test_serve_says_what_is_wrong_and_exits_with_2(serve: Serve, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"TFL3" * 100)
    free = f"127.0.0.1:{free_port()}"
    for arguments, said in (
        ((str(tmp_path / "missing.ewb"),), "No such file"),
        ((str(broken), "--http", free), "cannot load"),
        ((str(tmp_path), "--http", free), "manifest.json"),
        ((str(broken), "--http", f"127.0.0.1:{serve.port}"), "choose another port"),
        ((str(broken), "--http", "0.0.0.0:8000"), "not a loopback address"),
        ((str(broken), "--unix", str(serve.unix)), "another process serves on"),
    ):
        code, errors = ended(*arguments)
        assert (code, said in errors) == (2, True), (arguments, errors)
        assert "Traceback" not in errors
    assert serve.raw(infer())[0] == 200


def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    unix = tmp_path / "i.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(unix))
    model = store(tmp_path, "v1", 1)
    process = start(model.folder, "--unix", str(unix))
    assert process.stdout
    lines = [process.stdout.readline()]
    while "try:" not in lines[-1]:
        lines.append(process.stdout.readline())
    assert lines[0].startswith("unmanaged:")
    assert "curl -s --unix-socket" in lines[-1]
    assert oct(unix.stat().st_mode & 0o777) == "0o660"
    curl = subprocess.run(
        lines[-1].removeprefix("try: "), shell=True, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert json.loads(curl.stdout)["model_name"] == "digits"
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_a_bare_tflite_is_served_under_its_files_name(tmp_path: Path) -> None:
    path = tmp_path / "My Model.tflite"
    path.write_bytes((Path(store(tmp_path, "v1", 1).folder) / "model.tflite").read_bytes())
    port = free_port()
    process = start(str(path), "--http", f"127.0.0.1:{port}")
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        deadline = time.monotonic() + PATIENCE
        while not _is_ready(client):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert client.infer("my-model", [image_input()]).as_numpy("scores").shape == (1, 10)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def _is_ready(client: triton.InferenceServerClient) -> bool:
    try:
        return client.is_server_ready()
    except OSError:
        return False
