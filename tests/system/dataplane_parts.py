"""Parts that the data plane's system tests share: published bundles, clients, a control side."""

import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from agent.adapters.data_plane import DataPlaneProcesses, ListeningSockets
from agent.channel import STABLE, Refused, Serving, StatisticsDelta, Withdrawn
from agent.ports import DataPlaneExit, StoredModel
from agent.supervisor import Event, Supervisor
from protocol.bundle import write_bundle
from protocol.manifest import MANIFEST_NAME, Manifest, decode_manifest, encode_manifest

EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"
PATIENCE = 20.0  # seconds; a test that waits longer has failed


def heldout() -> tuple[np.ndarray, np.ndarray]:
    """Return the held-out images as the models take them (INT8) and their true classes."""
    with np.load(EXAMPLES / "heldout.npz") as arrays:
        images, truth = arrays["images"], arrays["truth"]
    real = images.astype(np.float64) / 16.0
    return np.clip(np.rint(real / 0.003921568859368563) - 128, -128, 127).astype(np.int8), truth.astype(int)


def members(example: str) -> dict[str, bytes]:
    folder = EXAMPLES / example
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST_NAME}


def manifest_of(example: str, version: int) -> Manifest:
    manifest = decode_manifest((EXAMPLES / example / MANIFEST_NAME).read_bytes())
    return msgspec.structs.replace(manifest, version=version)


def write_ewb(path: Path, manifest: Manifest, content: dict[str, bytes]) -> Path:
    """Write a bundle of this content, whatever the manifest said about its hashes."""
    listed = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    with path.open("wb") as target:
        write_bundle(target, msgspec.structs.replace(manifest, members=listed), content)
    return path


def store(root: Path, example: str, version: int) -> StoredModel:
    """Lay out an example as the model store does: extracted, with its published version."""
    manifest = manifest_of(example, version)
    digest = hashlib.sha256(encode_manifest(manifest)).hexdigest()
    folder = root / digest
    folder.mkdir()
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    for name, data in members(example).items():
        (folder / name).write_bytes(data)
    return StoredModel(digest=digest, folder=str(folder), manifest=manifest)


class UnixClient(http.client.HTTPConnection):
    """A keep-alive HTTP client on a Unix socket."""

    def __init__(self, path: Path, timeout: float = PATIENCE) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def infer(self, image: np.ndarray, model: str = "digits") -> tuple[int, bytes]:
        headers = {"Inference-Header-Content-Length": "0"}
        self.request("POST", f"/v2/models/{model}/infer", body=image.tobytes(), headers=headers)
        response = self.getresponse()
        return response.status, response.read()

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict]:
        self.request(method, path, body=None if body is None else json.dumps(body))
        response = self.getresponse()
        return response.status, json.loads(response.read())


class Control:
    """The control side with a real supervisor: remembers what it heard."""

    def __init__(self, folder: Path, options: Sequence[str] = (), **supervisor: object) -> None:
        self.unix = folder / "inference.sock"
        self.sockets = ListeningSockets.open(unix=self.unix, tcp=("127.0.0.1", 0))
        self.heard: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda _: None
        self._changed = threading.Condition()
        self.supervisor = Supervisor(DataPlaneProcesses(self.sockets, options=options), self._hear, **supervisor)
        self._tickets = iter(range(1, 1_000_000))

    @property
    def http(self) -> str:
        return next(address for address in self.sockets.addresses() if address.startswith("http://"))

    def _hear(self, event: Event) -> None:
        with self._changed:
            self.heard.append(event)
            self._changed.notify_all()
        self.on_event(event)

    def wait_for(self, wanted: Callable[[Event], bool], since: int = 0) -> Event:
        def find() -> Event | None:
            return next((event for event in self.heard[since:] if wanted(event)), None)

        with self._changed:
            found = self._changed.wait_for(find, timeout=PATIENCE)
        assert found is not None, f"not heard within {PATIENCE} s: {self.heard[since:]}"
        return found

    def wait_for_end(self, pid: int) -> DataPlaneExit:
        ended = self.wait_for(lambda event: isinstance(event, DataPlaneExit) and event.pid == pid)
        assert isinstance(ended, DataPlaneExit)
        return ended

    def serve(self, model: StoredModel, alias: str = STABLE) -> Serving | Refused:
        ticket = next(self._tickets)
        self.supervisor.serve(ticket, model, alias)
        answer = self.wait_for(lambda event: getattr(event, "ticket", None) == ticket)
        assert isinstance(answer, Serving | Refused)
        return answer

    def withdraw(self, name: str, alias: str = "") -> Withdrawn:
        ticket = next(self._tickets)
        self.supervisor.withdraw(ticket, name, alias)
        answer = self.wait_for(lambda event: getattr(event, "ticket", None) == ticket)
        assert isinstance(answer, Withdrawn)
        return answer

    def requests_counted(self) -> int:
        deltas = [event for event in self.heard if isinstance(event, StatisticsDelta)]
        return sum(model.requests for delta in deltas for model in delta.models)

    def deltas(self) -> list[StatisticsDelta]:
        return [event for event in self.heard if isinstance(event, StatisticsDelta)]


@contextmanager
def control_side(folder: Path, options: Sequence[str] = (), **supervisor: object) -> Iterator[Control]:
    control = Control(folder, options, **supervisor)
    control.supervisor.start()
    try:
        yield control
    finally:
        control.supervisor.stop()
        control.sockets.close()


class Load:
    """Clients that ask all the time, each on its own connection, and count what they get."""

    def __init__(self, unix: Path, clients: int = 2, *, keep_alive: bool = True) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self.refused = 0
        self.worst = 0.0
        self._unix = unix
        self._keep_alive = keep_alive
        self._image = heldout()[0][0]
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_all_the_time) for _ in range(clients)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, answers: int) -> None:
        """Wait until this many more requests were answered."""
        goal, deadline = self.answered + answers, time.monotonic() + PATIENCE
        while self.answered < goal:
            assert time.monotonic() < deadline, f"{self.answered} of {goal} answers, {self.failures[-3:]}"
            time.sleep(0.002)

    def _ask_all_the_time(self) -> None:
        client = UnixClient(self._unix)
        while not self._over.is_set():
            started = time.monotonic()
            try:
                status, body = client.infer(self._image)
                failure = "" if status == 200 else f"{status} {body[:200]!r}"
            except ConnectionRefusedError as error:
                failure = f"refused: {error}"
                self.refused += 1
            except (OSError, http.client.HTTPException) as error:
                failure = repr(error)
            with self._lock:
                self.answered += not failure
                self.worst = max(self.worst, time.monotonic() - started)
                if failure:
                    self.failures.append(failure)
            if failure or not self._keep_alive:
                client.close()
        client.close()


@contextmanager
def load(unix: Path, clients: int = 2, *, keep_alive: bool = True) -> Iterator[Load]:
    asking = Load(unix, clients, keep_alive=keep_alive)
    asking.start()
    try:
        yield asking
    finally:
        asking.stop()
