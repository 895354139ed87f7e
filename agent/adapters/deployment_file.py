"""The update machines' memory: one JSON file, replaced atomically and durably at each transition.

An unreadable file is moved aside and counts as empty: the store's pointer still says what to serve, and the fleet's
desired state says what to pursue, so nothing is lost but the history. `DeploymentFile.lost` then says so.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.core.deployment import Deployment
from agent.ports import Trouble

log = logging.getLogger(__name__)

MAX_FILE = 4 * 1024 * 1024  # bytes


class DeploymentFile:
    """Implements `agent.ports.Deployments` on one file."""

    def __init__(self, path: Path) -> None:
        """Nothing is read before `load`."""
        self._path = path
        self._records: dict[str, Deployment] = {}
        self.lost = ""  # a sentence, when there was a file and it could not be read

    def load(self) -> Mapping[str, Deployment]:
        """Return the record of each model."""
        try:
            text = read_capped(self._path, MAX_FILE)
            self._records = {} if text is None else msgspec.json.decode(text, type=dict[str, Deployment])
        except (msgspec.DecodeError, UnicodeDecodeError, Trouble) as error:
            self.lost = f"{self._path} is unreadable: {error}; {_move_aside(self._path)}"
            log.error("%s", self.lost)
            self._records = {}
        return dict(self._records)

    def save(self, record: Deployment) -> None:
        """Store a record durably before this returns."""
        records = {**self._records, record.model: record}
        write_atomically(self._path, msgspec.json.encode(records, order="sorted"))
        self._records = records  # what the disk refused is not remembered either


def _move_aside(path: Path) -> str:
    """Keep an unreadable file for people to look at, where the disk lets us; return what became of it."""
    aside = path.with_suffix(".unreadable")
    try:
        path.replace(aside)
    except OSError as error:
        return f"it stays where it is, for {error}"
    return f"it is kept as {aside.name}"
