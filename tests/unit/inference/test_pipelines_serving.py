"""A pipeline among other clients, on every runtime: swaps lose none of its frames, and it lets others go first."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from inference_parts import IMAGE, servable
from pipelines_parts import eventually, lines, quick, serving, settings

from agent.inference.engine import Engine
from agent.inference.generation import Generation
from agent.inference.loading import Settings
from agent.inference.pipelines.building import build
from agent.inference.pipelines.children import ready_frame
from agent.inference.pipelines.pipeline import Pipeline
from runtime.interpreter import available

RUNTIMES = [one.value for one in available()]


@pytest.fixture(params=RUNTIMES)
def on(request: pytest.FixtureRequest) -> Settings:
    """The settings of an engine on one runtime."""
    return Settings(runtime=request.param)


@contextmanager
def asking(one: Engine, *sinks: dict, **more: object) -> Iterator[Pipeline]:
    pipeline = quick(build(settings({"kind": "http"}, *sinks, **more), one))
    pipeline.start()
    try:
        yield pipeline
    finally:
        pipeline.finish()


def push(pipeline: Pipeline, name: str = "pushed") -> None:
    eventually(lambda: pipeline.offer(ready_frame(name, IMAGE)))


def unhappy(pipeline: Pipeline) -> tuple[int, ...]:
    return (pipeline.bad, pipeline.failed, pipeline.refused, pipeline.mailbox.dropped)


FRAMES = {
    "raw": ({"kind": "raw"}, IMAGE),
    "json": ({"kind": "json", "values": "tensor"}, b"[" + b"0," * 63 + b"0]"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_is_answered_on_this_runtime(tmp_path: Path, on: Settings, kind: str) -> None:
    how, frame = FRAMES[kind]
    outlet = {"kind": "file", "path": str(tmp_path / "out")}
    with serving(tmp_path, settings=on) as one, asking(one, outlet, preprocess=how, outputs=True) as pipeline:
        assert on.runtime == one.find("digits").runtime.value
        pipeline.offer(ready_frame("one", frame))
        eventually(lambda: pipeline.deliveries[0].delivered == 1)
    (line,) = lines(tmp_path / "out")
    scores = line["outputs"]["scores"]
    assert scores.index(max(scores)) == line["class"]


ROOM = {"new beside old": lambda: None, "old goes first": lambda: 0}  # bytes of memory that are left


@pytest.mark.parametrize("case", ROOM)
def test_swaps_one_after_another_lose_no_frame(tmp_path: Path, on: Settings, case: str) -> None:
    versions = [servable(tmp_path, example, version) for example, version in (("v2", 2), ("v1", 3), ("v2", 4))]
    with (
        serving(tmp_path, settings=on, memory_available=ROOM[case]) as one,
        asking(one, {"kind": "file", "path": str(tmp_path / "out")}) as pipeline,
    ):
        over = threading.Event()
        feeding = threading.Thread(target=_feed, args=(pipeline, over))
        feeding.start()
        try:
            for number, version in enumerate(versions, start=1):
                before = pipeline.answered
                eventually(lambda before=before: pipeline.answered > before)
                assert (case == "old goes first") == one.serve(version).stop_start, number
        finally:
            over.set()
            feeding.join()
        eventually(lambda: pipeline.answered == pipeline.frames)
        eventually(lambda: pipeline.deliveries[0].delivered == pipeline.frames)
        assert (0, 0, 0, 0) == unhappy(pipeline)
        assert pipeline.answered == sum(one_.totals().success for one_ in one.statistics.all())
    assert {1, 2, 3, 4} >= {line["version"] for line in lines(tmp_path / "out")} >= {1, 2, 3}


def _feed(pipeline: Pipeline, over: threading.Event) -> None:
    while not over.is_set():
        pipeline.offer(ready_frame("fed", IMAGE))
        over.wait(0.001)


@contextmanager
def busy(found: Generation) -> Iterator[None]:
    """Hold the only interpreter, as a long request does."""
    held = found.pool.lease()
    try:
        yield
    finally:
        found.pool.give_back(held)


ORDER = {
    "by itself a pipeline lets a client go first": ({}, ["client", "pipeline"]),
    "a pipeline that is urgent goes first": ({"priority": 1}, ["pipeline", "client"]),
}


@pytest.mark.parametrize("case", ORDER)
def test_who_goes_first_is_a_matter_of_priority(tmp_path: Path, on: Settings, case: str) -> None:
    more, expected = ORDER[case]
    answered: list[str] = []
    with serving(tmp_path, settings=on) as one, asking(one, **more) as pipeline:
        found = one.find("digits")
        one.tap(Order(answered))
        client = threading.Thread(target=lambda: found.run("client", [IMAGE]))
        with busy(found):
            push(pipeline)
            eventually(lambda: found.waiting == 2)
            client.start()
            eventually(lambda: found.waiting == 3)
        client.join()
        eventually(lambda: len(answered) == 2)
    assert expected == answered


class Order:
    """Implements `generation.Tap`: notes who was answered."""

    def __init__(self, answered: list[str]) -> None:
        self._answered = answered

    def offer(self, found: Generation, request_id: str, inputs: object, outputs: object) -> None:
        self._answered.append(request_id if request_id == "client" else "pipeline")


def test_a_frame_that_was_pushed_out_of_a_full_line_is_asked_again(tmp_path: Path, on: Settings) -> None:
    with serving(tmp_path, settings=on, queue_limit=2) as one, asking(one, policy="every") as pipeline:
        found = one.find("digits")
        client = threading.Thread(target=lambda: found.run("client", [IMAGE]))
        with busy(found):
            push(pipeline)
            eventually(lambda: found.waiting == 2)
            client.start()  # more urgent: it takes the place
            eventually(lambda: pipeline.refused >= 1)
        client.join()
        eventually(lambda: pipeline.answered == 1)
        assert (0, 0) == (pipeline.bad, pipeline.failed)


def test_a_frame_that_always_has_to_wait_is_refused_and_no_failure_of_the_model(tmp_path: Path, on: Settings) -> None:
    with serving(tmp_path, settings=on, wait_seconds=0.05) as one, asking(one, policy="every") as pipeline:
        found = one.find("digits")
        with busy(found):
            push(pipeline)
            eventually(lambda: pipeline.refused >= 1)
            assert "more urgent requests took all of 0.05 s" in pipeline.error
        eventually(lambda: pipeline.answered == 1)
        totals = found.counters.totals()
        assert (1, 0, 0) == (totals.success, totals.failure, pipeline.failed)
