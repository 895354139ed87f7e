"""The on-disk queue of records that the server has not acknowledged, on SQLite.

One file. `append` returns when the record is on the disk (WAL, synchronous=FULL), and a number, once used, is never
used again, whatever is deleted or however the process ends. The spool id is random and made with the file, so a new
file is a new series of numbers to the server. A file that cannot be read is moved aside and a new one begun.

The size is bounded. When it is reached, neighbouring reports are merged (by the callable given in; this module does
not know what a report is), the pair that covers least first, so that resolution degrades evenly; if nothing can be
merged the oldest report is dropped and counted; then events go, replies last. A record that has been handed out for
publishing may be in the server's database under its number, so it is never merged: a durable mark per stream, set
before the first record is handed out, says up to where that is. It outlives the process; which records await an
acknowledgement on *this* connection is kept in memory only.
"""

import logging
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.adapters.atomic_file import PRIVATE, flush_folder
from agent.ports import EVENTS, REPLIES, TELEMETRY, Trouble

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 8 * 1024 * 1024  # bytes; three weeks of one-minute reports of a device with one model
RECORD_OVERHEAD = 32  # bytes that a stored record costs beside its payload (measured: key, header, page slack)
Merge = Callable[[bytes, bytes], bytes | None]
Pair = tuple[int, int, int, int]  # number and covers of the older record, number and covers of the newer

_SCHEMA = """
CREATE TABLE spool (id TEXT NOT NULL, dropped INTEGER NOT NULL DEFAULT 0);
CREATE TABLE stream (name TEXT PRIMARY KEY, last INTEGER NOT NULL, handed_out INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE record (
    stream TEXT NOT NULL, number INTEGER NOT NULL, covers INTEGER NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (stream, number)
);
PRAGMA user_version = 1;
"""
_FORMAT = 1
_IN_MEMORY = "CREATE TEMP TABLE published (stream TEXT, number INTEGER, PRIMARY KEY (stream, number)) WITHOUT ROWID"
_UNPUBLISHED = """
SELECT number, payload FROM record r WHERE stream = ?1
AND NOT EXISTS (SELECT 1 FROM temp.published p WHERE p.stream = r.stream AND p.number = r.number)
ORDER BY number LIMIT ?2
"""
# Neighbours that were never handed out, the pair that covers least first.
_PAIRS = """
SELECT number, covers, next, next_covers FROM (
    SELECT number, covers, lead(number) OVER follow AS next, lead(covers) OVER follow AS next_covers FROM record
    WHERE stream = ?1 AND number > (SELECT handed_out FROM stream WHERE name = ?1)
    WINDOW follow AS (ORDER BY number))
WHERE next IS NOT NULL ORDER BY covers + next_covers, number LIMIT ?2
"""
_AT_ONCE = 512  # pairs looked at per scan of the queue
_MAX_FAILURES = 64  # per scan; a full queue of what cannot merge must not hold up the agent
_SLACK = 1024  # a full spool frees this share of its limit at once, so that it is not scanned for every record


class SqliteSpool:
    """`agent.ports.Spool` in one SQLite file. Safe from several threads."""

    def __init__(
        self,
        path: Path | None,
        *,
        merge: Merge,
        limit: int = DEFAULT_LIMIT,
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        """Open or make the file; raise `Trouble` when the disk refuses. None: in memory, until `move_to`.

        ``limit``: bytes of records; ``merge``: (older, newer) -> one payload, or None. `replaced` then says where an
        unreadable file went, or is None.
        """
        self._lock = threading.RLock()
        self._merge = merge
        self._limit = limit
        self._new_id = new_id
        self._in_memory = path is None
        self._take(*((_open_in_memory(new_id), None) if path is None else _open_or_replace(path, new_id)))

    def _take(self, database: sqlite3.Connection, replaced: Path | None) -> None:
        self._unmergeable: set[Pair] = set()
        self._database, self.replaced = database, replaced
        self._id, self._dropped = self._database.execute("SELECT id, dropped FROM spool").fetchone()
        self._size: int = self._database.execute(
            "SELECT coalesce(sum(length(payload) + ?), 0) FROM record", (RECORD_OVERHEAD,)
        ).fetchone()[0]

    @property
    def id(self) -> str:
        return str(self._id)

    @property
    def in_memory(self) -> bool:
        """Tell whether a power cut loses what is here."""
        return self._in_memory

    def move_to(self, path: Path) -> bool:
        """Go on in a file, with the series of numbers that it has; raise `Trouble` when the disk still refuses.

        False while something waits here: a number belongs to its series, and may be on its way already.
        """
        with self._lock:
            if self.depth(EVENTS) or self.depth(TELEMETRY):
                return False
            opened = _open_or_replace(path, self._new_id)
            self._database.close()
            self._take(*opened)
            self._in_memory = False
        return True

    def close(self) -> None:
        """Close the file; a later call of anything else raises `Trouble`."""
        with self._lock:
            self._database.close()

    def append(self, stream: str, make: Callable[[int], bytes]) -> int:
        with self._transaction() as database:
            number = self._last(stream) + 1
            payload = make(number)
            database.execute("UPDATE stream SET last = ? WHERE name = ?", (number, stream))
            database.execute("INSERT INTO record VALUES (?, ?, 1, ?)", (stream, number, payload))
            self._size += len(payload) + RECORD_OVERHEAD
            self._make_room()
        return number

    def unpublished(self, stream: str, limit: int) -> Sequence[tuple[int, bytes]]:
        with self._transaction() as database:
            self._last(stream)
            records: list[tuple[int, bytes]] = database.execute(_UNPUBLISHED, (stream, limit)).fetchall()
            if records:  # nothing is written when the mark is there already
                database.execute(
                    "UPDATE stream SET handed_out = ?1 WHERE name = ?2 AND handed_out < ?1", (records[-1][0], stream)
                )
        return records

    def mark_published(self, stream: str, number: int) -> None:
        with self._transaction() as database:
            database.execute("INSERT OR IGNORE INTO temp.published VALUES (?, ?)", (stream, number))

    def acknowledge(self, stream: str, upto: int, missing: Sequence[tuple[int, int]]) -> int:
        with self._transaction() as database:
            wanted = [n for low, high in missing for n in self._numbers(stream, low, high)]
            gone = set(self._numbers(stream, 1, max(0, min(upto, self._handed_out(stream))))).difference(wanted)
            database.executemany(
                "DELETE FROM temp.published WHERE stream = ? AND number = ?", [(stream, n) for n in (*gone, *wanted)]
            )
            self._remove(stream, gone)
        return len(gone)

    def forget_published(self) -> None:
        with self._transaction() as database:
            database.execute("DELETE FROM temp.published")

    def depth(self, stream: str) -> int:
        """Count records; asked by people too, hence also on a disk that takes no writes."""
        with self._lock:
            try:
                found = self._database.execute("SELECT count(*) FROM record WHERE stream = ?", (stream,)).fetchone()
            except sqlite3.Error as error:
                raise _refused(error) from error
        return int(found[0])

    def dropped(self) -> int:
        with self._lock:
            return int(self._dropped)

    # ---------------------------------------------------------------- room
    def _make_room(self) -> None:
        if self._size <= self._limit:
            return
        while self._size > self._limit - self._limit // _SLACK and self._merge_pairs():
            pass
        while self._size > self._limit and self._drop_one():
            pass

    def _merge_pairs(self) -> bool:
        """Merge neighbours until there is room, those that cover least first; False when no pair merges."""
        before = self._size
        failures = 0
        touched: set[int] = set()
        for pair in self._database.execute(_PAIRS, (TELEMETRY, _AT_ONCE + len(self._unmergeable))).fetchall():
            older, _, newer, _ = pair
            if self._size <= self._limit - self._limit // _SLACK or failures == _MAX_FAILURES:
                break
            if pair in self._unmergeable or not touched.isdisjoint((older, newer)):
                continue
            touched.update((older, newer))
            failures += not self._merge_pair(pair)
        return self._size < before

    def _merge_pair(self, pair: Pair) -> bool:
        older, _, newer, _ = pair
        merged = self._merge(self._payload(older), self._payload(newer))
        if merged is None:
            self._unmergeable.add(pair)
            return False
        self._replace_pair(pair, merged)
        return True

    def _replace_pair(self, pair: Pair, merged: bytes) -> None:
        older, older_covers, newer, newer_covers = pair
        self._size += len(merged) - len(self._payload(newer))
        self._remove(TELEMETRY, [older])
        self._database.execute(
            "UPDATE record SET payload = ?, covers = ? WHERE stream = ? AND number = ?",
            (merged, older_covers + newer_covers, TELEMETRY, newer),
        )

    def _payload(self, number: int) -> bytes:
        payload: bytes = self._database.execute(
            "SELECT payload FROM record WHERE stream = ? AND number = ?", (TELEMETRY, number)
        ).fetchone()[0]
        return payload

    def _drop_one(self) -> bool:
        for stream, keep in ((TELEMETRY, 0), (EVENTS, 1), (REPLIES, 1)):
            oldest = self._database.execute(
                "SELECT number, covers FROM record WHERE stream = ? ORDER BY number LIMIT 1", (stream,)
            ).fetchone()
            if oldest is not None and oldest[0] <= self._last(stream) - keep:
                self._remove(stream, [oldest[0]])
                self._count_dropped(stream, oldest[1])
                return True
        return False

    def _count_dropped(self, stream: str, covers: int) -> None:
        log.warning("the spool is full: dropped a record of %s", stream)
        if stream == TELEMETRY:
            self._dropped += covers
            self._database.execute("UPDATE spool SET dropped = ?", (self._dropped,))

    # ---------------------------------------------------------------- records
    def _last(self, stream: str) -> int:
        """Return the highest number ever used; a stream begins at 0."""
        self._database.execute("INSERT OR IGNORE INTO stream VALUES (?, 0, 0)", (stream,))
        last: int = self._database.execute("SELECT last FROM stream WHERE name = ?", (stream,)).fetchone()[0]
        return last

    def _handed_out(self, stream: str) -> int:
        row = self._database.execute("SELECT handed_out FROM stream WHERE name = ?", (stream,)).fetchone()
        return row[0] if row else 0

    def _numbers(self, stream: str, low: int, high: int) -> list[int]:
        low, high = (
            max(low, 1),
            min(high, self._last(stream)),
        )  # what comes over the wire may not fit SQLite's integers
        rows = self._database.execute(
            "SELECT number FROM record WHERE stream = ? AND number BETWEEN ? AND ?",
            (stream, min(low, high + 1), high),
        )
        return [row[0] for row in rows]

    def _remove(self, stream: str, numbers: Sequence[int] | set[int]) -> None:
        for number in numbers:
            key = (stream, number)
            (length,) = self._database.execute(
                "SELECT length(payload) FROM record WHERE stream = ? AND number = ?", key
            ).fetchone()
            self._database.execute("DELETE FROM record WHERE stream = ? AND number = ?", key)
            self._database.execute("DELETE FROM temp.published WHERE stream = ? AND number = ?", key)
            self._size -= length + RECORD_OVERHEAD

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Do everything inside durably or not at all."""
        with self._lock:
            size, dropped = self._size, self._dropped
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except BaseException as error:
                self._size, self._dropped = size, dropped
                with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
                    self._database.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise _refused(error) from error
                raise


# ---------------------------------------------------------------- opening
def _open_or_replace(path: Path, new_id: Callable[[], str]) -> tuple[sqlite3.Connection, Path | None]:
    try:
        return _open(path, new_id), None
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and not _damaged(error):
            raise _cannot_open(path, error) from error
        return _begin_anew(path, new_id, error)
    except OSError as error:
        raise _cannot_open(path, error) from error


def _begin_anew(path: Path, new_id: Callable[[], str], why: Exception) -> tuple[sqlite3.Connection, Path | None]:
    try:
        aside = _move_aside(path)
        log.error("%s was unreadable (%s); it is now %s and a new spool begins", path, why, aside)
        return _open(path, new_id), aside
    except (sqlite3.Error, OSError) as error:
        raise _cannot_open(path, error) from error


def _cannot_open(path: Path, error: Exception) -> Trouble:
    return Trouble(
        f"cannot open {path}: {error}",
        remedy="Check that the disk is neither full nor read-only, and who owns the folder",
    )


def _refused(error: Exception) -> Trouble:
    return Trouble(f"the spool cannot be used: {error}", remedy="Check that the disk is neither full nor read-only")


def _open_in_memory(new_id: Callable[[], str]) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    _configure(database)
    _create(database, new_id())
    return database


def _damaged(error: sqlite3.OperationalError) -> bool:
    """Tell a broken file from a disk that refuses: a missing table or column is the file's fault."""
    return any(words in str(error) for words in ("no such table", "no such column", "malformed"))


def _move_aside(path: Path) -> Path:
    """Keep one unreadable file for people to look at; an older one makes place for it."""
    aside = path.with_name(f"{path.name}.unreadable")
    path.replace(aside)
    for companion in ("-wal", "-shm"):
        path.with_name(path.name + companion).unlink(missing_ok=True)
    flush_folder(path.parent)
    return aside


def _open(path: Path, new_id: Callable[[], str]) -> sqlite3.Connection:
    path.touch(mode=PRIVATE, exist_ok=True)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        _configure(database)
        if database.execute("PRAGMA user_version").fetchone()[0] == 0:
            _create(database, new_id())
            flush_folder(path.parent)
        _check(database)
    except BaseException:
        database.close()
        raise
    return database


def _configure(database: sqlite3.Connection) -> None:
    for setting in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "wal_autocheckpoint = 256",  # pages: keeps the log beside the file at 1 MB
        "journal_size_limit = 1048576",
        "temp_store = MEMORY",
        "cache_size = -512",  # KiB; the queue is read in order, a large cache wins nothing
    ):
        database.execute(f"PRAGMA {setting}")
    database.execute(_IN_MEMORY)


def _create(database: sqlite3.Connection, spool_id: str) -> None:
    database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
    database.execute("INSERT INTO spool VALUES (?, 0)", (spool_id,))
    database.execute("COMMIT")


def _check(database: sqlite3.Connection) -> None:
    """Raise sqlite3.DatabaseError when the file is not a whole spool."""
    (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if found != "ok" or version != _FORMAT:
        raise sqlite3.DatabaseError(f"format {version}, check: {found}")
    if len(database.execute("SELECT id, dropped FROM spool").fetchall()) != 1:
        raise sqlite3.DatabaseError("the spool has no id")
    database.execute("SELECT stream, number, covers, payload FROM record LIMIT 1")
    database.execute("SELECT name, last, handed_out FROM stream LIMIT 1")
