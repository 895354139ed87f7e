"""Simulated devices against a real Mosquitto: the whole way of a report, and back its acknowledgement."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from broker_world import BrokerWorld, eventually, now_ms

from agent.adapters.identity import IdentityFolder
from fleet_server.adapters.broker import BrokerLink
from fleet_server.core.positions import Position, arrived
from protocol.codec import decode_device_state, decode_report
from protocol.device_api import EnrolResponse
from protocol.messages import Acknowledgement, Birth, DeviceState, Farewell, Report
from protocol.topics import Channel, parse
from simulator.device import Scene
from simulator.fleet import Fleet, device_of, identities_in
from simulator.traffic import Load

pytestmark = pytest.mark.broker
DEVICES = ("sim-1", "sim-2", "sim-3")


class Server:
    """Stores reports, and acknowledges those of its devices when asked to."""

    def __init__(self, world: BrokerWorld) -> None:
        self.reports: dict[str, dict[tuple[str, int], Report]] = {name: {} for name in DEVICES}
        self.states: dict[str, DeviceState] = {}
        self._lock = threading.Lock()
        self.link: BrokerLink = world.link(on_message=self._take)

    def _take(self, name: str, payload: bytes, acknowledge: Callable[[], None]) -> bool:
        topic = parse(name)
        assert topic is not None
        with self._lock:
            if topic.channel is Channel.TELEMETRY:
                report = decode_report(payload)
                self.reports[topic.device].setdefault((report.spool, report.sequence), report)
            elif topic.channel is Channel.STATE:
                self.states[topic.device] = decode_device_state(payload)
        acknowledge()
        return True

    def answer(self) -> None:
        with self._lock:
            for device, reports in self.reports.items():
                for spool in {spool for spool, _ in reports}:
                    position = Position()
                    for of, number in reports:
                        position = arrived(position, number, number) if of == spool else position
                    upto, missing = position.told()
                    self.link.acknowledge(
                        device, Acknowledgement(spool=spool, at=now_ms(), telemetry=upto, missing_telemetry=missing)
                    )

    def counts(self) -> list[int]:
        with self._lock:
            return [len(self.reports[name]) for name in DEVICES]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[BrokerWorld]:
    world = BrokerWorld(tmp_path, *DEVICES)
    world.broker.start()
    yield world
    world.broker.stop()


@pytest.fixture
def server(world: BrokerWorld) -> Iterator[Server]:
    server = Server(world)
    server.link.start()
    assert eventually(lambda: server.link.connected)
    yield server
    server.link.stop()


@pytest.fixture
def identities(world: BrokerWorld) -> Path:
    """Enrol the devices, each in a folder of its own."""
    folder = world.folder / "identities"
    for name in DEVICES:
        identity = IdentityFolder(folder / name)
        response = EnrolResponse(
            certificate=world.authority.sign(identity.request(name), name, now_ms()),
            ca=world.settings.device_tls.ca.read_text(),
            image_root=b"{}",
            director_root=b"{}",
            broker_host="127.0.0.1",
            broker_port=world.settings.device_port,
        )
        identity.accept(name, "https://127.0.0.1:1", response)
    return folder


def test_reports_travel_and_leave_the_spool_when_the_server_has_them(server: Server, identities: Path) -> None:
    scene = Scene(load=Load(requests_per_second=20), window=1000)
    fleet = Fleet([device_of(identity, scene, now=now_ms) for identity in identities_in(identities)])
    with fleet.running():

        def step(done: Callable[[], bool]) -> Callable[[], bool]:
            return lambda: fleet.step() or done()

        assert eventually(step(lambda: min(server.counts()) >= 2))
        assert fleet.backlog() > 0
        assert eventually(step(lambda: server.answer() or fleet.backlog() == 0))
        assert all(isinstance(server.states[name], Birth) for name in DEVICES)
    assert eventually(lambda: all(isinstance(server.states[name], Farewell) for name in DEVICES))
    for reports in server.reports.values():
        numbers = sorted(number for _, number in reports)
        assert list(range(1, len(numbers) + 1)) == numbers


def test_a_broker_that_is_killed_loses_nothing(world: BrokerWorld, server: Server, identities: Path) -> None:
    scene = Scene(window=1000)
    fleet = Fleet([device_of(identity, scene, now=now_ms) for identity in identities_in(identities, 1)])
    with fleet.running():
        assert eventually(lambda: fleet.step() or server.counts()[0] >= 1)
        before = world.broker.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)  # its keeper starts the next one
        assert eventually(lambda: fleet.step() or world.broker.pid not in (None, before))
        assert eventually(
            lambda: fleet.step() or server.answer() or (server.counts()[0] >= 4 and not fleet.backlog())
        )
    numbers = sorted(number for _, number in server.reports["sim-1"])
    assert list(range(1, len(numbers) + 1)) == numbers


def test_the_program_runs_and_ends_by_itself(server: Server, identities: Path) -> None:
    command = [sys.executable, "-m", "simulator", "--identity-dir", str(identities), "--devices", "2"]
    program = subprocess.run(
        [*command, "--window", "1", "--seconds", "4"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (0, "") == (program.returncode, program.stdout), program.stderr
    assert eventually(lambda: min(server.counts()[:2]) >= 2)
    assert 0 == server.counts()[2]


def test_too_few_identities_end_the_program_with_a_remedy(tmp_path: Path) -> None:
    program = subprocess.run(
        [sys.executable, "-m", "simulator", "--identity-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 1 == program.returncode
    assert "edgewarden-agent enroll" in program.stderr
