"""A real agent gets version 2 as a delta of version 1 from a real server; every byte passes a counting relay."""

import hashlib
import json
import random
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from demo import story
from demo.world import EXAMPLES, MODEL, World
from fleet_server.api_types import ModelVersion
from protocol.states import DeploymentState

DEVICE = "edge-1"
BALLAST = random.Random(9).randbytes(400_000)  # in both versions: what a fine-tuned model keeps

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


class Relay:
    """Passes TCP connections on to the server's device port, and counts what comes back."""

    def __init__(self, port: int) -> None:
        self.came = 0
        self._to = port
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._run(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self._open:
            _hang_up(sock)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._open):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._to), timeout=None)
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            self._run(partial(self._pass, client, server, counted=False))
            self._run(partial(self._pass, server, client, counted=True))

    def _pass(self, source: socket.socket, sink: socket.socket, *, counted: bool) -> None:
        try:
            while data := source.recv(65_536):
                self.came += len(data) * counted
                sink.sendall(data)
        except OSError:
            _hang_up(source)  # one side is gone: so is the other
        _hang_up(sink)

    def _run(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work)
        self._threads.append(thread)
        thread.start()


def _hang_up(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is gone already


@dataclass(kw_only=True)
class Fleet:
    """One device, enrolled through the relay."""

    world: World
    relay: Relay


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    world = World(tmp_path / "fleet")
    relay = Relay(world.ports.devices)
    try:
        story.start_server(world)
        story.make_keys(world)
        token = world.folder / "token"
        world.edgewarden("tokens", "create", "--uses", "1", "--output", str(token))
        server = f"https://127.0.0.1:{relay.port}"
        where = ("--server", server, "--token-file", str(token), "--device", DEVICE)
        world._command("agent", "enroll", *where, "--config", str(world.config(DEVICE)))
        world.start_agent(DEVICE)
        yield Fleet(world=world, relay=relay)
    finally:
        world.programs.stop_all()
        relay.close()


def with_ballast(tmp_path: Path, example: str) -> Path:
    """Return an example bundle with another member."""
    folder = tmp_path / example
    shutil.copytree(EXAMPLES / example, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "ballast.bin").write_bytes(BALLAST)
    manifest["members"]["ballast.bin"] = hashlib.sha256(BALLAST).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def publish(world: World, folder: Path, version: int) -> ModelVersion:
    world.edgewarden("models", "publish", str(folder), "--keys", str(world.keys))
    models = world.api().get("/models", tuple[ModelVersion, ...])
    (published,) = [model for model in models if model.version == version]
    last = world.data / "deltas" / f"{published.sha256}.none.json"
    world.wait("the deltas, of which the one from nothing is the last", lambda: last.exists() or None)
    return published


def deploy(world: World, version: int) -> None:
    world.edgewarden("deploy", MODEL, str(version), "--device", DEVICE)
    world.wait(f"version {version} committed", lambda: _committed(world, version))


def _committed(world: World, version: int) -> bool:
    model = world.model_on(DEVICE)
    return (version, DeploymentState.COMMITTED) == (model.running_version, model.state)


def test_version_2_comes_as_a_delta_of_version_1(fleet: Fleet, tmp_path: Path) -> None:
    world, relay = fleet.world, fleet.relay
    publish(world, with_ballast(tmp_path, "v1"), 1)
    before = relay.came
    deploy(world, 1)
    assert relay.came - before > len(BALLAST)

    published = publish(world, with_ballast(tmp_path, "v2"), 2)
    before, row = relay.came, world.newest_event()
    deploy(world, 2)
    on_the_wire = relay.came - before
    assert on_the_wire < len(BALLAST) // 4, "metadata, handshakes and all"
    told = [event.detail for event in world.events_since(row, DEVICE) if "came as" in event.detail]
    assert 1 == len(told), told
    assert f"of {published.length} bytes" in told[0]
    stored = world.folder / DEVICE / "state" / "models" / published.sha256 / "ballast.bin"
    assert BALLAST == stored.read_bytes()
