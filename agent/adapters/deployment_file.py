"""The update machines' memory: one JSON file, replaced atomically and durably at each transition.

An unreadable file is moved aside and counts as empty: the store's pointer still says what to serve, and the fleet's
desired state says what to pursue, so nothing is lost but the history.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from agent.adapters.atomic_file import read_capped, write_atomically
from agent.core.deployment import Deployment

log = logging.getLogger(__name__)

MAX_FILE = 4 * 1024 * 1024  # bytes


class DeploymentFile:
    """Implements `agent.ports.Deployments` on one file."""

    def __init__(self, path: Path) -> None:
        """Nothing is read before `load`."""
        self._path = path
        self._records: dict[str, Deployment] = {}

    def load(self) -> Mapping[str, Deployment]:
        """Return the record of each model."""
        try:
            text = read_capped(self._path, MAX_FILE) or b"{}"
            self._records = msgspec.json.decode(text, type=dict[str, Deployment])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            aside = self._path.with_suffix(".unreadable")
            self._path.replace(aside)
            log.error("%s is unreadable and moved to %s: %s", self._path, aside.name, error)
            self._records = {}
        return dict(self._records)

    def save(self, record: Deployment) -> None:
        """Store a record durably before this returns."""
        self._records[record.model] = record
        write_atomically(self._path, msgspec.json.encode(self._records, order="sorted"))
