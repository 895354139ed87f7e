"""Parts that the tests of pipelines share: a running pipeline on a real model, and waiting for what must happen."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from inference_parts import engine, servable

from agent.core.pipelines import PipelineSettings
from agent.core.retry import BackOff
from agent.inference.engine import Engine
from agent.inference.pipelines.building import build
from agent.inference.pipelines.pipeline import Pipeline

QUICK = BackOff(first=0.02, ceiling=0.1)
IMAGES = np.arange(64, dtype=np.int8)


def eventually(question: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def settings(source: dict, *sinks: dict, **more: object) -> PipelineSettings:
    """Return settings as they would stand in agent.toml."""
    plain = {"name": "door", "model": "digits", "policy": "every", "source": source, "sink": list(sinks), **more}
    return msgspec.convert(plain, PipelineSettings)


@contextmanager
def serving(folder: Path, **limits: object) -> Iterator[Engine]:
    one = engine(**limits)
    one.serve(servable(folder, "v1", 1))
    try:
        yield one
    finally:
        one.close()


def quick(pipeline: Pipeline) -> Pipeline:
    """Make a pipeline try again at once."""
    pipeline._back_off = QUICK
    for delivery in pipeline.deliveries:
        delivery._back_off = QUICK
    return pipeline


@contextmanager
def running(folder: Path, source: dict, *sinks: dict, **more: object) -> Iterator[Pipeline]:
    """A pipeline that asks the digits model."""
    folder.mkdir(exist_ok=True)
    with serving(folder) as one:
        pipeline = quick(build(settings(source, *sinks, **more), one))
        pipeline.start()
        try:
            yield pipeline
        finally:
            pipeline.finish()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
