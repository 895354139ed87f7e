"""Files that survive a power cut: written beside, flushed, then moved into place, so that a reader sees old or new.

Knows nothing of what is in them.
"""

import os
import tempfile
from pathlib import Path

PUBLIC = 0o644
SECRET = 0o600


def write_atomically(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Replace a file in one durable step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_private_folder(folder: Path) -> Path:
    """Return the folder, made if need be, open to its owner only."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def read_capped(path: Path, cap: int) -> bytes | None:
    """Return a file's bytes, or None when there is none; raise ValueError when it is over the cap."""
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except FileNotFoundError:
        return None
    if len(data) > cap:
        raise ValueError(f"{path} is over the cap of {cap} bytes")
    return data
