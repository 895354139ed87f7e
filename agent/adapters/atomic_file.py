"""Files that are either the old or the new one, never half of either, and reads that stop at a cap.

Writes go to a temporary file in the same folder, are flushed to the disk, and take the name in one step; the folder
is flushed too, since the name lives there. What is in the files is the callers' business.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from agent.ports import Trouble

PRIVATE = 0o600
TRIAL_BYTES = 16 * 1024  # what a step of an update writes, and more
_REMEDY = "Check that the disk is neither full nor read-only"


def write_atomically(path: Path, data: bytes, *, mode: int = PRIVATE) -> None:
    """Replace a file's content durably; raise `Trouble` when the disk refuses. The old content then still stands."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write_durably(temporary, data, mode)
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Trouble(f"cannot write {path}: {error}", remedy=_REMEDY) from error


def remove_durably(path: Path) -> None:
    """Remove a file if it is there, so that it stays gone after a power cut; raise `Trouble`."""
    try:
        path.unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise Trouble(f"cannot remove {path}: {error}", remedy=_REMEDY) from error


def try_writing(folder: Path) -> None:
    """Write something that nobody needs; raise `Trouble` when the disk refuses."""
    file = folder / ".trial"
    write_atomically(file, bytes(TRIAL_BYTES))
    remove_durably(file)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes left that a kill or a power cut ended; for when nobody else writes in a folder."""
    for leftover in folder.glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def read_capped(path: Path, cap: int) -> bytes | None:
    """Return the content, or None when there is no file; raise `Trouble` when over the cap or unreadable."""
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Trouble(f"cannot read {path}: {error}", remedy="Check the owner and mode of the file") from error
    if len(data) > cap:
        raise Trouble(
            f"{path} is larger than the {cap} bytes allowed", remedy="It is not a file of ours: move it away"
        )
    return data


def flush_file(path: Path) -> None:
    """Make a file's content durable; raise OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Make new and changed names of a folder durable; raise OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - pathlib cannot open a descriptor
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
