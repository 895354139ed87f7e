"""How long a loaded model takes here, and how much memory this process has used for it.

Measures only; what is too slow or too large is decided by whoever asked.
"""

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime.interpreter import LoadedModel

WARM_UP = 5  # the first runs are up to half as slow again
RUNS = 50  # the defaults of LiteRT's own benchmark tool
_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one warm invoke, in µs."""

    median_us: int
    p95_us: int
    runs: int


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory of this process, in bytes."""

    peak: int  # highest resident memory since the process began
    data: int  # private writable memory now: what RLIMIT_DATA limits


def measure_latency(
    model: LoadedModel, clock: Callable[[], int], *, warm_up: int = WARM_UP, runs: int = RUNS
) -> Latency:
    """Invoke the model on what it was last filled with; ``clock`` returns ns (`time.perf_counter_ns`)."""
    import statistics  # it brings decimals and fractions, which a process that only serves does not need

    for _ in range(warm_up):
        model.invoke()
    times = sorted(_one_run(model, clock) for _ in range(runs))
    return Latency(
        median_us=round(statistics.median(times) / 1000),
        p95_us=round(times[math.ceil(0.95 * runs) - 1] / 1000),
        runs=runs,
    )


def memory_use() -> MemoryUse:
    """Return the memory use of this process; without ``/proc`` the resident peak stands for both."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
        return MemoryUse(peak=peak, data=peak)
    # Not ru_maxrss: a child starts with its parent's. VmHWM begins anew at exec.
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return MemoryUse(peak=_bytes(fields["VmHWM"]), data=_bytes(fields["VmData"]))


def growth(before: MemoryUse, after: MemoryUse) -> int:
    """Return what was taken between two readings: resident or reserved, whichever is more."""
    return max(0, after.peak - before.peak, after.data - before.data)


def _one_run(model: LoadedModel, clock: Callable[[], int]) -> int:
    start = clock()
    model.invoke()
    return clock() - start


def _bytes(field: str) -> int:
    return int(field.split(maxsplit=1)[0]) * _KIB
