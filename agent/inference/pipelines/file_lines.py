"""Results as JSON lines in a file that is rotated by size."""

import os
from contextlib import suppress
from pathlib import Path

from agent.core.pipelines import FileSink
from agent.inference.pipelines.flow import SinkFailed

MODE = 0o640


class FileDelivery:
    """Implements `flow.Sink` with a file. Only whole lines stay in it."""

    def __init__(self, settings: FileSink) -> None:
        """Open with the first result."""
        self._path = Path(settings.path)
        self._max_bytes = settings.max_bytes
        self._keep = settings.keep
        self._descriptor: int | None = None

    def deliver(self, record: bytes) -> None:
        """Append a line; raise `SinkFailed` with the file as it was."""
        try:
            self._append(record + b"\n")
        except OSError as error:
            self.close()
            raise SinkFailed(f"{self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _append(self, line: bytes) -> None:
        descriptor = self._open()
        length = os.fstat(descriptor).st_size
        if length and length + len(line) > self._max_bytes:
            self.close()
            self._rotate()
            descriptor, length = self._open(), 0
        try:
            _write(descriptor, line)
        except OSError:
            with suppress(OSError):  # not every file can be cut
                os.ftruncate(descriptor, length)
            raise

    def _open(self) -> int:
        """Return the file; one that was moved away by somebody else is left to them."""
        if self._descriptor is not None and not self._is_there(self._descriptor):
            self.close()
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block
            self._descriptor = os.open(self._path, flags, MODE)
        return self._descriptor

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        """Make room: the file becomes .1, .1 becomes .2, and the last is gone."""
        if self._keep == 0:
            self._path.unlink()
            return
        for number in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                self._numbered(number).replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _write(descriptor: int, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[os.write(descriptor, view) :]
