"""The server's manners on real sockets, with short deadlines: stalling clients, crowding, draining."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from inference_parts import IMAGE, engine, servable

from agent.inference.engine import Engine
from agent.inference.http import Limits
from agent.inference.routes import Routes
from agent.inference.server import Server
from agent.listening import ListeningSockets

INFER = (
    b"POST /v2/models/digits/infer HTTP/1.1\r\nInference-Header-Content-Length: 0\r\nContent-Length: 64\r\n\r\n"
    + IMAGE
)
LIVE = b"GET /v2/health/live HTTP/1.1\r\n\r\n"
QUICK = Limits(idle_seconds=0.3, head_seconds=0.1, body_seconds=0.1, send_seconds=0.2)


class Running:
    """A server on a Unix socket, in this process."""

    def __init__(self, folder: Path, serving: Engine, limits: Limits, *, max_connections: int = 8) -> None:
        self.unix = folder / "i.sock"
        self.sockets = ListeningSockets.open(unix=self.unix)
        routes = Routes(serving, managed=True, body_cap=limits.body_bytes)
        self.server = Server(self.sockets, routes, limits, max_connections=max_connections)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(self.unix))
        return sock

    def stop(self) -> None:
        self.server.drain()
        self.thread.join()
        self.sockets.close()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    one = engine()
    one.serve(servable(tmp_path_factory.mktemp("model"), "v1", 1))
    yield one
    one.close()


@contextlib.contextmanager
def running(folder: Path, serving: Engine, limits: Limits = QUICK, **options: int) -> Iterator[Running]:
    one = Running(folder, serving, limits, **options)
    one.server.open()
    try:
        yield one
    finally:
        one.stop()


def read(sock: socket.socket) -> tuple[int, str, bytes]:
    """Return status, head and body of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _some(sock)
    head, _, body = data.partition(b"\r\n\r\n")
    text = head.decode()
    length = next(int(line.split(":")[1]) for line in text.splitlines() if line.startswith("Content-Length"))
    while len(body) < length:
        body += _some(sock)
    return int(text.split()[1]), text, body


def _some(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    assert data, "the server closed the connection"
    return data


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        pytest.param(b"GET /v2/hea", "the head did not arrive within 0.1 s", id="slow-head"),
        pytest.param(INFER[:-1], "the body did not arrive within 0.1 s", id="slow-body"),
    ],
)
def test_a_client_that_stalls_is_told_and_let_go(tmp_path: Path, serving: Engine, sent: bytes, said: str) -> None:
    with running(tmp_path, serving) as one, one.connect() as sock:
        sock.sendall(sent)
        status, _, body = read(sock)
        assert (status, json.loads(body)["error"]) == (408, said)
        assert sock.recv(1) == b""


def test_a_head_sent_byte_by_byte_still_has_one_deadline(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving) as one, one.connect() as sock:
        for byte in LIVE[:10]:
            sock.sendall(bytes([byte]))
            time.sleep(0.02)
        assert read(sock)[0] == 408


def test_an_idle_connection_is_closed_after_a_while(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving) as one, one.connect() as sock:
        sock.sendall(LIVE)
        assert read(sock)[0] == 200
        assert sock.recv(1) == b""


def test_a_client_that_leaves_in_the_middle_is_forgotten(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving, Limits()) as one:
        for sent in (b"", b"GET", INFER[:-3], INFER):
            with one.connect() as sock:
                sock.sendall(sent)
        with one.connect() as sock:
            sock.sendall(INFER)
            assert read(sock)[0] == 200


def test_too_many_connections_are_turned_away_with_a_reason(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving, Limits(), max_connections=2) as one, contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(one.connect())
            sock.sendall(LIVE)
            assert read(sock)[0] == 200
        with one.connect() as third:
            status, head, body = read(third)
        assert (status, json.loads(body)["error"]) == (503, "too many connections are open")
        assert "Retry-After: 1" in head


def test_nobody_is_served_before_the_server_opens(tmp_path: Path, serving: Engine) -> None:
    one = Running(tmp_path, serving, Limits())
    try:
        with one.connect() as sock:
            sock.sendall(LIVE)
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(1)
            one.server.open()
            sock.settimeout(5)
            assert read(sock)[0] == 200
    finally:
        one.stop()


def test_a_drain_answers_what_comes_on_open_connections_and_asks_them_to_leave(
    tmp_path: Path, serving: Engine
) -> None:
    with running(tmp_path, serving, Limits()) as one, one.connect() as sock:
        sock.sendall(INFER)
        assert "Connection: close" not in read(sock)[1]
        one.server.drain()
        sock.sendall(INFER)
        status, head, _ = read(sock)
        assert (status, "Connection: close" in head) == (200, True)
        assert sock.recv(1) == b""


def test_a_drain_cuts_connections_that_stay_idle(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving, Limits()) as one, one.connect() as sock:
        sock.sendall(LIVE)
        read(sock)
        began = time.monotonic()
        one.stop()
        assert time.monotonic() - began < 3
        assert sock.recv(1) == b""


def test_a_draining_server_is_not_ready(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving, Limits()) as one, one.connect() as sock:
        sock.sendall(b"GET /v2/health/ready HTTP/1.1\r\n\r\n")
        assert read(sock)[0] == 200
        one.server.drain()
        sock.sendall(b"GET /v2/health/ready HTTP/1.1\r\n\r\n")
        status, head, _ = read(sock)
        assert (status, "Retry-After" in head) == (503, True)


def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    crowded = engine(queue_limit=2)
    crowded.serve(servable(tmp_path, "v1", 1))
    found = crowded.find("digits")
    held = found.pool.lease()
    with running(tmp_path, crowded, Limits()) as one, one.connect() as first, one.connect() as second:
        first.sendall(INFER)
        while found.waiting < 2:
            pass
        second.sendall(INFER)
        status, head, body = read(second)
        assert (status, "Retry-After: 1" in head) == (503, True)
        assert json.loads(body)["error"] == "digits 1: 2 requests are waiting already"
        found.pool.give_back(held)
        assert read(first)[0] == 200
    crowded.close()


def test_a_request_that_meets_a_swap_goes_to_the_new_version(tmp_path: Path) -> None:
    swapped = engine()
    swapped.serve(servable(tmp_path, "v1", 1))
    old = swapped.find("digits")
    swapped.serve(servable(tmp_path, "v2", 2))
    new, asked = swapped.find("digits"), []

    class Between(Engine):
        """Finds the old one once, as a thread does that is overtaken by the flip."""

        def find(self, model: str, version: str | None = None) -> object:
            asked.append(model)
            return old if len(asked) <= 2 else new  # planning, then running

    swapped.__class__ = Between
    with running(tmp_path, swapped, Limits()) as one, one.connect() as sock:
        sock.sendall(INFER)
        status, _, body = read(sock)
    swapped.__class__ = Engine
    swapped.close()
    assert (status, b'"model_version":"2"' in body, len(asked)) == (200, True, 3)


def test_http_1_0_clients_are_served_and_let_go(tmp_path: Path, serving: Engine) -> None:
    with running(tmp_path, serving, Limits()) as one, one.connect() as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
        assert read(sock)[0] == 200
        assert sock.recv(1) == b""
