"""Priority and timeout of a request, from its JSON to its refusal and the counters."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from inference_parts import IMAGE, engine, servable

from agent.inference.describe import prometheus
from agent.inference.engine import Engine
from agent.inference.generation import ModelFailed, TooLate, Urgency
from agent.inference.parsing import Head, HttpError
from agent.inference.pool import DEFAULT_PRIORITY, LOWEST
from agent.inference.reading import decode_call
from agent.inference.routes import Routes
from agent.inference.tensors import NotARequest


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Engine]:
    one = engine()
    one.serve(servable(tmp_path, "v2", 2))
    yield one
    one.close()


def body(**parameters: object) -> memoryview:
    inputs = [{"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "data": [0] * 64}]
    return memoryview(json.dumps({"inputs": inputs, "parameters": parameters}).encode())


def ask(engine_: Engine, **parameters: object) -> int:
    head = Head(method="POST", path=("v2", "models", "digits", "infer"), keep_alive=True)
    routes = Routes(engine_, managed=True, body_cap=10**6)
    return routes.plan(head, over_tcp=False).answer(body(**parameters)).status


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        pytest.param({}, (0, 0), id="nothing"),
        pytest.param({"priority": 1, "timeout": 5000}, (1, 5000), id="both"),
        pytest.param({"priority": 10**18}, (10**18, 0), id="far-below-the-lowest"),
    ],
)
def test_priority_and_timeout_are_read(serving: Engine, parameters: dict, expected: tuple[int, int]) -> None:
    call = decode_call(body(**parameters), None, serving.find("digits").signature)
    assert expected == (call.priority, call.timeout_us)


@pytest.mark.parametrize("wrong", [-1, 1.5, "1", True, None])
@pytest.mark.parametrize("name", ["priority", "timeout"])
def test_what_is_no_whole_number_is_refused(serving: Engine, name: str, wrong: object) -> None:
    with pytest.raises(NotARequest, match=f"parameter {name} is a whole number"):
        decode_call(body(**{name: wrong}), None, serving.find("digits").signature)


@pytest.mark.parametrize(
    ("asked", "used"), [(0, DEFAULT_PRIORITY), (1, 1), (7, 7), (LOWEST, LOWEST), (LOWEST + 1, LOWEST)]
)
def test_0_is_the_default_and_nothing_is_below_the_lowest(
    serving: Engine, monkeypatch: pytest.MonkeyPatch, asked: int, used: int
) -> None:
    seen: list[Urgency] = []
    found = serving.find("digits")
    monkeypatch.setattr(found, "run", lambda _id, _inputs, urgency: seen.append(urgency) or [bytes(10)])
    assert ask(serving, priority=asked) == 200
    assert [Urgency(used, None)] == seen


def test_a_deadline_that_passes_while_waiting_is_503_and_counted_as_dropped_and_late(serving: Engine) -> None:
    found = serving.find("digits")
    held = found.pool.lease()
    with pytest.raises(HttpError) as refused:
        ask(serving, timeout=20_000)
    found.pool.give_back(held)
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
    assert "deadline" in refused.value.message
    totals = found.counters.totals()
    assert (totals.rejected, totals.late, totals.success) == (1, 1, 0)
    assert 'edgewarden_deadline_missed{model="digits",version="2"} 1' in prometheus(serving)
    (taken,) = serving.statistics.take_delta()
    assert (taken.requests, taken.dropped, taken.late, taken.shed) == (0, 1, 1, 0)


def test_what_is_shed_in_distress_is_counted_as_dropped_and_shed(serving: Engine) -> None:
    found = serving.find("digits")
    found.pool.restrict(lowest=5)
    with pytest.raises(HttpError, match="distress"):
        ask(serving, priority=9)
    assert 'edgewarden_shed{model="digits",version="2"} 1' in prometheus(serving)
    (taken,) = serving.statistics.take_delta()
    assert (taken.requests, taken.dropped, taken.late, taken.shed) == (0, 1, 0, 1)


def test_an_answer_that_is_ready_too_late_is_never_given(serving: Engine) -> None:
    found = serving.find("digits")
    slow = found.pool.lease()
    invoke = slow._interpreter.invoke

    class Slow:
        def invoke(self) -> None:
            time.sleep(0.05)
            invoke()

        def __getattr__(self, name: str) -> object:
            return getattr(slow._interpreter, name)

    real, slow._interpreter = slow._interpreter, Slow()
    found.pool.give_back(slow)
    with pytest.raises(TooLate, match="only after the deadline"):
        found.run("r1", (IMAGE,), Urgency(deadline=time.perf_counter_ns() + 10_000_000))
    assert found.run("r2", (IMAGE,), Urgency(deadline=time.perf_counter_ns() + 10_000_000_000))
    slow._interpreter = real
    assert (found.counters.totals().late, found.counters.totals().success) == (1, 1)


def test_scores_that_cannot_be_read_are_the_models_failure(serving: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = serving.find("digits")
    monkeypatch.setattr(found._predictor, "predict", lambda _: 1 / 0)
    with pytest.raises(ModelFailed, match="division"):
        found.run("r1", (IMAGE,))
    assert found.counters.totals().failure == 1
    assert found.waiting == 0
