"""``control.sock``: the agent's end and its command line's end of one line each way.

The agent's end runs on threads of its own and hands each request to the main loop; a client that says nothing, too
much or nonsense costs one thread for a few seconds. The path may be longer than a socket's name allows: both ends
reach it through the folder's descriptor.
"""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from agent.local_api import ANSWERS, MAX_LINE, REQUESTS, Denied, LocalAnswer, LocalRequest
from agent.ports import Trouble

log = logging.getLogger(__name__)

MODE = 0o600
LINE_SECONDS = 5.0  # to say what one wants
ANSWER_SECONDS = 60.0  # hashing every stored bundle takes a while on a slow card
MAX_CLIENTS = 4
_BACKLOG = 16

Reply = Callable[[LocalAnswer], None]


class LocalServer:
    """Listens on the socket; ``ask`` gets each request, with what to call once the answer is known."""

    def __init__(self, path: Path, ask: Callable[[LocalRequest, Reply], None]) -> None:
        """Take the path over from an agent that is gone (one agent per state folder); raise `Trouble`."""
        self._path = path
        self._ask = ask
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            with _reachable(path) as name:
                self._socket.bind(name)
            path.chmod(MODE)
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            raise Trouble(f"cannot listen on {path}: {error}", remedy="Check owner and mode of the folder") from error
        self._thread = threading.Thread(target=self._accept_all, name="local-control", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # a disk that became read-only keeps the name
            self._path.unlink(missing_ok=True)

    def _accept_all(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return  # closed
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(client,), name="local-client", daemon=True).start()
            else:
                client.close()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                client.settimeout(LINE_SECONDS)
                answer = self._answer(_read_line(client))
                client.sendall(msgspec.json.encode(answer) + b"\n")
            except OSError as error:
                log.debug("a local client went away: %s", error)
            finally:
                self._room.release()

    def _answer(self, line: bytes) -> LocalAnswer:
        try:
            request = REQUESTS.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return Denied(why=f"not a request: {error}")
        answers: SimpleQueue[LocalAnswer] = SimpleQueue()
        self._ask(request, answers.put)
        try:
            return answers.get(timeout=ANSWER_SECONDS)
        except Empty:
            return Denied(why=f"the agent is busy; no answer within {ANSWER_SECONDS:g} s")


def ask_agent(path: Path, request: LocalRequest) -> LocalAnswer:
    """Ask the running agent; raise `Trouble` when there is none, or it may not be asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_SECONDS + LINE_SECONDS)
        try:
            with _reachable(path) as name:
                sock.connect(name)
            sock.sendall(msgspec.json.encode(request) + b"\n")
            answer: LocalAnswer = ANSWERS.decode(_read_line(sock))
        except PermissionError as error:
            raise Trouble(f"{path} may not be opened", remedy="Run this as root or as the agent's user") from error
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise Trouble(
                f"no agent runs on {path.parent}", remedy="Start it: systemctl start edgewarden-agent"
            ) from error
        except (OSError, msgspec.DecodeError) as error:
            raise Trouble(f"the agent did not answer on {path}: {error}") from error
        return answer


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """Yield a name for the socket that is short however deep its folder lies."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _read_line(sock: socket.socket) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n"):
        if len(data) > MAX_LINE:
            raise ConnectionError(f"a line over {MAX_LINE} bytes")
        chunk = sock.recv(65536)
        if not chunk:
            raise ConnectionError("the other side said nothing whole")
        data += chunk
    return bytes(data)
