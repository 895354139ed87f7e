"""One file with everything that lasts: the database as it was at one moment, and the data folder.

A ZIP without compression: ``manifest.json`` says of every other member how long it is and what its SHA-256 is, and
nothing is unpacked that does not agree. Not in it: what the server makes anew (deltas, the broker's folder). Keys
are in it, so it is readable to its owner only; whoever has it has the server.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from fleet_server.adapters.database import snapshot
from fleet_server.adapters.database.opening import knows
from fleet_server.adapters.durable import flush_folder, make_private_folder, write_atomically

FORMAT = 1
MANIFEST, DATABASE, DATA = "manifest.json", "database.db", "data/"
MADE_ANEW = frozenset({"lock", "deltas", "broker"})
UNFINISHED = "restore-unfinished"
MAX_MANIFEST = 64 * 1024 * 1024  # bytes
# What zipfile raises over files that are damaged: zlib.error within a member, RuntimeError for a mark of encryption,
# NotImplementedError for unknown methods, ValueError and struct.error for cut headers.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, ValueError, struct.error)
_PLACES_THAT_ARE_NONE = (None, errno.EINVAL)  # it seeks before the file's beginning, or finds no stream there
MAX_FILES = 200_000
TRIES = 5
_COPY = 1 << 20  # bytes at a time


class BadBackup(Exception):
    """A backup cannot be made or used; the text says why. Nothing was changed."""


class Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in a backup."""

    name: str
    length: int
    sha256: str
    mode: int = 0o600


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says of itself."""

    format: int
    made_at: int  # UTC ms
    schema: str  # of the database
    members: tuple[Member, ...]


# ---------------------------------------------------------------- making
def make_backup(data: Path, database: str, path: Path, *, now: int) -> Manifest:
    """Write a backup of a data folder and its database; a server may run on it. Raises `BadBackup`, OSError."""
    if path.exists():
        raise BadBackup(f"{path} is there already; name another file")
    if not data.is_dir():
        raise BadBackup(f"there is no data folder {data}")
    if data in path.parents and not path.name.startswith("."):
        raise BadBackup(f"{path} would become part of the next backup; name a file outside of {data}")
    working = Path(f"{path}.{secrets.token_hex(4)}.partial")
    try:
        manifest = _write_until_still(data, database, working, now)
        os.link(working, path)  # fails when somebody else made it meanwhile
    except FileExistsError as error:
        raise BadBackup(f"{path} is there already; name another file") from error
    finally:
        working.unlink(missing_ok=True)
        Path(f"{working}.db").unlink(missing_ok=True)
    flush_folder(path.parent)
    return manifest


def _write_until_still(data: Path, database: str, working: Path, now: int) -> Manifest:
    """Files must be of one moment too: when some changed while they were read, read all of them again."""
    for _ in range(TRIES):
        before = _look(data, database)
        try:
            manifest = _write(data, database, working, list(before), now)
        except FileNotFoundError:
            continue  # removed meanwhile
        if _look(data, database) == before:
            return manifest
    raise BadBackup(f"{data} changed each time it was read; try again when nothing is published, or stop the server")


def _look(data: Path, database: str) -> dict[Path, tuple[int, int, int]]:
    """Return the files to keep, each with what changes when it does."""
    own = snapshot.sqlite_file(database)
    beside = {Path(f"{own}{end}") for end in ("", "-wal", "-shm", "-journal")} if own else set()
    found: dict[Path, tuple[int, int, int]] = {}
    for path in _files(data):
        if path not in beside:
            about = path.lstat()
            found[path] = (about.st_ino, about.st_size, about.st_mtime_ns)
    if len(found) > MAX_FILES:
        raise BadBackup(f"{data} holds more than {MAX_FILES} files")
    return found


def _files(data: Path) -> Iterator[Path]:
    """Return regular files; what begins with a dot is unfinished or put aside."""
    for folder, folders, names in os.walk(data):
        at_top = Path(folder) == data
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (at_top and name in MADE_ANEW)
        )
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and not (at_top and name in {*MADE_ANEW, UNFINISHED}) and _is_file(path):
                yield path


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _write(data: Path, database: str, working: Path, files: Sequence[Path], now: int) -> Manifest:
    """The database first: a server's start makes good that files are newer than it, and not the other way round."""
    copy = Path(f"{working}.db")
    copy.unlink(missing_ok=True)
    schema = snapshot.take(database, copy)
    handle = os.open(working, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
            members = [_add(archive, copy, DATABASE)]
            members += [_add(archive, path, DATA + path.relative_to(data).as_posix()) for path in files]
            manifest = Manifest(format=FORMAT, made_at=now, schema=schema, members=tuple(members))
            archive.writestr(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> Member:
    with path.open("rb") as file, archive.open(name, "w", force_zip64=True) as member:
        length, sha256 = _copy(file, member)
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    return Member(name=name, length=length, sha256=sha256, mode=mode)


def _copy(source: IO[bytes], target: IO[bytes], cap: int | None = None) -> tuple[int, str]:
    digest, length = hashlib.sha256(), 0
    while chunk := source.read(_COPY):
        length += len(chunk)
        if cap is not None and length > cap:
            raise BadBackup("a member is longer than the manifest says")
        digest.update(chunk)
        target.write(chunk)
    return length, digest.hexdigest()


# ---------------------------------------------------------------- putting back
def restore_backup(path: Path, data: Path, database: str, *, force: bool, now: int) -> Manifest:
    """Put a backup back; the caller holds the folder's lock. Raises `BadBackup`, `snapshot.NotEmpty`, OSError.

    All of it is unpacked and verified before anything is touched. What was there is put aside, not deleted. A restore
    that is cut short leaves a mark, and no server starts on the folder until a restore with ``--force`` is through.
    """
    _check_free(data, database, force=force)
    unpacked = make_private_folder(data / f".restore-{secrets.token_hex(4)}")
    try:
        manifest = _unpack(path, unpacked, room=shutil.disk_usage(data).free)
        write_atomically(data / UNFINISHED, f"{path}\n".encode())
        aside = make_private_folder(data / f".before-restore-{now}-{secrets.token_hex(2)}")
        _put_aside(data, database, aside)
        _put_database(unpacked / DATABASE, database)
        _move_all(unpacked / DATA, data)
        (data / UNFINISHED).unlink()
        flush_folder(data)
        _remove_if_empty(aside)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return manifest


def refuse_unfinished(data: Path) -> None:
    """Raise `BadBackup` when a restore of this folder was cut short."""
    if (data / UNFINISHED).exists():
        raise BadBackup(
            f"a restore of {data} was cut short; run it again: edgewarden-server restore FILE --data {data} --force"
        )


def _check_free(data: Path, database: str, *, force: bool) -> None:
    there = [path.name for path in _visible(data)]
    own = snapshot.sqlite_file(database)
    if own is not None and own.exists() and own.parent != data:
        there.append(str(own))
    if there and not force:
        raise BadBackup(f"{data} is not empty ({there[0]}); --force puts aside what is there")
    if own is None:
        snapshot.check_target(database, force=force)


def _unpack(path: Path, folder: Path, *, room: int) -> Manifest:
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _read_manifest(archive)
            _check_members(archive, manifest, room)
            for member in manifest.members:
                _unpack_member(archive, member, folder)
    except _UNREADABLE as error:
        raise BadBackup(f"{path} is not a backup, or damaged: {error}") from error
    except OSError as error:
        if error.errno not in _PLACES_THAT_ARE_NONE:  # a disk that is full, or gone, is another matter
            raise
        raise BadBackup(f"{path} is not a backup, or damaged: {error}") from error
    return manifest


def _read_manifest(archive: zipfile.ZipFile) -> Manifest:
    try:
        if archive.getinfo(MANIFEST).file_size > MAX_MANIFEST:
            raise BadBackup("the manifest is over its cap")
        with archive.open(MANIFEST) as file:
            manifest = msgspec.json.decode(file.read(MAX_MANIFEST), type=Manifest)
    except (KeyError, msgspec.DecodeError) as error:
        raise BadBackup(f"this is not a backup of a fleet server: {error}") from error
    if manifest.format != FORMAT:
        raise BadBackup(f"the backup has format {manifest.format}, and this program knows {FORMAT}")
    return manifest


def _check_members(archive: zipfile.ZipFile, manifest: Manifest, room: int) -> None:
    lengths = {info.filename: info.file_size for info in archive.infolist() if info.filename != MANIFEST}
    if lengths != {member.name: member.length for member in manifest.members} or len(lengths) > MAX_FILES:
        raise BadBackup("the members are not those of the manifest")
    if DATABASE not in lengths:
        raise BadBackup("there is no database in it")
    if not knows(manifest.schema):
        raise BadBackup(f"its database has schema {manifest.schema}: a newer edgewarden-server made it; use that one")
    for name in lengths:
        if name != DATABASE and not _is_inside(name):
            raise BadBackup(f"{name[:80]!r} does not belong into a data folder")
    if sum(lengths.values()) > room:
        raise BadBackup(f"{sum(lengths.values())} bytes are to be unpacked, and {room} are free: not enough")


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    clean = name == "/".join(parts) and "\x00" not in name and not {"..", "."} & set(parts)
    return clean and len(parts) > 1 and f"{parts[0]}/" == DATA and not parts[1].startswith(".")


def _unpack_member(archive: zipfile.ZipFile, member: Member, folder: Path) -> None:
    target = folder / member.name
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with archive.open(member.name) as source, os.fdopen(handle, "wb") as file:
        length, sha256 = _copy(source, file, member.length)
        if (length, sha256) != (member.length, member.sha256):
            raise BadBackup(f"{member.name} is damaged: its SHA-256 is not the manifest's")
        os.fchmod(file.fileno(), member.mode & 0o644)
        file.flush()
        os.fsync(file.fileno())


def _put_aside(data: Path, database: str, aside: Path) -> None:
    for path in _visible(data):
        path.rename(aside / path.name)
    own = snapshot.sqlite_file(database)
    for old in (Path(f"{own}{end}") for end in ("", "-wal", "-shm")) if own else ():
        if old.exists():
            old.rename(f"{old}.{aside.name[1:]}")


def _put_database(copy: Path, database: str) -> None:
    own = snapshot.sqlite_file(database)
    if own is None:
        snapshot.put_back(copy, database)
        return
    own.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(copy, own)  # it may be on another file system
    flush_folder(own.parent)


def _move_all(source: Path, data: Path) -> None:
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        path.rename(data / path.name)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _visible(data: Path) -> list[Path]:
    """Return what is in a data folder beside its lock, the mark of a restore, and what was put aside."""
    return sorted(
        path for path in data.iterdir() if path.name not in {"lock", UNFINISHED} and not path.name.startswith(".")
    )
