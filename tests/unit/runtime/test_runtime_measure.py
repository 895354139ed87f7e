"""Latency by a given clock, and the memory of a real process."""

import subprocess
import sys
from pathlib import Path

import pytest

from protocol.states import RuntimeName
from runtime.interpreter import open_model
from runtime.measure import Latency, MemoryUse, growth, measure_latency, memory_use

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples" / "digits" / "v2" / "model.tflite"

both_runtimes = pytest.mark.parametrize("runtime", [name.value for name in RuntimeName])

READ_AFTER_ALLOCATING = """
from runtime.measure import growth, memory_use
before = memory_use()
block = bytearray(32 * 1024 * 1024)
middle = memory_use()
del block
print(growth(before, middle), growth(before, memory_use()))
"""


class ScriptedClock:
    """Each invoke takes the next duration of the script, in ns."""

    def __init__(self, durations: list[int]) -> None:
        self.readings = [time for duration in durations for time in (0, duration)]

    def __call__(self) -> int:
        return self.readings.pop(0)


@both_runtimes
def test_latency_is_median_and_95th_percentile_of_the_runs_after_warm_up(runtime: str) -> None:
    clock = ScriptedClock([n * 1000 for n in range(20, 0, -1)])
    with open_model(MODEL, runtime=runtime) as model:
        latency = measure_latency(model, clock, warm_up=3, runs=20)
    assert latency == Latency(median_us=10, p95_us=19, runs=20)
    assert clock.readings == []


def test_one_run_is_its_own_median_and_percentile() -> None:
    with open_model(MODEL) as model:
        assert measure_latency(model, ScriptedClock([7000]), warm_up=0, runs=1) == Latency(
            median_us=7, p95_us=7, runs=1
        )


def test_the_peak_of_a_fresh_process_is_its_own_and_stays_after_freeing() -> None:
    """This process first takes 100 MB, which a child must not inherit as its own peak."""
    ballast = bytearray(100 * 1024 * 1024)
    child = subprocess.run(
        [sys.executable, "-c", READ_AFTER_ALLOCATING], cwd=ROOT, capture_output=True, text=True, check=True
    )
    del ballast
    held, freed = (int(word) for word in child.stdout.split())
    assert 31 * 1024**2 <= held <= 40 * 1024**2
    assert freed >= 31 * 1024**2


def test_growth_is_the_larger_of_resident_and_reserved_and_never_negative() -> None:
    assert growth(MemoryUse(peak=10, data=10), MemoryUse(peak=15, data=30)) == 20
    assert growth(MemoryUse(peak=10, data=10), MemoryUse(peak=10, data=5)) == 0


def test_without_proc_the_resident_peak_stands_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_proc)
    use = memory_use()
    assert use.peak == use.data > 1024**2
