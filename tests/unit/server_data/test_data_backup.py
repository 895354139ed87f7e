"""Backups: whole, of one moment, refused when damaged; and a fleet whose server was restored can still be reached."""

import json
import random
import stat
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import pytest
from data_world import NOW, Databases, birth, bundle, enrol, event, report, rows_of
from securesystemslib.signer import CryptoSigner, Key
from sqlalchemy.engine import Engine
from tuf.api.metadata import Metadata, Root

from fleet_server.adapters import backup as module
from fleet_server.adapters.backup import BadBackup, Manifest, _unpack, make_backup, refuse_unfinished, restore_backup
from fleet_server.adapters.database import dialect, snapshot, tables
from fleet_server.adapters.database.opening import open_database
from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseRegistry, DatabaseReleases
from fleet_server.adapters.database.retention import Retention
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.adapters.director import OnlineDirector
from fleet_server.api_types import DeployRequest
from fleet_server.core.rollups import DAY, Kept
from fleet_server.ports import Batch
from fleet_server.rollouts import Rollouts
from protocol.messages import DesiredState

EVERYTHING = [table.name for table in tables.metadata.sorted_tables]


@dataclass
class Uplink:
    """`ports.Uplink`, as far as orders need it."""

    told: list[tuple[str, int]] = field(default_factory=list)

    def publish_desired(self, device_id: str, message: DesiredState) -> None:
        signed = msgspec.json.decode(message.targets)["signed"]
        self.told.append((device_id, signed["version"]))


@dataclass
class Server:
    """A data folder and its database, as a server leaves them."""

    data: Path
    url: str

    def open(self) -> Engine:
        return open_database(self.url)

    def order(self, engine: Engine, version: int) -> list[tuple[str, int]]:
        """Deploy to both devices; return the Director versions that they were sent."""
        uplink = Uplink()
        rollouts = Rollouts(
            registry=DatabaseRegistry(engine, clock=lambda: NOW),
            releases=DatabaseReleases(engine),
            desired=DatabaseDesiredStates(engine),
            director=OnlineDirector(self.data / "director"),
            uplink=uplink,  # type: ignore[arg-type]  # the part that orders use
            new_id=lambda: f"order-{NOW}-{version}-{id(uplink)}",
        )
        request = DeployRequest(model="digits", version=version, all=True)
        rollouts.deploy(request, by="admin", now=NOW)
        return uplink.told

    def rows(self) -> dict[str, list[tuple[object, ...]]]:
        engine = self.open()
        try:
            return rows_of(engine, *EVERYTHING)
        finally:
            engine.dispose()


def make_roots(data: Path) -> None:
    """Let an offline key name the server's online keys, as `edgewarden keys init` does."""
    director = OnlineDirector(data / "director")
    offline = CryptoSigner.generate_ed25519()
    root = Root(expires=datetime(2100, 1, 1, tzinfo=timezone.utc))
    root.add_key(offline.public_key, Root.type)
    for role, key in director.online_keys().items():
        named = msgspec.json.decode(key)
        root.add_key(Key.from_dict(named.pop("keyid"), named), role)
    signed = Metadata(root)
    signed.sign(offline)
    director.accept_root(signed.to_bytes())


def make_server(databases: Databases, folder: Path) -> Server:
    """Make a server with something of everything in it."""
    data = folder / "data"
    for name in ("bundles", "deltas", "broker"):
        (data / name).mkdir(parents=True)
        (data / name / f"one-{name}").write_bytes(name.encode() * 1000)
    (data / "admin-password").write_text("secret\n")
    (data / "admin-password").chmod(0o600)
    (data / ".half-written").write_text("no")
    url = databases.url() if databases.cluster else f"sqlite:///{data / 'edgewarden.db'}"
    server = Server(data=data, url=url)
    engine = server.open()
    enrol(engine, "cam-1", "cam-2")
    DatabaseReleases(engine).add_bundles([bundle(1), bundle(2)])
    telemetry = DatabaseTelemetry(engine)
    for day in (0, 1, 40):
        batch = Batch(
            reports=[("cam-1", report(day + 1, truth=((0, 0, 1),)))],
            events=[("cam-1", event(day + 1))],
            states=[("cam-2", birth())],
            dead_letters=[("t", b"\x00\xff", "why")],
            received_at=NOW + day * DAY,
        )
        telemetry.store(batch)
    Retention(engine, kept=Kept()).sum_up()
    telemetry.store(Batch(reports=[("cam-2", report(1))], received_at=NOW))
    make_roots(data)
    server.order(engine, 1)
    engine.dispose()
    return server


@pytest.fixture
def server(databases: Databases, tmp_path: Path) -> Server:
    return make_server(databases, tmp_path / "first")


def empty_server(databases: Databases, folder: Path) -> Server:
    data = folder / "data"
    data.mkdir(parents=True)
    return Server(data=data, url=databases.url() if databases.cluster else f"sqlite:///{data / 'edgewarden.db'}")


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything in a folder that is not the database."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("edgewarden.db")
    }


def test_what_comes_back_is_what_was_there_except_what_is_made_anew(
    server: Server, databases: Databases, tmp_path: Path
) -> None:
    copy = tmp_path / "backup.zip"
    make_backup(server.data, server.url, copy, now=NOW)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    other = empty_server(databases, tmp_path / "second")
    restore_backup(copy, other.data, other.url, force=False, now=NOW)
    assert other.rows() == server.rows()
    kept = {
        k: v for k, v in files_of(server.data).items() if k.split("/")[0] not in ("deltas", "broker", ".half-written")
    }
    assert files_of(other.data) == kept
    engine = other.open()
    DatabaseTelemetry(engine).store(Batch(events=[("cam-1", event(99))], received_at=NOW))  # rows go on above
    assert len(rows_of(engine, "event")["event"]) == 4
    engine.dispose()


def test_a_backup_of_one_kind_of_database_goes_into_the_other(
    server: Server, databases: Databases, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    copy = tmp_path / "backup.zip"
    make_backup(server.data, server.url, copy, now=NOW)
    cluster = request.getfixturevalue("postgres")
    url = cluster.database()
    data = tmp_path / "second"
    data.mkdir()
    there = url.render_as_string(hide_password=False) if databases.cluster is None else f"sqlite:///{data / 'new.db'}"
    other = Server(data=data, url=there)
    restore_backup(copy, other.data, other.url, force=False, now=NOW)
    assert other.rows() == server.rows()
    cluster.drop(url)


def test_after_an_older_backup_the_next_order_is_above_what_devices_report(server: Server, tmp_path: Path) -> None:
    copy = tmp_path / "backup.zip"
    make_backup(server.data, server.url, copy, now=NOW)
    engine = server.open()
    for version in (2, 1, 2):  # the fleet goes on after the backup
        newest = dict(server.order(engine, version))
    engine.dispose()
    restore_backup(copy, server.data, server.url, force=True, now=NOW)
    engine = server.open()
    reached = {device: n for device, n in newest.items() if n == 4}
    assert set(reached) == {"cam-1", "cam-2"}
    births = [(device, birth(9, director_version=n, director_root=1)) for device, n in newest.items()]
    DatabaseTelemetry(engine).store(Batch(states=births, received_at=NOW))
    assert dict(server.order(engine, 1)) == {"cam-1": 5, "cam-2": 5}
    engine.dispose()


def test_a_backup_is_of_one_moment_while_others_write(server: Server, tmp_path: Path) -> None:
    engine = server.open()
    ending = threading.Event()
    telemetry = DatabaseTelemetry(engine)

    def write() -> None:
        number = 1000
        while not ending.is_set():
            number += 1
            telemetry.store(Batch(reports=[("cam-2", report(number))], received_at=NOW))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        snapshot.take(server.url, tmp_path / "copy.db")
    finally:
        ending.set()
        writer.join()
        engine.dispose()
    copy = open_database(f"sqlite:///{tmp_path / 'copy.db'}")
    rows = rows_of(copy, "report", "statistics", "presence")
    copy.dispose()
    stored = next(row[-1] for row in rows["presence"] if row[0] == "cam-2")
    assert len(rows["report"]) == len(rows["statistics"]) == 3 + int(str(stored))


def test_when_files_change_all_the_time_it_says_so_and_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module._write

    def disturbed(data: Path, *rest: object) -> Manifest:
        manifest = write(data, *rest)  # type: ignore[arg-type]  # passed on
        (data / "admin-password").write_text(f"changed {manifest.members[0].sha256} {id(manifest)}")
        return manifest

    monkeypatch.setattr(module, "_write", disturbed)
    with pytest.raises(BadBackup, match="changed each time"):
        make_backup(server.data, server.url, tmp_path / "backup.zip", now=NOW)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() and not path.name.endswith(".db")) == []


def test_neither_an_earlier_backup_nor_a_full_folder_is_overwritten(server: Server, tmp_path: Path) -> None:
    copy = tmp_path / "backup.zip"
    make_backup(server.data, server.url, copy, now=NOW)
    with pytest.raises(BadBackup, match="there already"):
        make_backup(server.data, server.url, copy, now=NOW)
    with pytest.raises(BadBackup, match=r"is not empty .*--force"):
        restore_backup(copy, server.data, server.url, force=False, now=NOW)
    restore_backup(copy, server.data, server.url, force=True, now=NOW)
    (aside,) = server.data.glob(".before-restore-*")
    assert (aside / "admin-password").read_text() == "secret\n"


def test_a_full_postgresql_is_refused_before_anything_is_touched(
    server: Server, databases: Databases, tmp_path: Path
) -> None:
    if databases.cluster is None:
        (tmp_path / "empty").mkdir()
        own, data = server.url, tmp_path / "empty"  # a SQLite file outside of the folder
        refused: type[Exception] = BadBackup
    else:
        own, data, refused = server.url, empty_server(databases, tmp_path / "second").data, snapshot.NotEmpty
    copy = tmp_path / "backup.zip"
    make_backup(server.data, server.url, copy, now=NOW)
    with pytest.raises(refused, match="not empty"):
        restore_backup(copy, data, own, force=False, now=NOW)
    assert list(data.iterdir()) == []
    refuse_unfinished(data)


# ---------------------------------------------------------------- damaged and hostile files
def rewritten(source: Path, target: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            changed = change(info.filename, old.read(info))
            if changed is not None:
                new.writestr(*changed)


def _renamed(to: str) -> Callable[[str, bytes], tuple[str, bytes]]:
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        if name == "manifest.json":
            return name, data.replace(b"data/admin-password", to.encode())
        return (to if name == "data/admin-password" else name), data

    return change


HOSTILE: dict[str, tuple[Callable[[str, bytes], tuple[str, bytes] | None], str]] = {
    "a flipped byte": (lambda n, d: (n, b"X" + d[1:] if n == "data/bundles/one-bundles" else d), "damaged"),
    "a member is missing": (lambda n, d: None if n == "data/admin-password" else (n, d), "not those of the manifest"),
    "a longer member": (lambda n, d: (n, d + b"!" if n == "data/admin-password" else d), "not those of the manifest"),
    "no manifest": (lambda n, d: None if n == "manifest.json" else (n, d), "not a backup of a fleet server"),
    "another format": (
        lambda n, d: (n, d.replace(b'"format": 1', b'"format": 7') if n == "manifest.json" else d),
        "has format 7",
    ),
    "a newer schema": (
        lambda n, d: (n, d.replace(b'"schema": "', b'"schema": "9') if n == "manifest.json" else d),
        "a newer edgewarden-server",
    ),
    "out of the folder": (_renamed("data/../../admin-password"), "does not belong"),
    "an absolute path": (_renamed("/etc/admin-password"), "does not belong"),
    "a hidden file": (_renamed("data/.before-restore"), "does not belong"),
    "not a ZIP": (lambda n, d: (n, d), "not a backup, or damaged"),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_damaged_or_hostile_is_refused_and_nothing_is_touched(
    tmp_path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], words: str
) -> None:
    data = tmp_path / "data"
    (data / "bundles").mkdir(parents=True)
    (data / "bundles" / "one-bundles").write_bytes(b"bundle")
    (data / "admin-password").write_text("secret\n")
    url = f"sqlite:///{data / 'edgewarden.db'}"
    open_database(url).dispose()
    good, bad, target = tmp_path / "good.zip", tmp_path / "bad.zip", tmp_path / "target"
    make_backup(data, url, good, now=NOW)
    rewritten(good, bad, change)
    if words.startswith("not a backup, or"):
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    target.mkdir()
    with pytest.raises(BadBackup, match=words):
        restore_backup(bad, target, f"sqlite:///{target / 'edgewarden.db'}", force=False, now=NOW)
    assert list(target.iterdir()) == []
    assert not (tmp_path / "admin-password").exists()


def test_whatever_bits_are_flipped_it_is_refused_in_words_or_is_whole(tmp_path: Path) -> None:
    """zipfile raises six kinds of errors over damaged files; not one may reach the operator as it is."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "admin-password").write_text("secret\n")
    url = f"sqlite:///{data / 'edgewarden.db'}"
    open_database(url).dispose()
    good, bad = tmp_path / "good.zip", tmp_path / "bad.zip"
    make_backup(data, url, good, now=NOW)
    whole, chance = _shrunk(good), random.Random(7)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        bad.write_bytes(damaged)
        try:
            _unpack(bad, tmp_path / "unpacked", room=10**9)
        except BadBackup:
            refused += 1
    assert refused > 1000


def _shrunk(good: Path) -> bytes:
    """Return a backup of its manifest and password alone, compressed by somebody: more of it can be damaged."""
    small = good.with_suffix(".small")
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        manifest = json.loads(old.read("manifest.json"))
        manifest["members"] = [one for one in manifest["members"] if one["name"] == "data/admin-password"]
        new.writestr("manifest.json", json.dumps(manifest))
        new.writestr("data/admin-password", old.read("data/admin-password"))
    return small.read_bytes()


def test_a_restore_that_was_cut_short_is_told_and_can_be_repeated(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "backup.zip"
    make_backup(server.data, server.url, copy, now=NOW)
    before = server.rows()

    def power_cut(*_: object) -> None:
        raise OSError("the power went")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_move_all", power_cut)
        with pytest.raises(OSError, match="the power went"):
            restore_backup(copy, server.data, server.url, force=True, now=NOW)
    with pytest.raises(BadBackup, match=r"cut short; run it again: .*--force"):
        refuse_unfinished(server.data)
    restore_backup(copy, server.data, server.url, force=True, now=NOW)
    refuse_unfinished(server.data)
    assert server.rows() == before
    assert (server.data / "bundles" / "one-bundles").exists()


def test_a_database_that_is_not_up_to_date_is_not_backed_up(server: Server, tmp_path: Path) -> None:
    engine = server.open()
    with dialect.writing(engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    engine.dispose()
    with pytest.raises(snapshot.WrongSchema, match="has schema 0001, and this program knows"):
        make_backup(server.data, server.url, tmp_path / "backup.zip", now=NOW)
