"""Which commands were accepted and what became of them: one small file, replaced in one step.

When it is damaged the ledger begins anew, and says so: then only their expiry keeps old commands out.
"""

import hashlib
import logging
from pathlib import Path

import msgspec

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.core.commands import Ledger
from agent.ports import Trouble

log = logging.getLogger(__name__)

_MAX_FILE = 256 * 1024  # bytes; 32 outcomes with their sentences are far below


class CommandFile:
    """`agent.ports.CommandMemory`."""

    def __init__(self, path: Path) -> None:
        """Read nothing before `load`."""
        self._path = path
        self.lost = ""  # a sentence, when there was a ledger and it can no longer be read

    def load(self) -> Ledger:
        try:
            data = read_capped(self._path, _MAX_FILE)
            return _opened(data) if data is not None else Ledger()
        except (Trouble, ValueError) as error:
            self.lost = f"{self._path} is damaged: {error}"
            log.error("%s", self.lost)
            return Ledger()

    def save(self, ledger: Ledger) -> None:
        body = msgspec.json.encode(ledger)
        write_atomically(self._path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _opened(data: bytes) -> Ledger:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its checksum is wrong")
    return msgspec.json.decode(body, type=Ledger)
