"""How fast one model runs on this device, rung by rung, and which rung it should run on.

A rung is a runtime with a number of threads and a kind of kernels, or with a delegate. Only rungs whose golden
samples agreed count, a delegate only if it is faster than all that works without one. Measuring is done elsewhere.
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
    delegate: str = ""  # its name in the settings
    p50_us: int = 0
    p95_us: int = 0
    memory: int = 0  # bytes that loading and running took
    golden: int = 0  # samples that agreed
    error: str = ""
    refused: str = ""  # why a delegate that works is not used
    mark: str = ""  # which library and options were measured; another mark is another delegate


def weigh(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """Return the rungs, those refused whose delegate works and is not worth it."""
    without = [rung for rung in rungs if not rung.error and not rung.delegate]
    fastest = min(without, key=lambda rung: rung.p50_us, default=None)
    return tuple(_weighed(rung, fastest) for rung in rungs)


def choose(rungs: Sequence[Rung]) -> Rung | None:
    """Return the fastest rung, or one with fewer threads that is nearly as fast; None when none works."""
    working = [rung for rung in weigh(rungs) if not rung.error and not rung.refused]
    if not working:
        return None
    limit = min(rung.p50_us for rung in working) * (1 + WITHIN)
    return min((rung for rung in working if rung.p50_us <= limit), key=lambda rung: (rung.threads, rung.p50_us))


def name(rung: Rung) -> str:
    """Return a rung's name for people: ``litert x 2``."""
    kernels = f" ({rung.kernels} kernels)" if rung.kernels else ""
    delegate = f" + {rung.delegate}" if rung.delegate else ""
    return f"{rung.runtime.value} x {rung.threads}{kernels}{delegate}"


def summary(rungs: Sequence[Rung]) -> str:
    """Return all that was measured, best first, in one line: the table that the fleet is told."""
    ordered = sorted(weigh(rungs), key=lambda rung: (bool(rung.error or rung.refused), rung.p50_us))
    return ", ".join(_told(rung) for rung in ordered)


def _told(rung: Rung) -> str:
    if rung.error or rung.refused:
        return f"{name(rung)} not: {rung.error or rung.refused}"
    return f"{name(rung)} {rung.p50_us} us (p95 {rung.p95_us}, {rung.memory / 2**20:.1f} MiB)"


def _weighed(rung: Rung, fastest: Rung | None) -> Rung:
    if rung.error or rung.refused or not rung.delegate:
        return rung
    refused = _objection(rung, fastest)
    return msgspec.structs.replace(rung, refused=refused) if refused else rung


def _objection(rung: Rung, fastest: Rung | None) -> str:
    if not rung.golden:
        return "the model has no golden samples to check it with"
    if fastest is None:
        return "nothing works without it, so there is nothing to compare it with"
    if rung.p50_us > fastest.p50_us * (1 - WITHIN):
        return f"not faster than {name(fastest)} with {fastest.p50_us} us"
    return ""
