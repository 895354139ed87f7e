"""Which file stands behind each delegate of the settings: one that was replaced has to be measured anew."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.core.delegates import Delegate


def marks(delegates: Sequence[Delegate]) -> dict[str, str]:
    """Return for each delegate's name a mark that changes with its library's file and its options."""
    return {delegate.name: _mark(delegate) for delegate in delegates}


def _mark(delegate: Delegate) -> str:
    known = (delegate.library, sorted(delegate.options.items()), _file(Path(delegate.library)))
    return hashlib.sha256(msgspec.json.encode(known)).hexdigest()[:16]


def _file(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from the one that comes in its place; None for a name that only the linker finds."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
