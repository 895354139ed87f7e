"""Runs the golden samples where a model serves: whether memory, driver and file still are what they were.

A sample at a time, last in line: requests of clients go first, and wait for one sample at most. What follows from
the outcome is control's business.
"""

from dataclasses import dataclass

from agent.inference.engine import Engine, UnknownModel
from agent.inference.generation import Generation
from agent.inference.pool import NoneFree, Retired, TurnedAway
from runtime.golden import GoldenMismatch, GoldenSamples, GoldenUnreadable, check_sample, load_golden


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a self-test found, and of which bundle."""

    passed: bool | None  # None: they could not be run now
    detail: str
    digest: str = ""


def self_test(engine: Engine, model: str) -> Outcome:
    """Run the golden samples of what is stable. Never raises for what a model or a client does."""
    try:
        found = engine.find(model)
    except UnknownModel as error:
        return Outcome(passed=None, detail=str(error))
    digest = found.servable.digest
    try:
        return Outcome(passed=True, detail=_run(found), digest=digest)
    except (NoneFree, Retired, TurnedAway) as error:
        return Outcome(passed=None, detail=str(error) or "no interpreter came free", digest=digest)
    except (GoldenMismatch, GoldenUnreadable, RuntimeError, ValueError, MemoryError) as error:
        return Outcome(passed=False, detail=str(error) or type(error).__name__, digest=digest)


def _run(found: Generation) -> str:
    golden = found.servable.golden
    if golden is None:
        return "the bundle has no golden samples"
    with found.borrow() as model:
        samples = load_golden(found.servable.path.parent / golden.member, model.inputs, model.outputs)
    for number in range(samples.count):
        _run_one(found, samples, number, golden.tolerance)
    return f"{samples.count} golden samples agree on {found.runtime.value}"


def _run_one(found: Generation, samples: GoldenSamples, number: int, tolerance: float) -> None:
    with found.borrow() as model:
        check_sample(model, samples, number, tolerance)
