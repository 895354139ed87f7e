"""Bundles on disk by digest: ``<sha256>.ewb``, written beside, flushed and moved into place once the hash is right.

Knows bytes only. Whether a bundle is one, and may run, is looked at by `fleet_server.publishing`.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fleet_server.adapters.durable import PUBLIC, flush_folder
from fleet_server.publishing import Refused
from protocol.names import SHA256_HEX, IllegalName, check_name

_PARTIAL = ".incoming-"


class ArtifactFolder:
    """`ports.Artifacts` on a folder."""

    def __init__(self, folder: Path) -> None:
        """Make the folder, and remove what an upload that was cut short left in it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for leftover in folder.glob(f"{_PARTIAL}*"):
            leftover.unlink(missing_ok=True)

    def add(self, stream: Iterator[bytes], sha256: str, *, cap: int) -> int:
        target = self._path(sha256)
        if target is None:
            raise Refused(f"{sha256[:80]!r} is not a SHA-256 in hex")
        handle, name = tempfile.mkstemp(dir=self._folder, prefix=_PARTIAL)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                length = _copy(stream, file, sha256, cap)
                file.flush()
                os.fchmod(file.fileno(), PUBLIC)
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(self._folder)
        return length

    def open(self, sha256: str) -> IO[bytes]:
        path = self._path(sha256)
        try:
            if path is not None:
                return path.open("rb")
        except FileNotFoundError:
            pass
        raise KeyError(sha256)

    def length(self, sha256: str) -> int | None:
        path = self._path(sha256)
        try:
            return path.stat().st_size if path is not None else None
        except FileNotFoundError:
            return None

    def _path(self, sha256: str) -> Path | None:
        try:
            return self._folder / f"{check_name('sha256', sha256, SHA256_HEX)}.ewb"
        except IllegalName:
            return None


def _copy(stream: Iterator[bytes], file: IO[bytes], sha256: str, cap: int) -> int:
    digest, length = hashlib.sha256(), 0
    for chunk in stream:
        length += len(chunk)
        if length > cap:
            raise Refused(f"the upload is over the cap of {cap} bytes")
        digest.update(chunk)
        file.write(chunk)
    if digest.hexdigest() != sha256:
        raise Refused(f"the bytes that came have SHA-256 {digest.hexdigest()}, not {sha256}")
    return length
