"""One file on its way from one source into its part file: resumed where it broke off, capped, hashed as it comes.

Whether the bytes are the right ones, and whom to ask next, is `download.py`'s.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from agent.adapters.allowance import Allowance
from agent.adapters.atomic_file import flush_folder
from agent.adapters.https import CHUNK, BrokenOff, HttpsServer, Response, raise_weather
from agent.core.downloading import Judgement, judge
from agent.ports import Weather
from protocol.states import RejectReason


class Unusable(Exception):
    """This source does not have it, or has something else. Asking it again cannot help."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        """Name the fault; ``detail`` is a sentence for people."""
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Cancelled(Weather):
    """Nobody wants it any more; what came is kept."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What is to come, from where, and at what pace."""

    server: HttpsServer
    path: str
    length: int
    allowance: Allowance
    cancelled: Callable[[], bool]
    progress: Callable[[int], None]
    patient: bool = True  # an answer that is trouble may pass; otherwise such a source is unusable

    def receive(self, part: Path) -> str:
        """Bring the part to its full length, from where it stands; return its SHA-256.

        Raises `Weather` (what came is kept), `Unusable` or OSError.
        """
        is_new = not part.exists()
        with part.open("a+b") as file:
            if is_new:
                flush_folder(part.parent)  # what is flushed of it later must have a name
            digest = hash_of(file)
            if file.tell() > self.length:
                file.truncate(0)
                digest = hashlib.sha256()
            if length_of(part) < self.length:
                digest = self._request(file, digest)
        return digest.hexdigest()

    def _request(self, file: IO[bytes], digest: "hashlib._Hash") -> "hashlib._Hash":
        offset = os.fstat(file.fileno()).st_size
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self.server.open(self.path, headers=headers) as response:
            judgement = judge(response.status)
            if judgement not in {Judgement.WHOLE, Judgement.PART}:
                self._raise_answer(response, judgement, file)
            if judgement is Judgement.WHOLE and offset:  # no ranges are done there: from the start again
                file.truncate(0)
                offset, digest = 0, hashlib.sha256()
            self._check_announced(response, offset, file)
            try:
                self._copy(response, file, offset, digest)
            except BrokenOff:
                _flush(file)  # what came so far is kept
                raise
            _flush(file)
        return digest

    def _copy(self, response: Response, file: IO[bytes], held: int, digest: "hashlib._Hash") -> None:
        for chunk in self.server.chunks(response, self.allowance.size):
            held += len(chunk)
            if held > self.length:
                raise Unusable(RejectReason.HASH_MISMATCH, "the server sends more bytes than were signed")
            file.write(chunk)
            digest.update(chunk)
            self.progress(held)
            if self.cancelled():
                raise Cancelled("the download was cancelled")
            if held < self.length:
                self.allowance.spend(len(chunk), lambda: not self.cancelled())
        if held < self.length:
            raise Weather(f"the server stopped {self.length - held} bytes before the end")

    def _raise_answer(self, response: Response, judgement: Judgement, file: IO[bytes]) -> NoReturn:
        if judgement is Judgement.RESTART:
            file.truncate(0)
        elif judgement is Judgement.ABSENT:
            raise Unusable(RejectReason.UNREACHABLE, f"the server has no such bundle (status {response.status})")
        elif judgement is Judgement.TROUBLE and not self.patient:
            raise Unusable(RejectReason.UNREACHABLE, f"the server answered with status {response.status}")
        raise_weather(response, "the bundle")

    def _check_announced(self, response: Response, offset: int, file: IO[bytes]) -> None:
        """Refuse, before reading, an answer that announces other bytes than were asked for."""
        if judge(response.status) is Judgement.PART and not _continues(response, offset, self.length):
            file.truncate(0)
            raise Weather(f"the server answered another range: {response.headers.get('Content-Range')!r}")
        announced = response.headers.get("Content-Length", "")
        if announced.isdecimal() and int(announced) > self.length - offset:
            detail = f"the server announces {announced} bytes, signed are {self.length}"
            raise Unusable(RejectReason.HASH_MISMATCH, detail)


def length_of(path: Path) -> int:
    """Return the size of a file; 0 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def hash_of(file: IO[bytes]) -> "hashlib._Hash":
    """Return the SHA-256 of all that a file holds; leaves the file at its end."""
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size
    file.seek(0)
    while left and (chunk := file.read(min(left, CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    return digest


def _continues(response: Response, offset: int, length: int) -> bool:
    return response.headers.get("Content-Range", "") == f"bytes {offset}-{length - 1}/{length}"


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
