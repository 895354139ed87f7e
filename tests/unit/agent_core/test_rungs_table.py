"""Which rung a model runs on."""

import pytest

from agent.core.rungs import Rung, choose, name
from protocol.states import RuntimeName

L, T = RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME


def rung(runtime: RuntimeName, threads: int, p50: int, error: str = "") -> Rung:
    return Rung(runtime=runtime, threads=threads, p50_us=p50, error=error)


@pytest.mark.parametrize(
    ("rungs", "chosen"),
    [
        pytest.param([], None, id="nothing-measured"),
        pytest.param([rung(L, 1, 0, "golden")], None, id="nothing-works"),
        pytest.param([rung(L, 1, 100), rung(L, 2, 60)], "litert x 2", id="the-fastest"),
        pytest.param([rung(L, 1, 105), rung(L, 2, 100)], "litert x 1", id="fewer-threads-within-5-percent"),
        pytest.param([rung(L, 1, 106), rung(L, 2, 100)], "litert x 2", id="not-beyond-5-percent"),
        pytest.param([rung(L, 1, 100), rung(T, 1, 98)], "tflite-runtime x 1", id="equal-threads-the-faster"),
        pytest.param([rung(L, 1, 10, "it died"), rung(T, 1, 98)], "tflite-runtime x 1", id="only-what-works"),
    ],
)
def test_the_rung_is_chosen(rungs: list[Rung], chosen: str | None) -> None:
    best = choose(rungs)
    assert chosen == (name(best) if best else None)
