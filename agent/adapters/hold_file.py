"""Until when an application wants no update: one small file, so that a restart of the agent does not end a hold."""

import logging
from pathlib import Path

from agent.adapters.atomic_file import read_capped, remove_durably, write_atomically
from agent.ports import Trouble

log = logging.getLogger(__name__)

_MAX_FILE = 64  # bytes


class HoldFile:
    """The hold. Reading never fails: a file that says nothing holds nothing."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier run left."""
        self._path = path
        self._until = self._read()

    def until(self) -> int:
        """Return the end of the hold (UTC ms); 0 when nothing holds."""
        return self._until

    def set(self, until: int) -> None:
        """Hold until then (UTC ms); 0 ends a hold. Raises `Trouble` when the disk refuses."""
        if until:
            write_atomically(self._path, str(until).encode())
        else:
            remove_durably(self._path)
        self._until = until

    def _read(self) -> int:
        try:
            return int(read_capped(self._path, _MAX_FILE) or b"0")
        except (ValueError, Trouble) as error:
            log.warning("%s says nothing and holds nothing: %s", self._path, error)
            return 0
