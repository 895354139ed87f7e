"""One server per data folder: a lock that ends with the process that holds it, however it ends."""

import fcntl
import os
from pathlib import Path


class DataInUse(Exception):
    """Another server runs on this data folder."""


class DataLock:
    """Holds the folder's lock file (flock) until `release`."""

    def __init__(self, folder: Path) -> None:
        """Take the lock; raise `DataInUse`."""
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise DataInUse(
                f"another edgewarden-server runs on {folder}; stop it first, or give another --data"
            ) from error
        self._descriptor = descriptor

    def release(self) -> None:
        """Let another server have the folder."""
        os.close(self._descriptor)
