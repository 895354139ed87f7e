"""Captured samples on disk: one encrypted file each, the key beside their folder, and the day's budget.

AES-256-GCM with a key of this device alone. A file holds two boxes, a small one that says what the sample is and a
large one with its tensors, each under a nonce of its own and bound to the sample's id and to its place: files cannot
be exchanged, and listing does not decrypt pictures. The time is in the id, so that expiry needs no key.

An expired sample's file is emptied, and stays for a while as a sign that there was one.
"""

import fcntl
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from agent.core.capturing import Day

KEY_FILE = "capture.key"
FOLDER = "captures"
DAY_FILE = ".day.json"
LOCK_FILE = ".lock"
SUFFIX = ".ewc"
MAGIC = b"EWC1"
KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
MAX_HEAD = 4096  # bytes, encrypted
MAX_BODY = 2**30
MAX_DAY = 1024 * 1024
OVERHEAD = 1024  # bytes that a file has beyond its tensors, at most in practice; the budget counts what is written
GONE_DAYS = 30  # how long an emptied file stays
_ID = re.compile(r"([0-9a-f]{13})-[0-9a-f]{16}")
_LENGTH = struct.Struct(">I")


class NoSuchSample(Exception):
    """There is no such sample."""


class Unreadable(Exception):
    """A sample cannot be decrypted: the key is another, or the file was changed."""


class KeyTrouble(Exception):
    """The key cannot be used; a person must look."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a sample is."""

    id: str
    at: int  # UTC ms
    request: str
    model: str
    version: int
    digest: str
    trigger: str
    label: int | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A request and what was answered."""

    head: Head
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class SampleFolder:
    """The samples below an agent's state folder."""

    def __init__(self, state: Path) -> None:
        """Make the folder and the key if they are not there; raise `KeyTrouble` or OSError."""
        self._folder = state / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._cipher = AESGCM(_key(state / KEY_FILE))
        for left in self._folder.glob(".*.tmp"):  # of a write that was cut off; one that is under way has a lock
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink(missing_ok=True)

    # ------------------------------------------------------------ samples
    def seal(self, sample: Sample) -> bytes:
        """Return a sample as its file holds it."""
        head = self._encrypt(msgspec.msgpack.encode(sample.head), sample.head.id, "head")
        body = msgspec.msgpack.encode(_Body(inputs=sample.inputs, outputs=sample.outputs))
        return b"".join((MAGIC, _LENGTH.pack(len(head)), head, self._encrypt(body, sample.head.id, "body")))

    def write(self, sample_id: str, data: bytes) -> None:
        """Write a sealed sample durably, whole or not at all; raise OSError."""
        _write(self._path(sample_id), data)

    def head(self, sample_id: str) -> tuple[Head, int]:
        """Return what a sample is, and its file's size; raise `NoSuchSample` or `Unreadable`."""
        with self._opened(sample_id) as descriptor:
            prefix = os.pread(descriptor, len(MAGIC) + _LENGTH.size + MAX_HEAD, 0)
            return self._head(sample_id, prefix)[0], os.fstat(descriptor).st_size

    def read(self, sample_id: str) -> Sample:
        """Return a sample; raise `NoSuchSample` or `Unreadable`."""
        with self._opened(sample_id) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            data = file.read(MAX_BODY)
        head, end = self._head(sample_id, data)
        body = msgspec.msgpack.decode(self._decrypt(data[end:], sample_id, "body"), type=_Body)
        return Sample(head=head, inputs=body.inputs, outputs=body.outputs)

    def ids(self, *, expired: bool = False) -> Iterator[tuple[str, int]]:
        """Return every sample's id and time; emptied ones only if asked for."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                sample_id = entry.name.removesuffix(SUFFIX)
                match = _ID.fullmatch(sample_id)
                if not match or not entry.name.endswith(SUFFIX):
                    continue
                with suppress(FileNotFoundError):
                    if expired or entry.stat().st_size:
                        yield sample_id, int(match[1], 16)

    def taken_at(self, sample_id: str) -> int:
        """Return when a sample was taken; raise `NoSuchSample`."""
        match = _ID.fullmatch(sample_id)
        if not match or not self._path(sample_id).exists():
            raise NoSuchSample(sample_id[:80])
        return int(match[1], 16)

    def is_expired(self, sample_id: str) -> bool:
        """Tell whether a sample was emptied."""
        try:
            return self._path(sample_id).stat().st_size == 0
        except FileNotFoundError:
            return True

    def expire(self, sample_id: str) -> None:
        """Empty a sample's file."""
        with suppress(FileNotFoundError):
            os.truncate(self._path(sample_id), 0)

    def bury(self) -> None:
        """Remove files that were emptied long ago."""
        for sample_id, _ in self.ids(expired=True):
            path = self._path(sample_id)
            with suppress(FileNotFoundError):
                found = path.stat()
                if found.st_size == 0 and time.time() - found.st_mtime > GONE_DAYS * 86400:
                    path.unlink()

    # ------------------------------------------------------------ the day's budget
    def day(self) -> Day:
        """Return what was kept on the last day that anything was."""
        try:
            with (self._folder / DAY_FILE).open("rb") as file:
                return msgspec.json.decode(file.read(MAX_DAY), type=Day)
        except FileNotFoundError:
            return Day()

    def keep_day(self, day: Day) -> None:
        """Write it durably; raise OSError."""
        _write(self._folder / DAY_FILE, msgspec.json.encode(day))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out."""
        descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # ------------------------------------------------------------ boxes
    def _encrypt(self, data: bytes, sample_id: str, part: str) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, _bound(sample_id, part))

    def _decrypt(self, box: bytes, sample_id: str, part: str) -> bytes:
        try:
            return self._cipher.decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], _bound(sample_id, part))
        except (InvalidTag, ValueError) as error:
            raise Unreadable(f"{sample_id} cannot be decrypted: the key is another, or it was changed") from error

    def _head(self, sample_id: str, data: bytes) -> tuple[Head, int]:
        """Return what a sample is, and where its head ends."""
        start = len(MAGIC) + _LENGTH.size
        if data[: len(MAGIC)] != MAGIC or len(data) < start:
            raise Unreadable(f"{sample_id} is not a sample")
        end = start + _LENGTH.unpack_from(data, len(MAGIC))[0]
        head = msgspec.msgpack.decode(self._decrypt(data[start:end], sample_id, "head"), type=Head)
        return head, end

    def _path(self, sample_id: str) -> Path:
        if not _ID.fullmatch(sample_id):
            raise NoSuchSample(sample_id[:80])
        return self._folder / f"{sample_id}{SUFFIX}"

    @contextmanager
    def _opened(self, sample_id: str) -> Iterator[int]:
        try:
            descriptor = os.open(self._path(sample_id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise NoSuchSample(sample_id) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)


_ABANDONED_SECONDS = 3600.0


def _bound(sample_id: str, part: str) -> bytes:
    return b"edgewarden capture 1\0" + f"{sample_id}\0{part}".encode()


def _key(path: Path) -> bytes:
    """Return the device's key, made at first use: two processes that start at once end up with the same."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        _create(temporary, secrets.token_bytes(KEY_BYTES))
        with suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
        _flush_folder(path.parent)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        key, mode = os.read(descriptor, KEY_BYTES + 1), os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    if len(key) != KEY_BYTES:
        raise KeyTrouble(f"{path} has {len(key)} bytes instead of {KEY_BYTES}; it is not a key of ours")
    if mode & 0o077:
        raise KeyTrouble(f"{path} may be read by others; run chmod 600 on it, and think about who may have it")
    return key


# ---------------------------------------------------------------- durable files
def _write(path: Path, data: bytes) -> None:
    """Replace a file; raise OSError, with the old content still there and nothing left beside it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _create(temporary, data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _create(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - pathlib cannot open a descriptor
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
