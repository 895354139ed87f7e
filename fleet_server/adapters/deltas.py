"""Deltas between bundles on disk, made once each by a child process under limits (port `Deltas`).

One thread, one child, one pair at a time, so that no size of bundle takes the server down; what cannot be made is
remembered as such, and devices fetch the bundle itself. Knows files and their names: ``<target>.<base>.<method>``
beside ``<target>.<base>.json``, which is written last and says what there is. What is offered to whom is decided by
`fleet_server.rollouts`.
"""

import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO

import msgspec

from fleet_server.adapters.delta_making import Making
from fleet_server.adapters.durable import make_private_folder, read_capped, write_atomically
from fleet_server.ports import Artifacts
from protocol.bundle import digest_of_stream
from protocol.names import SHA256_HEX
from protocol.release import DELTA_METHODS, NO_BASE, Delta

MAX_WAITING = 256  # pairs; more are forgotten, and asked for again some day
MEMORY_BYTES = 1024 * 1024 * 1024
CPU_SECONDS = 300
WALL_SECONDS = 600.0
KEPT_BYTES = 2 * 1024**3  # on disk; beyond, the oldest go
WORTH = 0.95  # of the bundle's length; a delta above saves too little
MAX_INDEX = 64 * 1024
_log = logging.getLogger(__name__)
Pair = tuple[str, str]  # base or NO_BASE, target


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of a pair; empty when nothing is worth it."""

    deltas: tuple[Delta, ...] = ()


class DeltaFolder:
    """`ports.Deltas` on a folder. `start` and `stop` frame the thread that makes them."""

    def __init__(
        self,
        folder: Path,
        artifacts: Artifacts,
        *,
        memory_bytes: int = MEMORY_BYTES,
        cpu_seconds: int = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """Make the folder, and remove what was cut short in it."""
        self._folder = make_private_folder(folder)
        self._artifacts = artifacts
        self._memory_bytes = memory_bytes
        self._cpu_seconds = cpu_seconds
        self._wall_seconds = wall_seconds
        self._kept_bytes = kept_bytes
        self._queue: queue.Queue[Pair | None] = queue.Queue(MAX_WAITING)
        self._waiting: set[Pair] = set()
        self._lock = threading.Condition()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        for leftover in folder.glob("*.part"):
            leftover.unlink(missing_ok=True)

    # ------------------------------------------------------------ the port
    def prepare(self, pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            with self._lock:
                if pair in self._waiting or pair[0] == pair[1] or self._index(pair) is not None:
                    continue
                if any(self._artifacts.length(name) is None for name in pair if name != NO_BASE):
                    continue
                try:
                    self._queue.put_nowait(pair)
                except queue.Full:
                    _log.warning("too many deltas are waiting to be made; some are left out")
                    return
                self._waiting.add(pair)

    def settle(self, patience: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._waiting, patience)

    def offer(self, base: str, target: str, methods: Collection[str]) -> Delta | None:
        index = self._index((base, target)) or Index()
        usable = [delta for delta in index.deltas if delta.method in methods]
        return min(usable, key=lambda delta: delta.length, default=None)

    def open(self, base: str, target: str, method: str) -> tuple[IO[bytes], Delta]:
        index = self._index((base, target)) or Index()
        for delta in index.deltas:
            if delta.method == method:
                try:
                    return self._file((base, target), method).open("rb"), delta
                except FileNotFoundError:
                    break
        raise KeyError((base, target, method))

    # ------------------------------------------------------------ the thread
    def start(self) -> None:
        """Begin to make what is asked for."""
        self._thread = threading.Thread(target=self._work, name="deltas")
        self._thread.start()

    def stop(self) -> None:
        """End the child and the thread; what was not made is made when it is asked for again."""
        self._stopping = True
        with self._lock:
            if self._child is not None:
                self._child.kill()
        if self._thread is not None:
            while self._thread.is_alive():
                self._wake()
                self._thread.join(0.1)

    def _wake(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:  # then there is something to wake up for
            return

    def _work(self) -> None:
        while not self._stopping:
            pair = self._queue.get()
            if pair is None or self._stopping:
                continue
            try:
                self._make(pair)
            except (OSError, KeyError) as error:
                _log.warning("delta %.16s → %.16s: %s", *pair, error)
            finally:
                with self._lock:
                    self._waiting.discard(pair)
                    self._lock.notify_all()

    def _make(self, pair: Pair) -> None:
        self._run_child(pair)
        if self._stopping:
            return  # it was killed: nothing is known of this pair
        length = self._artifacts.length(pair[1]) or 0
        deltas = []
        for method in DELTA_METHODS:
            file = self._file(pair, method)
            if file.exists() and 0 < file.stat().st_size <= WORTH * length:
                with file.open("rb") as made:
                    deltas.append(Delta(method=method, length=file.stat().st_size, sha256=digest_of_stream(made)))
            else:
                file.unlink(missing_ok=True)
        write_atomically(self._index_file(pair), msgspec.json.encode(Index(deltas=tuple(deltas))))
        said = ", ".join(f"{delta.method} {delta.length}" for delta in deltas) or "none is worth it"
        _log.info("delta %.16s → %.16s of %d bytes: %s", *pair, length, said)
        self._make_room()

    def _run_child(self, pair: Pair) -> None:
        base, target = pair
        making = Making(
            target=self._path(target),
            target_sha256=target,
            base="" if base == NO_BASE else self._path(base),
            base_sha256="" if base == NO_BASE else base,
            out=str(self._file(pair, "")),
            memory_bytes=self._memory_bytes,
            cpu_seconds=self._cpu_seconds,
        )
        command = [sys.executable, "-m", "fleet_server.adapters.delta_making"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            with self._lock:
                self._child = child
                if self._stopping:
                    child.kill()
            self._await(child, pair, msgspec.json.encode(making))
            with self._lock:
                self._child = None
        for leftover in self._folder.glob("*.part"):
            leftover.unlink(missing_ok=True)

    def _await(self, child: "subprocess.Popen[bytes]", pair: Pair, request: bytes) -> None:
        try:
            _, said = child.communicate(request, timeout=self._wall_seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            _, said = child.communicate()
        if child.returncode != 0 and not self._stopping:
            why = said.decode(errors="replace").strip().splitlines()
            _log.warning("delta %.16s → %.16s: its child ended with %d%s", *pair, child.returncode, _after(why))

    # ------------------------------------------------------------ files
    def _path(self, sha256: str) -> str:
        with self._artifacts.open(sha256) as file:
            return str(file.name)

    def _file(self, pair: Pair, method: str) -> Path:
        base, target = pair
        return self._folder / f"{target}.{base}.{method}"

    def _index_file(self, pair: Pair) -> Path:
        return self._file(pair, "json")

    def _index(self, pair: Pair) -> Index | None:
        """Return what is known of a pair; a damaged index is as good as none."""
        base, target = pair
        if not SHA256_HEX.fullmatch(target) or not (base == NO_BASE or SHA256_HEX.fullmatch(base)):
            return Index()
        try:
            data = read_capped(self._index_file(pair), MAX_INDEX)
            return None if data is None else msgspec.json.decode(data, type=Index)
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OSError):
            return None

    def _make_room(self) -> None:
        """Remove the oldest pairs beyond what is kept."""
        indices = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
        kept = 0
        for index in indices:
            files = [file for file in self._folder.glob(f"{index.stem}.*") if file != index]
            kept += sum(file.stat().st_size for file in files)
            if kept > self._kept_bytes:
                for file in (index, *files):
                    file.unlink(missing_ok=True)


def _after(lines: Sequence[str]) -> str:
    return f": {lines[-1]}" if lines else ""
