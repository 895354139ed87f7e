"""How fast one model runs on this device, rung by rung, and which rung it should run on.

A rung is a runtime with a number of threads and a kind of kernels. Only rungs whose golden samples agreed count.
Measuring is done elsewhere.
"""

from collections.abc import Sequence

import msgspec

from protocol.states import RuntimeName

WITHIN = 0.05  # fewer threads are preferred when they cost at most this share of the fastest median


class Rung(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way to run a model, and what was measured. With an ``error`` nothing else counts."""

    runtime: RuntimeName
    threads: int
    kernels: str = ""  # empty: the runtime's fastest; plain: without delegates; reference: unoptimised
    p50_us: int = 0
    p95_us: int = 0
    memory: int = 0  # bytes that loading and running took
    golden: int = 0  # samples that agreed
    error: str = ""


def choose(rungs: Sequence[Rung]) -> Rung | None:
    """Return the fastest rung, or one with fewer threads that is nearly as fast; None when none works."""
    working = [rung for rung in rungs if not rung.error]
    if not working:
        return None
    limit = min(rung.p50_us for rung in working) * (1 + WITHIN)
    return min((rung for rung in working if rung.p50_us <= limit), key=lambda rung: (rung.threads, rung.p50_us))


def name(rung: Rung) -> str:
    """Return a rung's name for people: ``litert x 2``."""
    kernels = f" ({rung.kernels} kernels)" if rung.kernels else ""
    return f"{rung.runtime.value} x {rung.threads}{kernels}"
