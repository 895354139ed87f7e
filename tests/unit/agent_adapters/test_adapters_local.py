"""The local socket, the hold and the history on disk."""

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.adapters.history_file import MAX_FILE, HistoryFile
from agent.adapters.hold_file import HoldFile
from agent.adapters.local_socket import LocalServer, Reply, ask_agent
from agent.local_api import MAX_LINE, AskHistory, AskStatus, Denied, Done, LocalRequest, OrderHold, Step
from agent.ports import Trouble
from protocol.states import DeploymentState


class Asked:
    """Answers at once, from another thread, as the main loop does."""

    def __init__(self) -> None:
        self.requests: list[LocalRequest] = []

    def __call__(self, request: LocalRequest, reply: Reply) -> None:
        self.requests.append(request)
        thread = threading.Thread(target=reply, args=(Done(said="as you wish"),))
        thread.start()
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a path longer than a socket's name may be."""
    folder = tmp_path / ("deep" * 20) / ("deeper" * 15)
    folder.mkdir(parents=True)
    return folder / "control.sock"


@pytest.fixture
def asked(path: Path) -> Iterator[Asked]:
    asked = Asked()
    server = LocalServer(path, asked)
    server.start()
    yield asked
    server.close()
    assert not path.exists()


def test_a_request_reaches_the_agent_and_its_answer_the_client(path: Path, asked: Asked) -> None:
    assert Done(said="as you wish") == ask_agent(path, OrderHold(seconds=60))
    assert [OrderHold(seconds=60)] == asked.requests


def test_nobody_else_may_open_it(path: Path, asked: Asked) -> None:
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)


def talk(path: Path, data: bytes) -> bytes:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(f"/proc/self/fd/{folder}/{path.name}")
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                return sock.recv(65536)
            except ConnectionError:
                return b""
    finally:
        os.close(folder)


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b'{"type":"AskEverything"}\n', b'{"type":"OrderHold"}\n', b"\xff\xfe\n"]
)
def test_nonsense_is_denied_with_a_reason(path: Path, asked: Asked, line: bytes) -> None:
    assert "not a request" in json.loads(talk(path, line))["why"]
    assert [] == asked.requests


@pytest.mark.parametrize("data", [b"", b'{"type":', b"x" * (MAX_LINE + 200_000)])
def test_a_client_that_says_nothing_whole_costs_nothing(path: Path, asked: Asked, data: bytes) -> None:
    assert b"" == talk(path, data)
    assert Done(said="as you wish") == ask_agent(path, AskStatus())


def test_without_an_agent_the_remedy_is_said(tmp_path: Path) -> None:
    with pytest.raises(Trouble, match="systemctl start edgewarden-agent"):
        ask_agent(tmp_path / "control.sock", AskStatus())


def test_a_socket_left_by_a_killed_agent_is_taken_over(path: Path) -> None:
    first = LocalServer(path, Asked())
    first._socket.close()
    asked = Asked()
    second = LocalServer(path, asked)
    second.start()
    assert isinstance(ask_agent(path, AskHistory()), Done | Denied)
    second.close()


# ---------------------------------------------------------------- hold
def test_a_hold_outlives_a_restart_and_ends(tmp_path: Path) -> None:
    HoldFile(tmp_path / "hold").set(123)
    again = HoldFile(tmp_path / "hold")
    assert 123 == again.until()
    again.set(0)
    assert (0, 0) == (again.until(), HoldFile(tmp_path / "hold").until())


@pytest.mark.parametrize("content", [b"", b"soon", b"9" * 100, b"\xff"])
def test_a_damaged_hold_holds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hold").write_bytes(content)
    assert 0 == HoldFile(tmp_path / "hold").until()


# ---------------------------------------------------------------- history
def step(number: int, model: str = "digits") -> Step:
    return Step(at=number, model=model, state=DeploymentState.COMMITTED, version=number, detail="x" * 100)


def test_the_newest_steps_come_first_and_half_a_line_is_skipped(tmp_path: Path) -> None:
    history = HistoryFile(tmp_path / "history.jsonl")
    assert () == history.newest(10)
    for number in (1, 2):
        history.add(step(number))
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b'{"at":3,"model"\n')
    history.add(step(4, "faces"))
    assert (step(4, "faces"), step(2)) == history.newest(2)
    assert (step(2), step(1)) == history.newest(10, "digits")


def test_a_full_history_forgets_its_older_half(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = HistoryFile(path)
    for number in range(4000):
        history.add(step(number))
    assert path.stat().st_size <= MAX_FILE + 1000
    assert step(3999) == history.newest(1)[0]


def test_a_history_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    HistoryFile(tmp_path / "no" / "folder").add(step(1))
    (tmp_path / "folder").mkdir()
    assert () == HistoryFile(tmp_path / "folder").newest(1)
