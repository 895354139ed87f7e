"""The number of this installation's next connection to the broker: grows for ever, over restarts and power cuts.

The fleet server ignores a will or farewell of an older connection by it. Without a readable number it starts from the
clock, which is higher than any number counted one by one. A disk that refuses the number does not keep the device off
the fleet: it counts on in memory, and the number may come again after a restart, which the server tells by the boot.
"""

import logging
import time
from pathlib import Path

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.ports import Trouble

log = logging.getLogger(__name__)

MAX_FILE = 64  # bytes


class ConnectionCounter:
    """A durable counter in one file."""

    def __init__(self, path: Path) -> None:
        """Nothing is read before the first connection."""
        self._path = path
        self._last = 0

    def next(self) -> int:
        """Return a number that is higher than any before, durably so where the disk allows it."""
        number = max(self._last, self._stored()) + 1
        self._last = number
        try:
            write_atomically(self._path, b"%d\n" % number)
        except Trouble as trouble:
            log.error("connection %d is counted in memory only: %s", number, trouble)
        return number

    def _stored(self) -> int:
        try:
            return max(0, int(read_capped(self._path, MAX_FILE) or b""))
        except (ValueError, Trouble):
            start = self._last or int(time.time())
            log.warning("%s tells no number; connections are counted on from %d", self._path, start)
            return start
