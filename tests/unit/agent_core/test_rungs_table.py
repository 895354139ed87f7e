"""Which rung a model runs on."""

import pytest

from agent.core.rungs import Rung, choose, name, summary, weigh
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


def accelerated(p50: int, *, golden: int = 2, error: str = "") -> Rung:
    return Rung(runtime=L, threads=1, delegate="tpu", p50_us=p50, golden=golden, error=error)


@pytest.mark.parametrize(
    ("rungs", "refused", "chosen"),
    [
        pytest.param([accelerated(90), rung(L, 1, 100)], "", "litert x 1 + tpu", id="faster"),
        pytest.param(
            [accelerated(96), rung(L, 1, 100)],
            "not faster than litert x 1 with 100 us",
            "litert x 1",
            id="not-by-5-percent",
        ),
        pytest.param(
            [accelerated(90), rung(L, 1, 200), rung(T, 2, 80)],
            "not faster than tflite-runtime x 2 with 80 us",
            "tflite-runtime x 2",
            id="not-faster-than-the-best",
        ),
        pytest.param(
            [accelerated(1, golden=0), rung(L, 1, 100)],
            "the model has no golden samples to check it with",
            "litert x 1",
            id="nothing-to-check-it-with",
        ),
        pytest.param(
            [accelerated(1), rung(L, 1, 0, "it died")],
            "nothing works without it, so there is nothing to compare it with",
            None,
            id="nothing-to-compare-it-with",
        ),
        pytest.param([accelerated(1, error="it died"), rung(L, 1, 100)], "", "litert x 1", id="it-failed"),
    ],
)
def test_a_delegate_has_to_be_worth_it(rungs: list[Rung], refused: str, chosen: str | None) -> None:
    weighed = weigh(rungs)
    best = choose(weighed)
    assert (weighed[0].refused, name(best) if best else None) == (refused, chosen)
    assert weigh(weighed) == weighed


def test_the_fleet_is_told_the_whole_table_best_first() -> None:
    measured = [rung(T, 1, 0, "golden sample 3 differs"), rung(L, 1, 100), rung(L, 2, 60), accelerated(90)]
    assert (
        "litert x 2 60 us (p95 0, 0.0 MiB), litert x 1 100 us (p95 0, 0.0 MiB), "
        "tflite-runtime x 1 not: golden sample 3 differs, litert x 1 + tpu not: not faster than litert x 2 with 60 us"
    ) == summary(measured)
