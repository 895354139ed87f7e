"""What happened to the models of this device: a file of JSON lines for people, halved when it is full.

It is told for looking back only: nothing is decided from it, so it is not flushed to the disk at each step, and a
line that a power cut left half is skipped.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.local_api import Step

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
            with self._path.open("ab") as file:
                file.write(msgspec.json.encode(step) + b"\n")
        except OSError as error:
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
            kept = self._path.with_suffix(".tmp")
            kept.write_bytes(b"\n".join(lines[len(lines) // 2 :]) + b"\n")
            kept.replace(self._path)
