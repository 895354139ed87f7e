"""A disk that is full, read-only or worn, and files that came back damaged: the device serves on, says so, recovers.

The updater on the real store and the real files; only the data plane and the network are played.
"""

import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from device_pki import Authority

from agent.adapters import atomic_file, model_store
from agent.adapters.allowance import Allowance
from agent.adapters.connection_counter import ConnectionCounter
from agent.adapters.deployment_file import DeploymentFile
from agent.adapters.download import BundleDownloads
from agent.adapters.hold_file import HoldFile
from agent.adapters.https import HttpsServer
from agent.adapters.identity import IdentityFolder
from agent.adapters.model_store import FolderStore
from agent.adapters.spool import SqliteSpool
from agent.adapters.trust_memory import TrustMemory
from agent.channel import SelfTested, Serving, TrialVerdict
from agent.config import AgentSettings, DeviceSettings
from agent.core.facts import DeviceFacts, Target
from agent.core.health import HealthLimits
from agent.disk_watch import QUIET_SECONDS, DiskWatch
from agent.ports import EVENTS, TELEMETRY, Refusal, Trouble
from agent.stranded import has_served, trouble_with_identity
from agent.updater import Calm, Updater
from agent.verdicts import Verdicts
from protocol.manifest import MANIFEST_NAME, Manifest, encode_manifest
from protocol.states import DeploymentState as S
from protocol.states import RejectReason, RuntimeName
from simulator.memory import (
    DataPlaneCall,
    FakeDataPlane,
    FakeDownloads,
    InlineBackground,
    example_desire,
    example_digest,
    example_manifest,
    example_target,
)

FACTS = DeviceFacts(device_class="x86_64", runtimes=(RuntimeName.LITERT,), memory_total=10**9)
PROBATION_MS = 1000
ONE, TWO = example_digest("digits", 1), example_digest("digits", 2)


def members_of(version: int) -> dict[str, bytes]:
    return {"model.tflite": b"model %d" % version, "golden.npz": b"golden %d" % version}


def manifest_of(version: int) -> Manifest:
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members_of(version).items()}
    return msgspec.structs.replace(example_manifest("digits", version), members=hashes)


class UnpackingTrials:
    """Passes everything, and leaves a bundle in the staging folder as the trial child does."""

    def run(self, bundle: str, folder: str, target: Target) -> TrialVerdict:
        version = target.release.version
        (Path(folder) / MANIFEST_NAME).write_bytes(encode_manifest(manifest_of(version)))
        for name, data in members_of(version).items():
            (Path(folder) / name).write_bytes(data)
        return TrialVerdict(passed=True, golden=8)


class Silence:
    def record(self, **_: object) -> None:
        """Nobody listens."""


@dataclass
class Device:
    """A device on a real folder; `boot` is a start after a power cut."""

    folder: Path
    now: int = 1_750_000_000_000
    serves: int | None = None
    troubles: list[str] = field(default_factory=list)
    downloads: FakeDownloads = field(default_factory=FakeDownloads)

    def boot(self) -> "Device":
        self.serves = None
        self.background: list[Callable[[], None]] = []
        self.deployments, self.store = DeploymentFile(self.folder / "deployments.json"), FolderStore(self.folder)
        self.plane = FakeDataPlane()
        verdicts = Verdicts(
            plane=self.plane,
            monotonic=lambda: self.now / 1000,
            probation_ms=PROBATION_MS,
            limits=HealthLimits(),
        )
        self.updater = Updater(
            facts=FACTS,
            deployments=self.deployments,
            store=self.store,
            downloads=self.downloads,
            trials=UnpackingTrials(),
            plane=self.plane,
            background=InlineBackground(self.background.append),
            events=Silence(),
            changed=lambda: None,
            random=lambda: 0.0,
            monotonic=lambda: self.now / 1000,
            verdicts=verdicts,
            calm=Calm(),
            troubled=lambda trouble: self.troubles.append(str(trouble)),
        )
        self.verdicts = verdicts
        self.updater.start(self.now)
        self.settle()
        return self

    def settle(self) -> "Device":
        for _ in range(12):
            while self.background:
                self.background.pop(0)()
            calls, self.plane.calls = self.plane.calls, []
            for call in calls:
                self.answer(call)
            for ticket, model in self.plane.tests:
                self.test(ticket, model)
            self.plane.tests.clear()
            self.updater.tick(self.now)
        return self

    def answer(self, call: DataPlaneCall) -> None:
        if call.stored is None:
            self.serves = None
            return
        self.serves = call.stored.manifest.version
        told = Serving(
            ticket=call.ticket,
            model=call.model,
            version=self.serves,
            digest=call.stored.digest,
            runtime=RuntimeName.LITERT,
            took_us=1,
            alias=call.alias,
        )
        self.updater.plane_serves(told, self.now)

    def test(self, ticket: int, model: str) -> None:
        digest = example_digest(model, self.serves or 0)
        self.verdicts.tested(
            SelfTested(ticket=ticket, model=model, digest=digest, passed=True, detail="8 golden samples")
        )

    def want(self, version: int) -> "Device":
        self.updater.want(example_desire(example_target("digits", version)), self.now)
        return self.settle()

    def wait(self, seconds: float) -> "Device":
        self.now += int(seconds * 1000)
        return self.settle()

    def commit(self, version: int) -> "Device":
        self.want(version).wait(PROBATION_MS / 1000)
        assert (S.COMMITTED, version) == (self.state, self.serves)
        return self

    @property
    def state(self) -> S:
        (record,) = self.updater.records()
        return record.state


@pytest.fixture
def device(tmp_path: Path) -> Device:
    """A device that has committed digits 1."""
    return Device(folder=tmp_path).boot().commit(1)


# ---------------------------------------------------------------- files that came back damaged
def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def overwritten(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 40_000)  # over every cap


def deleted(file: Path) -> None:
    file.unlink()


DAMAGES = [truncated, emptied, zeroed, overwritten, deleted]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["deployments.json", "active.json"])
def test_a_damaged_memory_of_updates_serves_what_served_and_says_so(
    device: Device, name: str, damage: Callable[[Path], None]
) -> None:
    damage(device.folder / name)
    device.boot()
    assert (S.COMMITTED, 1) == (device.state, device.serves)
    assert {"digits": ONE} == device.store.active()
    told = device.deployments.lost + device.store.lost
    assert bool(told) is (damage is not deleted)
    assert name in told or damage is deleted
    device.commit(2).boot()
    assert (S.COMMITTED, 2, "") == (device.state, device.serves, device.deployments.lost + device.store.lost)


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_both_memories_damaged_the_stored_bundle_serves_again_when_it_is_wanted(
    device: Device, damage: Callable[[Path], None]
) -> None:
    fetched = len(device.downloads.calls)
    for name in ("deployments.json", "active.json"):
        damage(device.folder / name)
    device.boot()
    assert device.serves is None
    device.commit(1)
    assert fetched == len(device.downloads.calls)


def test_an_empty_state_folder_is_a_new_device(device: Device) -> None:
    for path in sorted(device.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    device.boot().commit(1)


def test_a_bundle_that_the_disk_does_not_let_us_read_now_is_not_thrown_away(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worn(_: object) -> str:
        raise OSError(errno.EIO, "Input/output error")

    fresh = FolderStore(device.folder)
    with monkeypatch.context() as patched:
        patched.setattr(model_store, "digest_of_stream", worn)
        assert fresh.find(ONE) is None
    assert fresh.find(ONE) is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_lost_connection_number_goes_on_above_every_number_counted(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    file = tmp_path / "connections"
    file.write_bytes(b"5712\n")
    assert 5713 == ConnectionCounter(file).next()
    damage(file)
    if damage is truncated:
        file.write_bytes(b"57x")
    assert ConnectionCounter(file).next() > 5713


def test_a_disk_that_refuses_the_connection_number_keeps_nobody_off_the_fleet(tmp_path: Path) -> None:
    counter = ConnectionCounter(tmp_path / "no" / "folder" / "connections")
    first, second = counter.next(), counter.next()
    assert int(time.time()) <= first < second


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_of_downloads_begins_the_day_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = tmp_path / "downloads.json"
    Allowance(file, bytes_per_day=1000).begin()
    damage(file)
    Allowance(file, bytes_per_day=1000).begin()  # nothing is used up


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_hold_file_holds_nothing_and_can_be_set_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    HoldFile(tmp_path / "hold").set(1_750_000_000_000)
    damage(tmp_path / "hold")
    hold = HoldFile(tmp_path / "hold")
    assert 0 == hold.until() or damage is truncated
    hold.set(1_750_000_000_001)
    assert 1_750_000_000_001 == HoldFile(tmp_path / "hold").until()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_trust_state_begins_anew_and_says_so(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "trust"
    folder.mkdir()
    memory = TrustMemory(folder, ("edge-1", "a", "b"))
    state = msgspec.structs.replace(memory.state, version=7, issued=5)
    memory.keep(state, msgspec.structs.replace(memory.marks, director=7, issued=5))
    (state_file,) = [file for file in folder.iterdir() if file.name.startswith("trust")]
    damage(state_file)
    again = TrustMemory(folder, ("edge-1", "a", "b"))
    assert "trust.json" in again.lost
    assert (0, 7, 5) == (again.state.version, again.marks.director, again.state.issued)
    assert not TrustMemory(folder, ("edge-1", "other", "roots")).state.version


@pytest.mark.parametrize("damage", [truncated, zeroed, overwritten])
def test_a_damaged_spool_begins_anew_under_another_id_and_is_kept_aside(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    spool = spool_at(tmp_path / "spool.db")
    for _ in range(50):
        spool.append(EVENTS, lambda _: b"x" * 200)
    spool.close()
    damage(tmp_path / "spool.db")
    again = spool_at(tmp_path / "spool.db")
    assert again.replaced is not None
    assert spool.id != again.id
    assert 1 == again.append(EVENTS, lambda _: b"y")
    again.close()


IDENTITY = ["key.pem", "cert.pem", "ca.pem", "image_root.json", "director_root.json", "identity.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", IDENTITY)
def test_a_damaged_identity_is_named_with_a_remedy_and_whole_again_when_it_is(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """Then the agent serves without the fleet, and goes on looking."""
    settings = AgentSettings(device=DeviceSettings(state=str(tmp_path)))
    files = IdentityFolder(tmp_path / "identity")
    files.accept("edge-1", "https://fleet:8443", Authority().response(files.request("edge-1")))
    assert trouble_with_identity(settings) is None
    whole = (tmp_path / "identity" / name).read_bytes()
    damage(tmp_path / "identity" / name)
    trouble = trouble_with_identity(settings)
    assert trouble is not None
    assert name in str(trouble)
    assert trouble.remedy
    (tmp_path / "identity" / name).write_bytes(whole)
    (tmp_path / "identity" / name).chmod(0o600)
    assert trouble_with_identity(settings) is None


def test_only_a_device_that_served_has_something_to_serve(
    device: Device, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert has_served(AgentSettings(device=DeviceSettings(state=str(device.folder))))
    assert not has_served(AgentSettings(device=DeviceSettings(state=str(tmp_path_factory.mktemp("new")))))


# ---------------------------------------------------------------- a disk that refuses
class Disk:
    """Refuses durable writes while its budget is used up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code = 0
        self.written = 0
        self.refuse: Callable[[int], bool] = lambda _: False
        self._really = atomic_file._write_durably
        monkeypatch.setattr(atomic_file, "_write_durably", self.write)

    def write(self, path: Path, data: bytes, mode: int) -> None:
        self.written += 1
        if self.refuse(self.written):
            raise OSError(self.code, "the disk refuses", str(path))
        self._really(path, data, mode)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def writes_of_an_update(folder: Path, disk: Disk) -> int:
    device = Device(folder=folder).boot().commit(1)
    before = disk.written
    device.commit(2)
    return disk.written - before


REFUSALS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "over its quota": errno.EDQUOT, "worn": errno.EIO}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_disk_that_refuses_at_any_write_of_an_update_only_delays_it(tmp_path: Path, disk: Disk, name: str) -> None:
    """Each write in turn is refused, and the two after it; what serves is never withdrawn; the update ends well."""
    disk.code = REFUSALS[name]
    writes = writes_of_an_update(tmp_path / "counted", disk)
    assert writes >= 8
    for number in range(1, writes + 1):
        device = Device(folder=tmp_path / f"{number}").boot().commit(1)
        first = disk.written + number
        disk.refuse = lambda count, first=first: first <= count < first + 3  # type: ignore[misc] # bound per turn
        device.want(2)
        assert device.serves in {1, 2}
        for _ in range(6):
            device.wait(5)
            assert device.serves in {1, 2}
        assert (S.COMMITTED, 2) == (device.state, device.serves), f"write {number}"
        assert {"digits": TWO} == device.store.active()
        assert device.troubles
        disk.refuse = lambda _: False


@pytest.mark.parametrize("name", REFUSALS)
def test_an_agent_that_starts_on_a_disk_that_refuses_serves_and_goes_on_when_it_is_well(
    tmp_path: Path, disk: Disk, name: str
) -> None:
    """Killed at each write of an update, and started while nothing can be written."""
    disk.code = REFUSALS[name]
    writes = writes_of_an_update(tmp_path / "counted", disk)
    for number in range(1, writes + 1):
        device = Device(folder=tmp_path / f"{number}").boot().commit(1)
        first = disk.written + number
        disk.refuse = lambda count, first=first: count >= first  # type: ignore[misc] # bound per turn
        device.want(2)
        device.boot()
        assert device.serves in {1, 2}, f"write {number}"
        disk.refuse = lambda _: False
        device.wait(6)
        device.commit(2)


def test_a_rollback_by_hand_that_the_disk_refuses_is_told_to_the_person(device: Device, disk: Disk) -> None:
    device.commit(2)
    disk.code, disk.refuse = errno.ENOSPC, lambda _: True
    with pytest.raises(Trouble, match="neither full nor read-only"):
        device.updater.take_back("digits", device.now)
    assert 2 == device.settle().serves


# ---------------------------------------------------------------- no room
def test_what_the_disk_could_not_hold_is_tried_again_when_there_is_room(tmp_path: Path) -> None:
    refusal = Refusal(RejectReason.NO_SPACE, "the disk is full")
    device = Device(folder=tmp_path, downloads=FakeDownloads({TWO: [refusal, "memory:/2.ewb"]})).boot().commit(1)
    device.downloads.room = False
    device.want(2)
    assert (S.REJECTED, 1) == (device.state, device.serves)
    tried = len(device.downloads.calls)
    device.wait(3600)
    assert (S.REJECTED, tried) == (device.state, len(device.downloads.calls))
    device.downloads.room = True
    device.settle()
    device.wait(PROBATION_MS / 1000)
    assert (S.COMMITTED, 2) == (device.state, device.serves)


def test_room_is_not_looked_for_at_every_tick(tmp_path: Path) -> None:
    refusal = Refusal(RejectReason.NO_SPACE, "the disk is full, whatever the file system says")
    device = Device(folder=tmp_path, downloads=FakeDownloads({TWO: [refusal]})).boot().commit(1)
    device.want(2)
    tried = len(device.downloads.calls)
    for _ in range(60):
        device.wait(60)
    assert S.REJECTED is device.state
    assert len(device.downloads.calls) - tried <= 12


# ---------------------------------------------------------------- reports without a disk
def spool_at(path: Path | None) -> SqliteSpool:
    return SqliteSpool(path, merge=lambda _older, _newer: None)


def test_a_spool_that_cannot_be_opened_is_trouble_whatever_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Trouble, match="neither full nor read-only"):
        spool_at(tmp_path / "no" / "folder" / "spool.db")


def test_a_spool_in_memory_moves_to_the_disk_once_nothing_waits_in_it(tmp_path: Path) -> None:
    spool = spool_at(None)
    in_memory = spool.id
    number = spool.append(TELEMETRY, lambda _: b"report")
    assert [(number, b"report")] == list(spool.unpublished(TELEMETRY, 5))
    assert not spool.move_to(tmp_path / "spool.db")
    assert 1 == spool.acknowledge(TELEMETRY, number, ())
    assert spool.in_memory
    assert spool.move_to(tmp_path / "spool.db")
    assert not spool.in_memory
    assert in_memory != spool.id
    assert 1 == spool.append(TELEMETRY, lambda _: b"on disk")
    spool.close()
    again = spool_at(tmp_path / "spool.db")
    assert [(1, b"on disk")] == list(again.unpublished(TELEMETRY, 5))
    again.close()


# ---------------------------------------------------------------- telling of it
@dataclass
class Watched:
    """A disk watch with a clock and a disk to play with."""

    now: float = 100.0
    is_well: bool = False
    said: list[str] = field(default_factory=list)
    changes: int = 0

    def __post_init__(self) -> None:
        self.watch = DiskWatch(trial=self.trial, events=self, changed=self.change, monotonic=lambda: self.now)

    def trial(self) -> None:
        if not self.is_well:
            raise Trouble("still full")

    def record(self, *, detail: str = "", **_: object) -> None:
        self.said.append(detail)

    def change(self) -> None:
        self.changes += 1


def test_a_disk_that_refuses_is_told_once_and_its_recovery_too() -> None:
    watched = Watched()
    for _ in range(5):
        watched.watch.refused(Trouble("cannot write x", remedy="Make room"))
    assert ["cannot write x. Make room"] == watched.said == [watched.watch.trouble]
    watched.now += QUIET_SECONDS
    assert not watched.watch.tick()  # the trial write is refused too
    watched.is_well = True
    assert not watched.watch.tick()  # not at once
    watched.now += QUIET_SECONDS
    assert watched.watch.tick()
    assert ("", 2, 2) == (watched.watch.trouble, len(watched.said), watched.changes)
    assert not watched.watch.tick()


def test_a_disk_is_not_well_while_it_refuses_somebody() -> None:
    """One file that cannot be written is enough, though others can."""
    watched = Watched(is_well=True)
    for _ in range(10):
        watched.watch.refused(Trouble("cannot write this one file"))
        watched.now += QUIET_SECONDS / 2
        assert not watched.watch.tick()
    assert 1 == len(watched.said)


def test_a_trial_write_leaves_nothing_behind(tmp_path: Path) -> None:
    atomic_file.try_writing(tmp_path)
    assert [] == list(tmp_path.iterdir())
    with pytest.raises(Trouble):
        atomic_file.try_writing(tmp_path / "gone")


def test_room_is_judged_without_a_download_folder_too(tmp_path: Path) -> None:
    server = HttpsServer("https://127.0.0.1:1", tls=lambda: None, authorise=str)  # type: ignore[arg-type, return-value] # never asked
    target = example_target("digits", 1)
    assert BundleDownloads(server, tmp_path / "none").has_room(target)
    (tmp_path / "some").mkdir()
    assert not BundleDownloads(server, tmp_path / "some", free=lambda _: 0).has_room(target)
    server.close()
