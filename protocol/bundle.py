"""Reads and writes ``.ewb`` bundles on a given file object.

A bundle is a ZIP whose members are *stored* (never compressed), sorted, with fixed times, so that the same content
is always the same bytes. ``manifest.json`` comes first and lists every other member's SHA-256. Whether a bundle may
be trusted is decided before it gets here, by its signed length and hash; this module makes sure that reading one,
trusted or not, stays inside its caps.
"""

import hashlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Protocol

from protocol.manifest import MANIFEST_NAME, BadManifest, Manifest, decode_manifest, encode_manifest
from protocol.names import MAX_BUNDLE, MAX_MANIFEST, MAX_MEMBERS, MEMBER_NAME

CHUNK = 1024 * 1024  # bytes read at a time
# What zipfile raises over containers that were made to break it: ValueError for negative places, struct.error for
# cut headers, RuntimeError for encryption, NotImplementedError for unknown methods.
_UNREADABLE = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, ValueError, struct.error)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time ZIP can say


class BadBundle(ValueError):
    """The container is not a bundle, breaks a cap, or a member is not what the manifest says."""


class OpenMember(Protocol):
    """Opens a member for writing, by its checked name."""

    def __call__(self, name: str) -> IO[bytes]:
        """Return a binary file object; the caller closes it."""


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def digest_of_stream(stream: IO[bytes]) -> str:
    """Return the SHA-256 of what is left of a stream, hex."""
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def write_bundle(target: IO[bytes], manifest: Manifest, members: Mapping[str, bytes]) -> None:
    """Write a bundle; raise `BadBundle` when the members are not those of the manifest."""
    if set(members) != set(manifest.members):
        raise BadBundle(f"members {sorted(members)} are not those of the manifest {sorted(manifest.members)}")
    for name, data in members.items():
        if digest_of(data) != manifest.members[name]:
            raise BadBundle(f"{name}: the bytes are not those the manifest lists")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        _store(archive, MANIFEST_NAME, encode_manifest(manifest))
        for name in sorted(members):
            _store(archive, name, members[name])


def read_manifest(source: IO[bytes]) -> Manifest:
    """Return the manifest of a bundle; raise `BadBundle`."""
    with _open(source) as archive:
        return _read_manifest(archive)


def unpack(source: IO[bytes], open_member: OpenMember) -> Manifest:
    """Write every member through ``open_member`` (the manifest too), hashing on the way; raise `BadBundle`.

    On an error, what was written so far is of no use and must be thrown away by the caller.
    """
    with _open(source) as archive:
        manifest = _read_manifest(archive)
        expected = {MANIFEST_NAME, *manifest.members}
        present = set(archive.namelist())
        if present != expected:
            raise BadBundle(f"members {sorted(present)} are not those of the manifest {sorted(expected)}")
        for name in sorted(expected):
            digest = _copy(archive, name, open_member)
            if name != MANIFEST_NAME and digest != manifest.members[name]:
                raise BadBundle(f"{name}: SHA-256 is {digest}, the manifest says {manifest.members[name]}")
        return manifest


def _copy(archive: zipfile.ZipFile, name: str, open_member: OpenMember) -> str:
    digest = hashlib.sha256()
    left = archive.getinfo(name).file_size
    with archive.open(name) as member, open_member(name) as target:
        while chunk := member.read(min(CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise BadBundle(f"{name}: longer than the directory of the container says")
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


@contextmanager
def _open(source: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(source) as archive:
            _check_container(archive)
            yield archive
    except BadBundle:
        raise
    except _UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the bundle's
        raise BadBundle(f"not a readable bundle: {error}") from error


def _check_container(archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS + 1:
        raise BadBundle(f"{len(members)} members are over the cap of {MAX_MEMBERS + 1}")
    if len({member.filename for member in members}) != len(members):
        raise BadBundle("a member stands twice in the container")
    for member in members:
        if not MEMBER_NAME.fullmatch(member.filename):
            raise BadBundle(f"member name {member.filename[:80]!r} is not legal")
        if member.header_offset < 0:
            raise BadBundle(f"{member.filename}: stands before the beginning of the container")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 0x1:
            raise BadBundle(f"{member.filename}: members must be stored, neither compressed nor encrypted")
    if sum(member.file_size for member in members) > MAX_BUNDLE:
        raise BadBundle(f"the members are larger than the cap of {MAX_BUNDLE} bytes")


def _read_manifest(archive: zipfile.ZipFile) -> Manifest:
    try:
        info = archive.getinfo(MANIFEST_NAME)
    except KeyError as error:
        raise BadBundle(f"{MANIFEST_NAME} is missing") from error
    if info.file_size > MAX_MANIFEST:
        raise BadBundle(f"{MANIFEST_NAME}: {info.file_size} bytes are over the cap of {MAX_MANIFEST}")
    try:
        with archive.open(info) as member:
            return decode_manifest(member.read(MAX_MANIFEST + 1))
    except BadManifest as error:
        raise BadBundle(f"{MANIFEST_NAME}: {error}") from error


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.external_attr = 0o644 << 16
    archive.writestr(member, data)
