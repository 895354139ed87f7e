"""The number of this installation's next connection to the broker: grows for ever, over restarts and power cuts.

The fleet server ignores a will or farewell of an older connection by it. An unreadable file starts from the clock,
which is higher than any number counted one by one.
"""

import logging
import time
from pathlib import Path

from agent.adapters.atomic_file import read_capped, write_atomically

log = logging.getLogger(__name__)

MAX_FILE = 64  # bytes


class ConnectionCounter:
    """A durable counter in one file."""

    def __init__(self, path: Path) -> None:
        """Nothing is read before the first connection."""
        self._path = path

    def next(self) -> int:
        """Return a number that is durably higher than any before; raise `Trouble` when the disk refuses."""
        text = read_capped(self._path, MAX_FILE) or b"0"
        try:
            last = int(text)
        except ValueError:
            last = int(time.time())
            log.error("%s is unreadable; connections are counted on from %d", self._path, last)
        write_atomically(self._path, b"%d\n" % (last + 1))
        return last + 1
