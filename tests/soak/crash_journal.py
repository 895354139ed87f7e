"""Records what a program does to one folder, and builds what a kill or a power cut would leave of it at any moment.

Nothing of the program is replaced. Before every operation that Python announces (its audit events), around every
fsync and after every SQLite statement the folder is looked at; what has changed since the last look becomes
operations: names made, moved and removed, bytes written. From the operations up to a moment comes a disk:

- ``kill``: the process ends. All that reached the kernel stays.
- ``torn``: the same, in the middle of the write that came last.
- ``power``: only what was flushed stays: a file's bytes by its own fsync, a name by its folder's.
- ``journal``: power goes on a file system that keeps names and lengths in order but not contents: bytes that were
  not flushed are zeros.

Knows nothing of agents. SQLite's flushes are not seen but known: with ``synchronous=FULL`` its log is flushed with
each commit, and the log before the database.
"""

import hashlib
import os
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KILL, TORN, POWER, JOURNAL = MODES = ("kill", "torn", "power", "journal")
_LOG = "-wal"  # SQLite's name for it
ROOT = 0  # the folder itself, as a node
FOLDER = None  # a folder's content in an image
TORN_AT_LEAST = 2  # bytes; one byte cannot be half

Image = Mapping[str, bytes | None]
"""A folder's content: {relative path: bytes, or `FOLDER`}."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One step. ``node`` is the file or folder it concerns, ``parent`` and ``name`` the name that changes."""

    kind: str  # mkdir create name rename unname write truncate fsync mark
    node: int = -1
    parent: int = -1
    name: str = ""
    offset: int = 0
    data: bytes = b""
    said: tuple[Any, ...] = ()  # of a mark: what the world outside has seen


@dataclass
class Disk:
    """Nodes and names as they are, and as they would be after a power cut."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, bytearray] = field(default_factory=dict)
    flushed_folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    flushed_files: dict[int, bytes] = field(default_factory=dict)

    def apply(self, op: Op, *, share: float = 1.0) -> None:  # noqa: C901 - one line for each kind of operation
        """Do a step; ``share`` of the bytes of a write."""
        match op.kind:
            case "mkdir":
                self.folders[op.node] = {}
                self.folders[op.parent][op.name] = op.node
            case "create":
                self.files[op.node] = bytearray()
                self.folders[op.parent][op.name] = op.node
            case "name":
                self.folders[op.parent][op.name] = op.node
            case "rename":
                for folder in self.folders.values():
                    for name in [name for name, node in folder.items() if node == op.node]:
                        del folder[name]
                self.folders[op.parent][op.name] = op.node
            case "unname":
                if self.folders[op.parent].get(op.name) == op.node:
                    del self.folders[op.parent][op.name]
            case "write":
                data = op.data[: int(len(op.data) * share)]
                self.files[op.node][op.offset : op.offset + len(data)] = data
            case "truncate":
                del self.files[op.node][op.offset :]
            case "fsync":
                self._flush(op.node)

    def flush_all(self) -> None:
        """Count everything as flushed."""
        for node in (*self.folders, *self.files):
            self._flush(node)

    def image(self, mode: str) -> Image:
        """Return what would be found after a restart."""
        if mode == POWER:
            return self._image(self.flushed_folders, lambda node: self.flushed_files.get(node, b""))
        if mode == JOURNAL:
            return self._image(self.folders, self._with_holes)
        return self._image(self.folders, lambda node: bytes(self.files[node]))

    def _flush(self, node: int) -> None:
        if node in self.folders:
            self.flushed_folders[node] = dict(self.folders[node])
        elif node in self.files:
            self.flushed_files[node] = bytes(self.files[node])

    def _with_holes(self, node: int) -> bytes:
        now, flushed = self.files[node], self.flushed_files.get(node, b"")
        return bytes(flushed[: len(now)]).ljust(len(now), b"\0")

    def _image(self, folders: Mapping[int, Mapping[str, int]], read: Callable[[int], bytes]) -> Image:
        found: dict[str, bytes | None] = {}

        def walk(node: int, prefix: str) -> None:
            for name, child in folders.get(node, {}).items():
                path = f"{prefix}{name}"
                if child in self.folders:
                    found[path] = FOLDER
                    walk(child, f"{path}/")
                else:
                    found[path] = read(child)

        walk(ROOT, "")
        return found


def digest_of_image(image: Image) -> str:
    """Return a hash of an image."""
    digest = hashlib.sha256()
    for path, content in sorted(image.items()):
        digest.update(f"{path}\0{'/' if content is FOLDER else len(content or b'')}\0".encode())
        digest.update(content or b"")
    return digest.hexdigest()


def lay_out(image: Image, folder: Path) -> None:
    """Make a folder hold an image."""
    folder.mkdir(mode=0o700)
    for path, content in sorted(image.items()):
        place = folder / path
        if content is FOLDER:
            place.mkdir(mode=0o700)
        else:
            place.write_bytes(content or b"")
            place.chmod(0o600)


# ---------------------------------------------------------------- recording
class Recorder:
    """Turns what changes in a folder into operations. One at a time records, on the thread that made it."""

    def __init__(self, folder: Path) -> None:
        """What is there already counts as flushed."""
        self.ops: list[Op] = []
        self.start = Disk()
        self._folder = folder
        self._disk = Disk()
        self._inodes: dict[int, int] = {folder.stat().st_ino: ROOT}
        self._next = 1
        self._looking = False
        self.look()
        for op in self.ops:
            self.start.apply(op)
        self.start.flush_all()
        self.ops.clear()

    def mark(self, *said: Any) -> None:
        """Note what the world outside has seen by now."""
        self.look()
        self.ops.append(Op(kind="mark", said=said))

    def look(self, flushed: Collection[str] = ()) -> None:
        """Record what has changed. Files of these names were flushed before any name went."""
        if self._looking:
            return
        self._looking = True
        try:
            self._compare(flushed)
        finally:
            self._looking = False

    def flushed(self, status: os.stat_result) -> None:
        """Record an fsync of what has this status."""
        self.look()
        node = self._inodes.get(status.st_ino)
        if node is not None:
            self._do(Op(kind="fsync", node=node))

    def flushed_path(self, path: Path, *, name_too: bool = False) -> None:
        """Record that SQLite has flushed a file; with its name when it was made by SQLite as a log."""
        if path.exists():
            self.flushed(path.stat())
            if name_too:
                self._flush_name(path)

    def _flush_name(self, path: Path) -> None:
        self._do(Op(kind="fsync", node=self._inodes[path.parent.stat().st_ino]))

    # ------------------------------------------------------------ comparing
    def _compare(self, flushed: Collection[str]) -> None:
        folders: dict[int, dict[str, int]] = {ROOT: {}}
        contents: dict[int, bytes] = {}
        made: list[Op] = []
        self._walk(self._folder, ROOT, folders, contents, made)
        for op in made:
            self._do(op)
        for node, names in folders.items():
            for name, child in names.items():
                if self._disk.folders[node].get(name) != child:
                    kind = "name" if self._keeps_a_name(child, folders) else "rename"
                    self._do(Op(kind=kind, node=child, parent=node, name=name))
        names_of = {child: name for names in folders.values() for name, child in names.items()}
        for node in sorted(contents, key=lambda node: not names_of[node].endswith(_LOG)):  # a log before its database
            self._write(node, contents[node])
            if names_of[node] in flushed:
                self._do(Op(kind="fsync", node=node))
        self._forget_names(folders)

    def _keeps_a_name(self, child: int, folders: Mapping[int, Mapping[str, int]]) -> bool:
        """Tell a second name from another name: all that it was called before is still there."""
        return all(
            folders.get(node, {}).get(name) == child
            for node, names in self._disk.folders.items()
            for name, known in names.items()
            if known == child
        )

    def _walk(
        self,
        folder: Path,
        node: int,
        folders: dict[int, dict[str, int]],
        contents: dict[int, bytes],
        made: list[Op],
    ) -> None:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            is_folder = entry.is_dir(follow_symlinks=False)
            if not is_folder and not entry.is_file(follow_symlinks=False):
                continue  # a socket
            inode = entry.inode()
            child = self._inodes.get(inode)
            if child is None or (child in self._disk.folders) != is_folder:
                child, self._next = self._next, self._next + 1
                self._inodes[inode] = child
                made.append(Op(kind="mkdir" if is_folder else "create", node=child, parent=node, name=entry.name))
            folders[node][entry.name] = child
            if is_folder:
                folders[child] = {}
                self._walk(Path(entry.path), child, folders, contents, made)
            else:
                contents[child] = Path(entry.path).read_bytes()

    def _write(self, node: int, data: bytes) -> None:
        before = self._disk.files[node]
        if before == data:
            return
        if len(data) < len(before):
            self._do(Op(kind="truncate", node=node, offset=len(data)))
            before = self._disk.files[node]
        same = _common_prefix(before, data)
        self._do(Op(kind="write", node=node, offset=same, data=data[same:]))

    def _forget_names(self, folders: Mapping[int, Mapping[str, int]]) -> None:
        """Names that are gone. Their nodes are forgotten, for the kernel gives their numbers to others."""
        for node in list(self._disk.folders):
            for name, child in list(self._disk.folders[node].items()):
                if folders.get(node, {}).get(name) != child:
                    self._do(Op(kind="unname", node=child, parent=node, name=name))
        reachable = {ROOT, *folders, *(child for names in folders.values() for child in names.values())}
        self._inodes = {inode: node for inode, node in self._inodes.items() if node in reachable}
        for gone in set(self._disk.folders) - reachable:
            del self._disk.folders[gone]

    def _do(self, op: Op) -> None:
        self._disk.apply(op)
        self.ops.append(op)


def _common_prefix(one: bytes | bytearray, other: bytes) -> int:
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit  # one[:low] is common, one[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle)
    return low


# ---------------------------------------------------------------- where operations are announced
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "sqlite3.connect"})
_active: Recorder | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is not None and (event in _EVENTS or (event == "open" and arguments[2] & _WRITING)):
        _active.look()


class _Statements(sqlite3.Connection):
    """A connection whose statements are looked after."""

    def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
        cursor = super().execute(sql, *rest)
        _look_at_database(self, committed=sql.lstrip().upper().startswith(("COMMIT", "PRAGMA")))
        return cursor

    def executescript(self, sql: str) -> sqlite3.Cursor:
        cursor = super().executescript(sql)
        _look_at_database(self, committed=False)
        return cursor

    def close(self) -> None:
        names = [place.name for place in _places(self)] if _active is not None else ()
        super().close()
        if _active is not None:
            _active.look(names)  # the log goes when all of it is in the database, flushed


def _places(database: sqlite3.Connection) -> tuple[Path, ...]:
    listed = sqlite3.Connection.execute(database, "PRAGMA database_list").fetchall()
    main = next((Path(row[2]) for row in listed if row[1] == "main" and row[2]), None)
    return () if main is None else (main.with_name(f"{main.name}{_LOG}"), main)


def _look_at_database(database: sqlite3.Connection, *, committed: bool) -> None:
    if _active is None or not committed:
        return
    places = _places(database)
    _active.look([place.name for place in places if place.name.endswith(_LOG)])
    for place in places:
        _active.flushed_path(place, name_too=place.name.endswith(_LOG))


@contextmanager
def recording(folder: Path) -> Iterator[Recorder]:
    """Record what this thread's program does to a folder."""
    global _active, _hooked  # noqa: PLW0603 - audit hooks are for the whole process, and stay
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    recorder = Recorder(folder)
    fsync, connect = os.fsync, sqlite3.connect

    def watched_fsync(descriptor: int) -> None:
        recorder.look()
        fsync(descriptor)
        recorder.flushed(os.fstat(descriptor))

    def watched_connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return connect(*arguments, factory=_Statements, **options)

    os.fsync, sqlite3.connect = watched_fsync, watched_connect  # type: ignore[assignment]  # the same, looked after
    _active = recorder
    try:
        yield recorder
        recorder.look()
    finally:
        _active = None
        os.fsync, sqlite3.connect = fsync, connect


# ---------------------------------------------------------------- moments
@dataclass(frozen=True, kw_only=True)
class Moment:
    """A disk that a fault would leave, and what the world outside had seen by then."""

    number: int  # of operations that were done
    mode: str
    after: str  # the operation that was done last, for people
    kind: str
    image: Image
    said: tuple[tuple[Any, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.number}-{self.mode}"


def moments(recorder: Recorder) -> Iterator[Moment]:
    """Yield every distinct moment: before the first operation, and after each, by each kind of fault."""
    disk, said, names = recorder.start, [], {}
    seen: set[tuple[str, str, int]] = set()
    previous: Op | None = None
    for number in range(len(recorder.ops) + 1):
        if number:
            op = recorder.ops[number - 1]
            if op.kind == "write" and len(op.data) >= TORN_AT_LEAST:
                yield from _moment(disk, number, TORN, op, names, said, seen)
            disk.apply(op)
            previous = op
            if op.kind == "mark":
                said.append(op.said)
            elif op.name:
                names[op.node] = op.name
        for mode in (KILL, POWER, JOURNAL):
            yield from _moment(disk, number, mode, previous, names, said, seen)


def _moment(  # noqa: PLR0917 - all that `moments` knows
    disk: Disk,
    number: int,
    mode: str,
    op: Op | None,
    names: Mapping[int, str],
    said: list[tuple[Any, ...]],
    seen: set[tuple[str, str, int]],
) -> Iterator[Moment]:
    if mode == TORN and op is not None:
        whole = bytes(disk.files[op.node])
        disk.apply(op, share=0.5)
        image = disk.image(KILL)
        disk.files[op.node][:] = whole
    else:
        image = disk.image(mode)
    key = (mode if mode in (KILL, TORN) else POWER, digest_of_image(image), len(said))
    if key in seen:
        return
    seen.add(key)
    what = f"{op.kind} {op.name or names.get(op.node, '')}{op.said if op.kind == 'mark' else ''}" if op else "nothing"
    yield Moment(number=number, mode=mode, after=what, kind=op.kind if op else "start", image=image, said=tuple(said))
