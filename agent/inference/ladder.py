"""Measures a model on every delegate, runtime and number of threads here: ``python -m agent.inference.ladder``.

Each rung is tried in a child of its own, so that one that crashes or hangs is a row of the table and no end; a
delegate's library is loaded nowhere else before. As a program this file is that child: it tries one rung and writes
one `Rung`. Which rung is the best is decided in ``core/rungs.py``.
"""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from agent.channel import PARENT_PID
from agent.core.delegates import Delegate
from agent.core.rungs import Rung, choose, name, weigh
from agent.inference.kernel import die_with_parent
from agent.inference.loading import CannotServe, Servable, Settings, from_argument, load_one, run_golden
from agent.inference.tensors import size
from protocol.states import RuntimeName
from runtime.interpreter import AUTO, LoadedModel, available, import_runtime
from runtime.measure import growth, measure_latency, memory_use

RUNG_SECONDS = 30.0  # of one child
KEPT_ERRORS = 300  # last characters of what a child that died said
KERNELS = ("", "plain", "reference")
MAX_RUNS, MIN_RUNS = 200, 10
MEASURE_US = 1_000_000  # how long measuring one rung may take, about
MAX_ANSWER = 64 * 1024
MIB = 1024 * 1024

Progress = Callable[[int, int, Rung], None]  # done, of how many, the next rung


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is to try."""

    rung: Rung
    delegate: Delegate | None = None


# ---------------------------------------------------------------- the ladder
def rungs_for(
    servable: Servable, cores: int, *, kernels: Sequence[str] = KERNELS, delegates: Sequence[Delegate] = ()
) -> list[Rung]:
    """Return the rungs to try: what the manifest allows and this device has, with 1, 2, 4… threads up to its cores.

    Delegates come first; what they do not take runs on one thread. Kernels that are not optimised use one thread too:
    they are for models that the optimised ones compute wrongly.
    """
    needs = servable.manifest.needs.runtimes if servable.manifest else tuple(RuntimeName)
    runtimes = [runtime for runtime in available() if runtime in needs]
    accelerated = [
        Rung(runtime=runtime, threads=1, delegate=delegate.name) for delegate in delegates for runtime in runtimes
    ]
    return accelerated + [
        Rung(runtime=runtime, threads=threads, kernels=kind)
        for kind in kernels
        for runtime in runtimes
        for threads in ([1] if kind else _threads(cores))
    ]


def climb(
    path: Path,
    rungs: Sequence[Rung],
    progress: Progress,
    *,
    delegates: Sequence[Delegate] = (),
    seconds: float = RUNG_SECONDS,
) -> tuple[Rung, ...]:
    """Measure each rung in a child of its own. ``path``: bundle folder or ``.tflite``."""
    measured = []
    for k, rung in enumerate(rungs):
        progress(k, len(rungs), rung)
        measured.append(_try_in_child(path, _step(rung, delegates), seconds))
    return weigh(measured)


def climb_in_trial(
    servable: Servable, cores: int, *, runtime: str, seconds: float, delegates: Sequence[Delegate] = ()
) -> tuple[Rung, ...]:
    """Measure the fast kernels only, on the runtime that is set if one is, and only as long as there is time.

    Delegates get half of it together: what works without them must be measured too.
    """
    started = time.monotonic()
    measured: list[Rung] = []
    for rung in rungs_for(servable, cores, kernels=("",), delegates=delegates):
        left = started + seconds / (2 if rung.delegate else 1) - time.monotonic()
        if runtime in (AUTO, rung.runtime.value) and left > 0:
            measured.append(_try_in_child(servable.path.parent, _step(rung, delegates), min(left, RUNG_SECONDS)))
    return weigh(measured)


def _step(rung: Rung, delegates: Sequence[Delegate]) -> Step:
    return Step(rung=rung, delegate=next((one for one in delegates if one.name == rung.delegate), None))


def _threads(cores: int) -> list[int]:
    powers = [2**k for k in range(cores.bit_length()) if 2**k <= cores]
    return powers if cores in powers else [*powers, cores]


def _try_in_child(path: Path, step: Step, seconds: float) -> Rung:
    rung = step.rung
    command = [sys.executable, "-m", "agent.inference.ladder", str(path)]
    environment = {**os.environ, PARENT_PID: str(os.getpid())}
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(step),
            capture_output=True,
            timeout=seconds,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return _failed(rung, f"it was not done within {seconds:g} s")
    except OSError as error:
        return _failed(rung, f"its process cannot be started: {error}")
    if done.returncode != 0:
        return _failed(rung, f"its process ended {_cause(done.returncode)}{_last_line(done.stderr)}")
    try:
        return msgspec.json.decode(done.stdout[-MAX_ANSWER:], type=Rung)
    except msgspec.DecodeError:
        return _failed(rung, "its process said nothing that makes sense")


def _failed(rung: Rung, error: str) -> Rung:
    return msgspec.structs.replace(rung, error=error)


def _cause(returncode: int) -> str:
    try:
        return f"by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"with {returncode}"


def _last_line(said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line and not line.startswith("INFO")]
    return f": {lines[-1][-KEPT_ERRORS:]}" if lines else ""


# ---------------------------------------------------------------- one rung, in the child
def main() -> int:
    """Try the rung on standard input with the model of the command line; write what was measured."""
    die_with_parent(os.environ)
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what native code prints is no answer
    step = msgspec.json.decode(sys.stdin.buffer.read(MAX_ANSWER), type=Step)
    if step.delegate:
        _take_memory_of_delegates()
    with TemporaryDirectory(prefix="edgewarden-rung-") as scratch:
        measured = measure(from_argument(Path(sys.argv[1]), Path(scratch)), step.rung, step.delegate)
    with answer:
        answer.write(msgspec.json.encode(measured))
    return 0


def _take_memory_of_delegates() -> None:
    """A trial's hard limit is above the soft one by what delegates may take."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def measure(servable: Servable, rung: Rung, delegate: Delegate | None = None) -> Rung:
    """Load a model as the rung says, check its golden samples, and time it."""
    settings = Settings(runtime=rung.runtime.value, threads=rung.threads, kernels=rung.kernels, delegate=delegate)
    import_runtime(rung.runtime.value)
    before = memory_use()
    try:
        with load_one(servable, settings) as model:
            golden = run_golden(servable, model)
            if not golden:
                _fill_with_zeros(model)
            one = measure_latency(model, time.perf_counter_ns, warm_up=3, runs=3).median_us
            runs = min(MAX_RUNS, max(MIN_RUNS, MEASURE_US // max(1, one)))
            latency = measure_latency(model, time.perf_counter_ns, runs=runs)
            memory = growth(before, memory_use())
    except (CannotServe, RuntimeError, MemoryError) as error:
        return _failed(rung, str(error).strip() or type(error).__name__)
    return msgspec.structs.replace(
        rung, p50_us=latency.median_us, p95_us=latency.p95_us, memory=memory, golden=golden
    )


def _fill_with_zeros(model: LoadedModel) -> None:
    """Without golden samples, at least run on the same values every time."""
    for index, spec in enumerate(model.inputs):
        model.fill(index, bytes(size(spec)))


# ---------------------------------------------------------------- edgewarden-agent bench
def bench(path: Path, *, as_json: bool, cores: int, delegates: Sequence[Delegate] = ()) -> int:
    """Print the table of a bundle folder, an ``.ewb`` or a ``.tflite``; 1 when no rung works."""
    with TemporaryDirectory(prefix="edgewarden-bench-") as scratch:
        servable = from_argument(path, Path(scratch))
        where = servable.path.parent if servable.manifest else servable.path
        rungs = climb(
            where,
            rungs_for(servable, cores, delegates=delegates),
            _bar if sys.stderr.isatty() else _no_bar,
            delegates=delegates,
        )
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # noqa: T201 - a command's progress
    print(_json(rungs) if as_json else table(rungs))  # noqa: T201 - a command's answer
    return 0 if choose(rungs) else 1


def table(rungs: Sequence[Rung]) -> str:
    """Return the rungs for people; an arrow marks the one to choose."""
    rungs = weigh(rungs)
    best = choose(rungs)
    lines = [f"  {'rung':<36} {'p50 us':>8} {'p95 us':>8} {'memory MiB':>10} {'golden':>6}"]
    for rung in rungs:
        mark = ">" if rung is best else " "
        figures = f"{rung.p50_us:>8} {rung.p95_us:>8} {rung.memory / MIB:>10.1f} {rung.golden:>6}"
        refused = f"  refused: {rung.refused}" if rung.refused else ""
        lines.append(f"{mark} {name(rung):<36} {rung.error or figures}{refused}")
    return "\n".join(lines)


def _json(rungs: Sequence[Rung]) -> str:
    best = choose(rungs)
    return msgspec.json.format(msgspec.json.encode({"rungs": rungs, "best": best}), indent=2).decode()


def _bar(done: int, of: int, rung: Rung) -> None:
    full = 24 * done // of
    print(f"\r\x1b[K[{'#' * full}{'.' * (24 - full)}] {done}/{of} {name(rung)}", end="", file=sys.stderr, flush=True)  # noqa: T201 - a command's progress


def _no_bar(done: int, of: int, rung: Rung) -> None:
    """Show nothing: nobody watches."""


if __name__ == "__main__":
    sys.exit(main())
