"""Files that appear in a folder, as frames.

The kernel tells of new files (inotify), which makes them seen at once and known to be whole; looking every so often
is the net below, and all there is where the kernel offers no more watches. A file that nobody announced counts as
whole when it did not change between two looks. What is done with a file afterwards is set by the owner; under
``move`` it waits for its answer in ``failed/``, so that one that brings the process down is not taken up again.
"""

import ctypes
import errno
import fnmatch
import os
import select
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent.core.pipelines import DirectorySource
from agent.inference.pipelines.flow import BadFrame, Feed, Frame, Outcome, SourceFailed

MAX_FILES = 10_000  # looked at in one go; the rest has its turn when these are done
DONE, FAILED = "done", "failed"
_UNFINISHED = (".tmp", ".part")
_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_DELETE_SELF, _IN_MOVE_SELF, _IN_IGNORED = 0x8, 0x80, 0x400, 0x800, 0x8000
_WATCHED = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_DELETE_SELF | _IN_MOVE_SELF
_EVENT = struct.Struct("iIII")
_EVENTS_AT_ONCE = 64 * 1024  # bytes


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a file was like when it was looked at."""

    size: int
    mtime_ns: int
    inode: int


class DirectoryFrames:
    """Implements `flow.Source` for a folder."""

    def __init__(self, settings: DirectorySource, cap: int, *, watch: bool = True) -> None:
        """``cap``: bytes of the largest file that is read."""
        self._settings = settings
        self._folder = Path(settings.path)
        self._cap = cap
        self._watch = watch
        self._seen: dict[str, _Look] = {}  # at the last look
        self._under_way: dict[str, _Look] = {}  # handed over; under ``keep`` also those that are done

    def run(self, feed: Feed) -> None:
        """Hand over files until told to stop; raise `SourceFailed` when the folder is not there."""
        self._seen = {}
        watch = _watch(self._folder) if self._watch else None
        try:
            announced: set[str] = set()
            while not feed.stop.is_set():
                found = self._look()
                feed.up()
                for name in self._whole(found, announced):
                    if not self._hand_over(feed, name, found[name]):
                        return
                self._seen = found
                announced = _wait(watch, self._settings.poll_seconds, feed)
        finally:
            if watch is not None:
                os.close(watch)

    def _look(self) -> dict[str, _Look]:
        """Return the files of the folder, oldest first."""
        found: list[tuple[int, str, _Look]] = []
        try:
            with os.scandir(self._folder) as entries:
                for entry in entries:
                    if len(found) < MAX_FILES and self._counts(entry):
                        look = _looked(entry)
                        found += [(look.mtime_ns, entry.name, look)] if look else []
        except OSError as error:
            raise SourceFailed(f"{self._folder}: {error.strerror}") from error
        names = {name: look for _, name, look in sorted(found, key=lambda one: one[:2])}
        self._under_way = {name: look for name, look in self._under_way.items() if name in names}
        return names

    def _counts(self, entry: "os.DirEntry[str]") -> bool:
        name = entry.name
        if (
            name.startswith(".")
            or name.endswith(_UNFINISHED)
            or not fnmatch.fnmatchcase(name, self._settings.pattern)
        ):
            return False
        return entry.is_file(follow_symlinks=False)

    def _whole(self, found: dict[str, _Look], announced: set[str]) -> Iterator[str]:
        for name, look in found.items():
            if self._under_way.get(name) == look:
                continue
            if name in announced or self._seen.get(name) == look:
                yield name

    def _hand_over(self, feed: Feed, name: str, look: _Look) -> bool:
        self._under_way[name] = look
        frame = Frame(name=name, read=partial(self._read, name), settle=partial(self._settle, name))
        return feed.put(frame)

    def _read(self, name: str) -> bytes:
        try:
            data = read_file(self._folder / name, self._cap)
            if self._settings.after == "move":
                self._put(name, FAILED)
        except OSError as error:
            raise BadFrame(f"{name}: {error.strerror}") from error
        return data

    def _settle(self, name: str, outcome: Outcome) -> None:
        path = self._folder / name
        with suppress(FileNotFoundError):  # somebody else was quicker, or the folder is gone
            if self._settings.after == "delete":
                path.unlink()
            elif self._settings.after == "move":
                if path.exists():  # never read, or not readable
                    self._put(name, FAILED)
                if outcome is not Outcome.BAD:
                    (self._folder / DONE).mkdir(exist_ok=True)
                    (self._folder / FAILED / name).replace(self._folder / DONE / name)

    def _put(self, name: str, where: str) -> None:
        (self._folder / where).mkdir(exist_ok=True)
        (self._folder / name).replace(self._folder / where / name)


def read_file(path: Path, cap: int) -> bytes:
    """Return a regular file's bytes; raise OSError, or `BadFrame` when it is over the cap or no regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
    with open(descriptor, "rb") as file:  # noqa: PTH123 - pathlib cannot open a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadFrame(f"{path.name} is not a regular file")
        data = file.read(cap + 1)
    if len(data) > cap:
        raise BadFrame(f"{path.name} is larger than the {cap} bytes of max_frame")
    return data


def _looked(entry: "os.DirEntry[str]") -> _Look | None:
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return _Look(size=found.st_size, mtime_ns=found.st_mtime_ns, inode=found.st_ino)


# ---------------------------------------------------------------- inotify
def _watch(folder: Path) -> int | None:
    """Return a descriptor that tells of new files, or None when the kernel has none to give."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        return None
    descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor < 0:
        return None
    if libc.inotify_add_watch(descriptor, os.fsencode(folder), _WATCHED) < 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        if number in {errno.ENOSPC, errno.ENOMEM}:
            return None  # out of watches: looking every so often remains
        raise SourceFailed(f"{folder}: {os.strerror(number)}")
    return descriptor


def _wait(watch: int | None, seconds: float, feed: Feed) -> set[str]:
    """Wait for news or the next look; return the files that were announced as whole."""
    if watch is None:
        feed.stop.wait(seconds)
        return set()
    waited, step = 0.0, 0.25  # so that a stop is seen
    while waited < seconds and not feed.stop.is_set():
        if select.select([watch], [], [], min(step, seconds - waited))[0]:
            return _announced(os.read(watch, _EVENTS_AT_ONCE))
        waited += step
    return set()


def _announced(events: bytes) -> set[str]:
    names, at = set(), 0
    while at + _EVENT.size <= len(events):
        _, mask, _, length = _EVENT.unpack_from(events, at)
        at += _EVENT.size
        if mask & (_IN_DELETE_SELF | _IN_MOVE_SELF | _IN_IGNORED):
            raise SourceFailed("the folder was removed")
        names.add(os.fsdecode(events[at : at + length].rstrip(b"\0")))
        at += length
    return names
