"""From a pipeline's settings to its running parts. Libraries are imported only when a pipeline needs them."""

import random
import time
from collections.abc import Callable
from functools import partial

from agent.core.pipelines import (
    CameraSource,
    DirectorySource,
    ExecSink,
    ExecSource,
    FileSink,
    HttpSource,
    IntervalSource,
    MqttSink,
    MqttSource,
    PipelineSettings,
    WebhookSink,
)
from agent.core.pipelines import Sink as SinkSettings
from agent.core.pipelines import Source as SourceSettings
from agent.inference.engine import Engine
from agent.inference.generation import Urgency
from agent.inference.pipelines.asking import Asker
from agent.inference.pipelines.children import ExecDelivery, ExecFrames
from agent.inference.pipelines.delivery import Delivery
from agent.inference.pipelines.directory import DirectoryFrames
from agent.inference.pipelines.file_lines import FileDelivery
from agent.inference.pipelines.flow import Feed, Sink, SinkFailed, Source, SourceFailed
from agent.inference.pipelines.pipeline import Pipeline


def build(settings: PipelineSettings, engine: Engine) -> Pipeline:
    """Return a pipeline that has not started."""
    asker = Asker(
        engine,
        pipeline=settings.name,
        model=settings.model,
        how=settings.preprocess,
        outputs=settings.outputs,
        urgency=Urgency(settings.priority),
        now_ms=lambda: time.time_ns() // 1_000_000,
    )
    deliveries = [
        Delivery(str(sink.__struct_config__.tag), Late(partial(_sink, sink)), queue=sink.queue, random=random.random)
        for sink in settings.sinks
    ]
    source = LateSource(partial(_source, settings.source, settings.max_frame))
    return Pipeline(settings, source, asker, deliveries, random=random.random)


class Waiting:
    """Implements `flow.Source` for frames that local programs send: there is nothing to fetch."""

    def run(self, feed: Feed) -> None:
        """Wait for the end."""
        feed.up()
        feed.stop.wait()


class LateSource:
    """Implements `flow.Source`: makes the real one when it is first run, so that a missing library is its failure."""

    def __init__(self, make: Callable[[], Source]) -> None:
        """``make`` may raise ImportError."""
        self._make = make
        self._made: Source | None = None

    def run(self, feed: Feed) -> None:
        """Run the real one."""
        try:
            self._made = self._made or self._make()
        except ImportError as error:
            raise SourceFailed(f"a library is missing: {error}; install edgewarden[agent]") from error
        self._made.run(feed)


class Late:
    """Implements `flow.Sink`: makes the real one with the first result."""

    def __init__(self, make: Callable[[], Sink]) -> None:
        """``make`` may raise ImportError."""
        self._make = make
        self._made: Sink | None = None

    def deliver(self, record: bytes) -> None:
        """Deliver with the real one."""
        try:
            self._made = self._made or self._make()
        except ImportError as error:
            raise SinkFailed(f"a library is missing: {error}; install edgewarden[agent]") from error
        self._made.deliver(record)

    def close(self) -> None:
        """Close the real one, if there is one."""
        if self._made is not None:
            self._made.close()


def _source(settings: SourceSettings, cap: int) -> Source:
    match settings:
        case DirectorySource():
            return DirectoryFrames(settings, cap)
        case ExecSource():
            return ExecFrames(settings, cap)
        case HttpSource():
            return Waiting()
        case MqttSource():
            from agent.inference.pipelines.mqtt import MqttFrames

            return MqttFrames(settings, cap)
        case CameraSource():
            from agent.inference.pipelines.camera import CameraFrames

            return CameraFrames(settings)
        case IntervalSource():
            from agent.inference.pipelines.interval import IntervalFrames

            return IntervalFrames(settings, cap)


def _sink(settings: SinkSettings) -> Sink:
    match settings:
        case FileSink():
            return FileDelivery(settings)
        case ExecSink():
            return ExecDelivery(settings)
        case MqttSink():
            from agent.inference.pipelines.mqtt import MqttDelivery

            return MqttDelivery(settings)
        case WebhookSink():
            from agent.inference.pipelines.webhook import WebhookDelivery

            return WebhookDelivery(settings)
