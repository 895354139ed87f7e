"""docs/reference/errors.md shows what the programs really answer, by asking both of them wrongly."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from docs_shell import DOCS, ROOT

PAGE = (DOCS / "reference" / "errors.md").read_text()
JSON = {"Content-Type": "application/json"}
PROGRAM = {**JSON, "X-Requested-With": "edgewarden"}
NUMBER = re.compile(r"\d+ s\b")
PATIENCE = 30.0


class Wrong(NamedTuple):
    """A request that is refused."""

    status: int
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed


def tensor(**changed: object) -> bytes:
    value = {"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "data": [0] * 64} | changed
    return json.dumps({"id": "five-1", "inputs": [value]}).encode()


INFER, FEEDBACK = "/v2/models/digits/infer", "/v2/models/digits/feedback"
INFERENCE = {
    "not a request": Wrong(400, "POST", INFER, b"nix"),
    "wrong type": Wrong(400, "POST", INFER, tensor(datatype="FP32")),
    "out of range": Wrong(400, "POST", INFER, tensor(data=[-128, 300] + [0] * 62)),
    "no such class": Wrong(400, "POST", FEEDBACK, b'{"id": "five-1", "truth": 17}'),
    "unknown prediction": Wrong(404, "POST", FEEDBACK, b'{"id": "five-9", "truth": 5}'),
    "told twice": Wrong(409, "POST", FEEDBACK, b'{"id": "five-1", "truth": 5}'),
    "no such model": Wrong(404, "GET", "/v2/models/cats"),
    "wrong method": Wrong(405, "DELETE", "/v2"),
    "too large": Wrong(413, "POST", INFER, b"0" * 200_000),
    "compressed": Wrong(415, "POST", INFER, b"0", {"Content-Encoding": "br"}),
    "long head": Wrong(431, "GET", "/v2", b"", {"X-Long": "a" * 20_000}),
    "not offered": Wrong(501, "GET", "/v2/systemsharedmemory/status"),
}
OVER_TCP = {
    "foreign host": Wrong(403, "GET", "/v2", b"", {"Host": "evil.example"}),
    "feedback": Wrong(403, "POST", FEEDBACK, b'{"id": "five-1", "truth": 5}'),
}
REST = {
    "not logged in": Wrong(401, "GET", "/api/v1/devices"),
    "wrong password": Wrong(401, "POST", "/api/v1/login", b'{"user": "admin", "password": "x"}', PROGRAM),
    "no header": Wrong(403, "POST", "/api/v1/deployments", b"{}", JSON),
    "another site": Wrong(403, "POST", "/api/v1/deployments", b"{}", {**PROGRAM, "Origin": "https://evil.example"}),
    "wrong method": Wrong(405, "PUT", "/api/v1/devices", b"{}", PROGRAM),
    "missing field": Wrong(400, "POST", "/api/v1/deployments", b'{"model": "digits"}', PROGRAM),
    "no such device": Wrong(404, "GET", "/api/v1/devices/cam-99"),
    "no roots yet": Wrong(409, "POST", "/api/v1/tokens", b'{"uses": 1, "life_seconds": 60}', PROGRAM),
    "no such digest": Wrong(
        409, "POST", "/api/v1/models/bundles/abc", b"x", {**PROGRAM, "Content-Type": "application/octet-stream"}
    ),
    "too large": Wrong(413, "POST", "/api/v1/deployments", b" " * 2_000_000, PROGRAM),
}
OPEN = ("not logged in", "wrong password")  # asked without a session


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def ask(connection: http.client.HTTPConnection, wrong: Wrong, **more: str) -> tuple[int, str]:
    try:
        with suppress(BrokenPipeError):  # a refusal may come before the whole body is sent
            connection.request(wrong.method, wrong.path, wrong.body, wrong.headers | more)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def shown(body: str) -> bool:
    """Tell whether the page has an answer, whatever it says of seconds."""
    return bool(body) and NUMBER.sub("#", body) in NUMBER.sub("#", PAGE)


def start(log: Path, *words: str) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stdout=file, stderr=file)


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    assert 0 == process.wait(PATIENCE)


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return ports


def wait_for(port: int, path: str, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            if ask(http.client.HTTPConnection("127.0.0.1", port), Wrong(200, "GET", path))[0] == http.client.OK:
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nothing answers on port {port}")


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Unix socket and port of a data plane that has answered and been told the truth of ``five-1``."""
    folder = tmp_path_factory.mktemp("i")
    unix, (port,) = folder / "i.sock", free_ports(1)
    words = ("agent.inference", "serve", "examples/digits/v1", "--unix", str(unix), "--http", f"127.0.0.1:{port}")
    process = start(folder / "log", *words)
    try:
        wait_for(port, "/v2/health/ready", process)
        assert 200 == ask(UnixConnection(unix), Wrong(200, "POST", INFER, tensor()))[0]
        assert 200 == ask(UnixConnection(unix), Wrong(200, "POST", FEEDBACK, b'{"id": "five-1", "truth": 5}'))[0]
        yield unix, port
    finally:
        stop(process)


@pytest.mark.parametrize("case", INFERENCE)
def test_an_inference_error_is_answered_as_the_page_shows(inference: tuple[Path, int], case: str) -> None:
    status, body = ask(UnixConnection(inference[0]), INFERENCE[case])
    assert (INFERENCE[case].status, True) == (status, shown(body)), body


@pytest.mark.parametrize("case", OVER_TCP)
def test_what_tcp_refuses_is_answered_as_the_page_shows(inference: tuple[Path, int], case: str) -> None:
    status, body = ask(http.client.HTTPConnection("127.0.0.1", inference[1]), OVER_TCP[case])
    assert (OVER_TCP[case].status, True) == (status, shown(body)), body


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """Port of a new server's console, and the cookie of a session."""
    folder = tmp_path_factory.mktemp("s")
    port, devices, broker, admin = free_ports(4)
    words = ["fleet_server", "serve", "--data", str(folder / "data"), "--public-host", "127.0.0.1"]
    words += ["--console", f"127.0.0.1:{port}", "--devices", f"127.0.0.1:{devices}"]
    words += ["--broker", f"127.0.0.1:{broker}", "--broker-admin-port", str(admin)]
    process = start(folder / "log", *words)
    try:
        wait_for(port, "/health", process)
        yield port, log_in(port, (folder / "data" / "admin-password").read_text().strip())
    finally:
        stop(process)


def log_in(port: int, password: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    body = json.dumps({"user": "admin", "password": password})
    connection.request("POST", "/api/v1/login", body, PROGRAM)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.headers["Set-Cookie"].partition(";")[0]


@pytest.mark.broker
@pytest.mark.parametrize("case", REST)
def test_a_rest_error_is_answered_as_the_page_shows(console: tuple[int, str], case: str) -> None:
    port, cookie = console
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    status, body = ask(connection, REST[case], **({} if case in OPEN else {"Cookie": cookie}))
    assert (REST[case].status, True) == (status, shown(body)), body


@pytest.mark.broker
def test_too_many_log_ins_are_answered_as_the_page_shows(console: tuple[int, str]) -> None:
    answers = [
        ask(http.client.HTTPConnection("127.0.0.1", console[0], timeout=PATIENCE), REST["wrong password"])
        for _ in range(6)
    ]
    assert 429 == answers[-1][0]
    assert shown(answers[-1][1]), answers[-1][1]
