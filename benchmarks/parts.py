"""What the benchmarks share: options, servers as people start them, a supervised data plane, figures of a process."""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import msgspec
import numpy as np

from agent.adapters.data_plane import CHILD_ENVIRONMENT, DataPlaneProcesses, ListeningSockets
from agent.channel import Serving
from agent.client import Client
from agent.ports import StoredModel
from agent.supervisor import Event, Supervisor
from protocol.manifest import MANIFEST_NAME, decode_manifest, encode_manifest

DIGITS = ROOT / "examples" / "digits" / "v1"
MOBILENET = ROOT / "build" / "benchmarks" / "mobilenet_v2_int8.tflite"
RUNTIMES = ("litert", "tflite-runtime")
PATIENCE = 30.0  # seconds


def options(description: str, rounds: int, **more: str) -> argparse.Namespace:
    """Read the command line; ``more`` are flags with their help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="the median of so many counts (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few seconds only: shows that it works, not how well")
    for flag, text in more.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)
    return parser.parse_args()


def note(text: str) -> None:
    """Tell the person who waits how far it is."""
    print(text, file=sys.stderr, flush=True)


def result(question: str, **figures: object) -> None:
    """Print the one JSON line that stands for this run. ``busy``: load average, so that noise can be told."""
    print(json.dumps({"benchmark": question, "busy": round(os.getloadavg()[0], 2), **figures}))


def need_mobilenet() -> Path:
    """Return the model, or end with what to do."""
    if not MOBILENET.exists():
        sys.exit(f"{MOBILENET} is missing; make it in an environment with TensorFlow: python benchmarks/models.py")
    return MOBILENET


def timed(act: Callable[[], object], times: int) -> list[int]:
    """Return how long each of so many calls took, in ns."""
    took = []
    for _ in range(times):
        started = time.perf_counter_ns()
        act()
        took.append(time.perf_counter_ns() - started)
    return took


def side_by_side(acts: dict[str, Callable[[], object]], *, rounds: int, times: int) -> dict[str, list[float]]:
    """Return the p50 of every round, in µs, by name. In a round all take turns, so that noise falls on all alike."""
    took: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():
        timed(act, max(3, times // 10))
    for k in range(rounds):
        samples: dict[str, list[int]] = {name: [] for name in acts}
        for _ in range(10):
            for name, act in acts.items():
                samples[name] += timed(act, max(1, times // 10))
        for name, values in samples.items():
            took[name].append(statistics.median(values) / 1000)
        note(
            f"  round {k + 1}/{rounds}: " + ", ".join(f"{name} {values[-1]:.1f} µs" for name, values in took.items())
        )
    return took


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within a round."""
    return round(statistics.median(a / b for a, b in zip(numerator, denominator, strict=True)), 3)


def environment() -> dict[str, str]:
    """Return the environment that control gives a data plane."""
    return {**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": str(ROOT)}


# ---------------------------------------------------------------- an unmanaged server
@dataclass(frozen=True, kw_only=True)
class Served:
    """Where a server answers, and which process it is."""

    unix: str
    http: str
    pid: int


@contextlib.contextmanager
def serving(model: Path, runtime: str, *, more: Sequence[str] = ()) -> Iterator[Served]:
    """Run ``serve`` on a model until the block ends."""
    with TemporaryDirectory(prefix="edgewarden-bench-") as folder:
        unix, http = f"{folder}/i.sock", f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "agent.inference", "serve", str(model), "--unix", unix, "--http", http]
        with subprocess.Popen(
            [*command, "--runtime", runtime, *more],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                with Client(unix) as client:
                    until(client.ready, process)
                yield Served(unix=unix, http=http, pid=process.pid)
            finally:
                process.terminate()


def until(happened: Callable[[], bool], process: "subprocess.Popen[bytes] | None" = None) -> None:
    """Wait for something; end when it does not come, or the process that should bring it has ended."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > deadline or (process and process.poll() is not None):
            sys.exit("a program did not start")
        time.sleep(0.02)


def free_port() -> int:
    """Return a loopback port that is free now."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ---------------------------------------------------------------- a supervised data plane
class Plane:
    """A data plane under a real supervisor, as control has it."""

    def __init__(self, folder: Path, runtime: str = "auto", *, spare: bool = False) -> None:
        """Serve nothing yet. ``spare``: have one soon after something serves."""
        self.unix = str(folder / "i.sock")
        self._folder = folder
        self._sockets = ListeningSockets.open(unix=folder / "i.sock")
        launcher = DataPlaneProcesses(self._sockets, options=("--runtime", runtime), environment=environment())
        self.supervisor = Supervisor(launcher, self._hear, spare=spare, spare_calm_seconds=0.5)
        self._heard: list[Event] = []
        self._changed = threading.Condition()
        self._tickets = iter(range(1, 10_000_000))
        self.supervisor.start()

    def publish(self, example: str, version: int) -> StoredModel:
        """Lay out an example as the model store does."""
        source = ROOT / "examples" / "digits" / example
        manifest = decode_manifest((source / MANIFEST_NAME).read_bytes())
        manifest = msgspec.structs.replace(manifest, version=version)
        digest = hashlib.sha256(encode_manifest(manifest)).hexdigest()
        folder = self._folder / digest
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
        return StoredModel(digest=digest, folder=str(folder), manifest=manifest)

    def serve(self, model: StoredModel) -> float:
        """Let a model serve; return how long it took from order to answer, in ms."""
        ticket, started = next(self._tickets), time.perf_counter()
        self.supervisor.serve(ticket, model)
        answer = self.wait_for(lambda event: getattr(event, "ticket", None) == ticket)
        if not isinstance(answer, Serving):
            sys.exit(f"not served: {answer}")
        return (time.perf_counter() - started) * 1000

    def wait_for(self, wanted: Callable[[Event], bool]) -> Event:
        """Return the event that fits, and forget what came before it."""
        with self._changed:
            found: Event | None = None

            def look() -> bool:
                nonlocal found
                found = next(filter(wanted, self._heard), None)
                return found is not None

            if not self._changed.wait_for(look, timeout=PATIENCE) or found is None:
                sys.exit(f"not heard within {PATIENCE} s")
            self._heard.clear()
            return found

    def close(self) -> None:
        """End the data plane."""
        self.supervisor.stop()
        self._sockets.close()

    def _hear(self, event: Event) -> None:
        with self._changed:
            self._heard.append(event)
            self._changed.notify_all()


@contextlib.contextmanager
def plane(runtime: str = "auto", *, spare: bool = False) -> Iterator[Plane]:
    """Run a supervised data plane until the block ends."""
    with TemporaryDirectory(prefix="edgewarden-bench-") as folder:
        one = Plane(Path(folder), runtime, spare=spare)
        try:
            yield one
        finally:
            one.close()


class Load:
    """A client that asks at fixed times, whether the last answer was quick or not."""

    def __init__(self, unix: str, per_second: float) -> None:
        """Begin at `start`."""
        self.latencies: list[float] = []  # seconds from when a request was due to its answer
        self.failures: list[str] = []
        self.answered_at: list[float] = []
        self._unix, self._period = unix, 1 / per_second
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Stop asking."""
        self._over.set()
        self._thread.join()

    def worst_ms(self, since: int = 0) -> float:
        """Return the longest time from due to answered, in ms."""
        return round(max(self.latencies[since:], default=0.0) * 1000, 1)

    def _run(self) -> None:
        image = np.zeros((1, 8, 8, 1), np.int8)
        due = time.monotonic()
        with Client(self._unix) as client:
            while not self._over.is_set():
                try:
                    client.infer("digits", image)
                except Exception as error:  # noqa: BLE001 - whatever it is, it counts as a failed request
                    self.failures.append(repr(error))
                self.answered_at.append(time.monotonic())
                self.latencies.append(self.answered_at[-1] - due)
                due += self._period
                time.sleep(max(0.0, due - time.monotonic()))


@contextlib.contextmanager
def load(unix: str, per_second: float = 200.0) -> Iterator[Load]:
    """Ask until the block ends."""
    one = Load(unix, per_second)
    one.start()
    try:
        yield one
    finally:
        one.stop()


# ---------------------------------------------------------------- figures of a process
def pss_mb(pid: int) -> float:
    """Return a process's proportional set size, in MB (10^6 bytes): shared pages count once over all sharers."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024 / 1e6


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
