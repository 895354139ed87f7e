"""A folder for throw-away copies, in memory where the machine has such a place, for as long as this process lives.

A process that is killed cannot remove its folder, and in memory nobody else would: each start removes the folders
that no living process holds a lock on. What is put in there is the callers' business.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

IN_MEMORY = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of our own in it
_PREFIX = "edgewarden-agent-"
_OLD_SECONDS = 60.0  # a younger folder may belong to an agent that is just starting and has no lock yet


class Scratch:
    """One folder of this process."""

    def __init__(self, place: Path | None = None) -> None:
        """Make it in ``place``, unless said in memory; remove what killed processes left there."""
        parent = place or (IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        _remove_abandoned(parent)

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
                log.info("removed %s of a process that was killed", folder)
        except OSError:  # a living process holds it, or it is somebody else's
            continue


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an abandoned folder's lock; raise OSError when it is not abandoned, or not ours."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _OLD_SECONDS:
            raise PermissionError(f"{folder} may be in use")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
