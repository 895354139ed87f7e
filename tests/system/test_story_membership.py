"""A device's identity over its life, with the whole server, a real Mosquitto and a real agent.

Revoked while connected; its certificate refused after restarts of broker and server; enrolled again with a new key;
and a CA that is replaced under a running agent.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import psutil
import pytest
import urllib3
from broker_world import Device, eventually
from typer.testing import CliRunner

from agent.__main__ import main as agent_main
from agent.adapters.identity import Identity, IdentityFolder
from agent.adapters.local_socket import ask_agent
from agent.local_api import AskStatus, Status
from agent.ports import Trouble
from fleet_server.adapters.authority import TlsFiles
from fleet_server.ca_rotation import CaStatus
from fleet_server.cli.__main__ import app as cli
from protocol.device_api import DIRECTOR_METADATA_PATH, RENEW_PATH
from protocol.topics import Channel, device_topic

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]
LONG = 60.0  # seconds; a loaded machine is given time


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Fleet:
    """A server that can be stopped and started on one folder and the same ports, and its devices' folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("console", "devices", "broker", "broker-admin-port")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['console']}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "fleet_server", "serve", "--data", str(self.folder / "data")]
        for name, port in self.ports.items():
            command += [f"--{name}", str(port) if name == "broker-admin-port" else f"127.0.0.1:{port}"]
        log = (self.folder / "server.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [*command, "--public-host", "localhost"], stderr=log, stdout=log, start_new_session=True
            )
        assert eventually(self._is_up, LONG), (self.folder / "server.log").read_text()

    def _is_up(self) -> bool:
        with urllib3.PoolManager(retries=False, timeout=5.0) as pool, suppress(urllib3.exceptions.HTTPError):
            return pool.request("GET", f"{self.url}/health").status == 200
        return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def broker(self) -> int | None:
        """Return the broker's process id."""
        children = psutil.Process(self.process.pid).children()
        return next((child.pid for child in children if child.name() == "mosquitto"), None)

    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(cli, [*arguments, "--server", self.url])
        assert result.exit_code == 0, result.output
        return result.stdout

    def ca(self, step: str, *options: str) -> CaStatus:
        command = [sys.executable, "-m", "fleet_server", "ca", step, "--json", *options]
        command += ["--data", str(self.folder / "data")]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert said.returncode == 0, said.stderr
        return msgspec.json.decode(said.stdout, type=CaStatus)

    def enrol(self, device: str, *options: str) -> int:
        token = self.folder / f"{device}.token"
        self.run("tokens", "create", "--output", str(token))
        place = self.place(device)
        place.mkdir(exist_ok=True)
        unix = json.dumps(str(place / "i.sock"))
        settings = f'[device]\nstate = {json.dumps(str(place))}\n[inference]\nunix = {unix}\nhttp = ""\n'
        (place / "agent.toml").write_text(settings + "[mqtt]\nreconnect_seconds = 1\n")
        server = f"https://localhost:{self.ports['devices']}"
        words = ["enroll", "--server", server, "--token-file", str(token), "--device", device]
        return agent_main([*words, "--config", str(place / "agent.toml"), *options])

    def place(self, device: str) -> Path:
        return self.folder / device

    def identity(self, device: str) -> Identity:
        return IdentityFolder(self.place(device) / "identity").load()

    def connect(self, identity: Identity) -> Device:
        """Connect as a device; raises OSError, or ConnectionRefusedError when the broker hangs up."""
        suffix = f"-{identity.settings.generation}" if identity.settings.generation else ""
        files = TlsFiles(
            certificate=identity.folder / f"cert{suffix}.pem",
            key=identity.folder / f"key{suffix}.pem",
            ca=identity.folder / f"ca{suffix}.pem",
        )
        return Device(files, self.ports["broker"], identity.device)

    def get(self, identity: Identity, path: str) -> int:
        headers = {"Authorization": f"Bearer {identity.token(time.time_ns() // 1_000_000)}"}
        with urllib3.PoolManager(ssl_context=identity.server_tls(), retries=False, timeout=20.0) as pool:
            url = f"https://localhost:{self.ports['devices']}{path}"
            return pool.request("GET", url, headers=headers).status

    def is_let_in(self, identity: Identity) -> bool:
        """Tell whether the broker lets a device connect and listen."""
        try:
            with self.connect(identity) as device:
                return device.subscribe(device_topic(identity.device, Channel.DESIRED)).startswith("Granted")
        except Exception:  # noqa: BLE001 - refused by TLS, by CONNACK, by a hang-up, or by silence
            return False


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("EDGEWARDEN_PASSWORD", (tmp_path / "data" / "admin-password").read_text().strip())
    made.run("keys", "init", "--dir", str(tmp_path / "keys"), "--no-passphrase")
    yield made
    made.stop()


def test_a_revoked_device_is_cut_off_and_stays_out_over_restarts_of_broker_and_server(fleet: Fleet) -> None:
    assert (fleet.enrol("cam-1"), fleet.enrol("cam-2")) == (0, 0)
    identity, other = fleet.identity("cam-1"), fleet.identity("cam-2")
    with fleet.connect(identity) as live, fleet.connect(other) as bystander:
        assert live.subscribe(device_topic("cam-1", Channel.DESIRED)).startswith("Granted")
        assert live.received() is not None
        assert "cut off" in fleet.run("devices", "revoke", "cam-1", "--yes")
        assert live._answers.get(timeout=15) is None  # what its on_disconnect says
        assert bystander.subscribe(device_topic("cam-2", Channel.DESIRED)).startswith("Granted")
    assert fleet.get(identity, DIRECTOR_METADATA_PATH + "/timestamp.json") == 403
    assert not fleet.is_let_in(identity)

    pid = fleet.broker()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: fleet.broker() not in (None, pid), LONG)
    assert eventually(lambda: fleet.is_let_in(other), LONG)
    assert not fleet.is_let_in(identity)
    assert "BEGIN X509 CRL" in (fleet.folder / "data" / "broker" / "revoked.pem").read_text()

    fleet.stop()
    fleet.start()
    assert eventually(lambda: fleet.is_let_in(other), LONG)
    assert not fleet.is_let_in(identity)
    assert fleet.get(identity, RENEW_PATH) == 403


def test_a_lost_device_enrols_again_and_whoever_has_the_old_key_stays_out(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet.enrol("cam-1") == 0
    lost = fleet.identity("cam-1")
    assert fleet.enrol("cam-1", "--force") == 1
    assert "edgewarden devices reopen cam-1" in capsys.readouterr().err
    assert fleet.identity("cam-1").certificate == lost.certificate  # what it was still counts
    assert fleet.is_let_in(lost)
    fleet.run("devices", "reopen", "cam-1")
    thief = IdentityFolder(fleet.folder / "thief")
    (fleet.folder / "thief").mkdir()
    for path in lost.folder.iterdir():
        (fleet.folder / "thief" / path.name).write_bytes(path.read_bytes())
        (fleet.folder / "thief" / path.name).chmod(0o600)

    assert fleet.enrol("cam-1", "--force") == 0

    found = fleet.identity("cam-1")
    assert eventually(lambda: fleet.is_let_in(found), LONG)
    assert not fleet.is_let_in(thief.load())
    assert (fleet.get(thief.load(), RENEW_PATH), fleet.get(found, RENEW_PATH)) == (401, 200)
    assert fleet.enrol("cam-1", "--force") == 1  # the opening was used


@contextmanager
def running(fleet: Fleet, device: str) -> Iterator["subprocess.Popen[bytes]"]:
    log = (fleet.folder / f"{device}.log").open("wb")
    command = [sys.executable, "-m", "agent", "run", "--config", str(fleet.place(device) / "agent.toml")]
    with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def status(fleet: Fleet, device: str) -> Status:
    """Ask the running agent; wait for it to be up."""
    answers: list[Status] = []

    def ask() -> bool:
        with suppress(Trouble):
            answer = ask_agent(fleet.place(device) / "control.sock", AskStatus())
            assert isinstance(answer, Status)
            answers.append(answer)
        return bool(answers)

    assert eventually(ask, LONG), (fleet.folder / f"{device}.log").read_text()
    return answers[-1]


def test_a_running_agent_follows_a_ca_that_is_replaced_and_says_when_it_is_revoked(fleet: Fleet) -> None:
    assert fleet.enrol("cam-1") == 0
    first = fleet.identity("cam-1")
    with running(fleet, "cam-1"):
        assert eventually(lambda: status(fleet, "cam-1").connected, LONG)

    fleet.stop()
    rotated = fleet.ca("rotate")
    assert (len(rotated.in_force), rotated.waiting) == (2, ("cam-1",))
    fleet.start()
    with running(fleet, "cam-1"):  # it asks when it starts, and then once a day
        assert eventually(lambda: fleet.identity("cam-1").certificate != first.certificate, LONG)
        assert eventually(lambda: fleet.ca("status").waiting == (), LONG)
        assert eventually(lambda: status(fleet, "cam-1").connected, LONG)
        assert fleet.get(first, RENEW_PATH) == 401

        fleet.stop()
        retired = fleet.ca("retire")
        assert (retired.in_force, retired.waiting) == (rotated.in_force[1:], ())
        fleet.start()
        assert eventually(lambda: status(fleet, "cam-1").connected, LONG)  # by the new CA, with no restart of its own
        with pytest.raises(urllib3.exceptions.SSLError):
            fleet.get(first, RENEW_PATH)  # it knows the old CA alone: this is how a device looks that was left behind

        fleet.run("devices", "revoke", "cam-1", "--yes")
        assert eventually(lambda: "was revoked" in status(fleet, "cam-1").shut_out, LONG)
        assert status(fleet, "cam-1").data_plane is not None  # it serves on


def test_the_ca_is_not_replaced_under_a_running_server_and_not_before_all_have_renewed(fleet: Fleet) -> None:
    assert fleet.enrol("cam-1") == 0
    data = str(fleet.folder / "data")

    def refused(*words: str) -> str:
        command = [sys.executable, "-m", "fleet_server", "ca", *words, "--data", data]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert said.returncode == 1, said.stdout
        return said.stderr

    assert "another edgewarden-server runs" in refused("rotate")
    fleet.stop()
    assert "there is no next CA" in refused("retire", "--force")
    fleet.ca("rotate")
    assert "1 devices hold no certificate of the next CA" in refused("retire")
    assert fleet.ca("retire", "--force").waiting == ("cam-1",)
    fleet.start()
