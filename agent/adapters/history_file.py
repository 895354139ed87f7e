"""What happened to the models of this device: a file of JSON lines for people, halved when it is full.

It is told for looking back only: nothing is decided from it, so it is not flushed to the disk at each step, and a
line that a power cut left half is skipped.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from agent.adapters.atomic_file import write_atomically
from agent.local_api import Step
from agent.ports import Trouble

log = logging.getLogger(__name__)

MAX_FILE = 256 * 1024  # bytes; about 1500 steps


class HistoryFile:
    """Appends and reads. A disk that refuses costs the history, never the update."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first step."""
        self._path = path

    def add(self, step: Step) -> None:
        """Append a step."""
        try:
            self._make_room()
            with self._path.open("a+b") as file:
                begun = b"" if _ends_with_a_line(file) else b"\n"  # else the half line would swallow this one
                file.write(begun + msgspec.json.encode(step) + b"\n")
        except (OSError, Trouble) as error:
            log.warning("the history misses a step: %s", error)

    def newest(self, limit: int, model: str = "") -> tuple[Step, ...]:
        """Return the newest steps, newest first; of one model if named."""
        steps = [step for step in self._read() if model in ("", step.model)]
        return tuple(reversed(steps[-limit:])) if limit > 0 else ()

    def _read(self) -> Iterator[Step]:
        for line in self._lines():
            try:
                yield msgspec.json.decode(line, type=Step)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue

    def _lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                return file.read(2 * MAX_FILE).splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            log.warning("the history cannot be read: %s", error)
            return []

    def _make_room(self) -> None:
        if self._path.exists() and self._path.stat().st_size > MAX_FILE:
            lines = self._lines()
            write_atomically(self._path, b"\n".join(lines[len(lines) // 2 :]) + b"\n")


def _ends_with_a_line(file: IO[bytes]) -> bool:
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
