"""A real agent whose disk is full, read-only, damaged or wiped: it serves on, says so, and recovers by itself."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from demo import story
from demo.world import DEVICES, World

NAME = DEVICES[0]

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


class Device:
    """One agent that the test starts and stops itself, its state on a small file system of its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.state = world.folder / NAME / "state"
        self.log = world.folder / "logs" / f"{NAME}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "agent", "run", "--config", str(self.world.config(NAME))]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, sig: signal.Signals = signal.SIGKILL) -> None:
        if self.process:
            self.process.send_signal(sig)
            self.process.wait(timeout=20)
            self.process = None

    @contextmanager
    def off(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()

    def answers(self) -> None:
        """Wait until clients are answered again, by requests made after this call."""
        counts = self.world.streams[NAME].counts
        before = counts.answered
        self.world.wait("answers", lambda: counts.answered > before + 10)

    def trouble(self) -> str:
        return str(self.world.local(NAME, "status", "--json")["trouble"])

    def told(self) -> str:
        """Return what the newest birth says is wrong."""
        return self.world.devices()[NAME].facts.get("trouble", "")

    def serves(self, version: int) -> None:
        def look() -> bool:
            model = self.world.model_on(NAME)
            return (model.running_version, model.state.value) == (version, "committed")

        self.world.wait(f"version {version} committed", look)

    def said(self, row: int, words: str) -> None:
        def look() -> bool:
            return any(words in event.detail for event in self.world.events_since(row, NAME))

        self.world.wait(f"an event that says {words!r}", look)


@contextmanager
def full(state: Path) -> Iterator[None]:
    """Leave no byte free on the state's file system."""
    filler = state / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 512):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    try:
        yield
    finally:
        filler.unlink()


def as_root(*command: str) -> None:
    """A file system of one's own takes root or password-less sudo to mount."""
    subprocess.run([*([] if os.getuid() == 0 else ["sudo", "-n"]), *command], check=True)


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A device that serves digits 1 under load, with version 2 published."""
    world = World(tmp_path_factory.mktemp("disk"))
    device = Device(world)
    device.state.mkdir(parents=True)
    as_root("mount", "-t", "tmpfs", "-o", f"size=24m,mode=0700,uid={os.getuid()}", "tmpfs", str(device.state))
    try:
        story.start_server(world)
        story.make_keys(world)
        token = world.folder / "token"
        world.edgewarden("tokens", "create", "--uses", "1", "--output", str(token))
        world.enrol(NAME, token)
        device.start()
        for version in ("v1", "v2"):
            story.publish(world, version)
        world.edgewarden("deploy", "digits", "1", "--device", NAME)
        device.serves(1)
        world.streams[NAME].start()
        yield device
    finally:
        world.streams[NAME].stop()
        device.stop(signal.SIGTERM)
        world.programs.stop_all()
        as_root("umount", str(device.state))


def test_a_full_disk_delays_an_update_is_told_with_a_remedy_and_ends_by_itself(device: Device) -> None:
    """Also when the agent is killed meanwhile, and starts with no room for its own files."""
    world, row = device.world, device.world.newest_event()
    failed = world.streams[NAME].counts.failed
    with full(device.state):
        world.edgewarden("deploy", "digits", "2", "--device", NAME)
        said = world.wait("the trouble in the local status", device.trouble)
        assert "neither full nor read-only" in said
        assert said[:200] == world.wait("the trouble in the birth", device.told)[:200]
        device.answers()
        assert failed == world.streams[NAME].counts.failed
        device.stop()
    for name in ("spool.db", "spool.db-wal", "spool.db-shm"):
        (device.state / name).unlink(missing_ok=True)
    with full(device.state):
        device.start()
        device.answers()
        world.wait("the trouble in the birth", device.told)
        before = world.devices()[NAME].reports
        world.wait("reports, from memory", lambda: world.devices()[NAME].reports > before)
        assert 1 == world.model_on(NAME).running_version
    device.serves(2)
    device.said(row, "neither full nor read-only")
    device.said(row, "takes what is written again")
    world.wait("the spool on the disk again", (device.state / "spool.db").exists)
    assert "" == device.trouble()


def test_an_agent_that_starts_on_a_read_only_disk_serves_and_recovers(device: Device) -> None:
    world = device.world
    device.stop()
    as_root("mount", "-o", "remount,ro", str(device.state))
    try:
        device.start()
        device.answers()
        assert "ead-only" in world.wait("the trouble in the birth", device.told)
    finally:
        as_root("mount", "-o", "remount,rw", str(device.state))
    world.wait("the end of the trouble", lambda: not device.told())
    assert "" == world.wait("the local status", lambda: device.trouble() or "none").replace("none", "")
    device.serves(2)


def overwritten(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 400)


@pytest.mark.parametrize("damage", [overwritten, Path.unlink])
def test_a_device_whose_files_were_all_damaged_serves_its_model_again(
    device: Device, damage: Callable[[Path], None]
) -> None:
    """All that the agent wrote but its identity and its bundles, at once."""
    row = device.world.newest_event()
    with device.off():
        for file in (*device.state.iterdir(), *(device.state / "trust").iterdir()):
            if file.is_file():
                damage(file)
    device.answers()
    device.serves(2)
    if damage is overwritten:
        device.said(row, "is damaged")
        device.said(row, "is unreadable")


def test_a_wiped_device_is_born_again_verifies_again_and_serves_again(device: Device) -> None:
    with device.off():
        for entry in device.state.iterdir():
            if entry.name != "identity":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    device.answers()
    device.serves(2)
    assert ["digits 2"] == device.world.local(NAME, "trust", "--json")["models"]


def test_a_device_with_a_damaged_identity_serves_on_and_says_what_to_do(device: Device) -> None:
    file = device.state / "identity" / "key.pem"
    whole = file.read_bytes()
    with device.off():
        file.write_bytes(whole[: len(whole) // 2])
    device.answers()
    said = device.trouble()
    assert "key.pem" in said
    assert "enroll --force" in said
    file.write_bytes(whole)
    device.world.wait("the whole agent", lambda: not device.trouble())
    device.answers()
    device.serves(2)
