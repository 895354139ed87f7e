"""One pipeline: a thread that fetches frames, a thread that asks the model, and a delivery per sink.

Nothing here reaches into the engine but a request like any client's. A source that fails is started again with
growing pauses; a frame that cannot be used is counted and the next one taken; a model that is not served is waited
for.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from agent.core.pipelines import PipelineSettings
from agent.core.retry import BackOff
from agent.inference.engine import UnknownModel
from agent.inference.generation import ModelFailed
from agent.inference.pipelines.asking import Asker
from agent.inference.pipelines.delivery import Delivery
from agent.inference.pipelines.flow import (
    BadFrame,
    Data,
    Frame,
    Health,
    Mailbox,
    Outcome,
    Source,
    SourceFailed,
)
from agent.inference.pool import TurnedAway
from agent.inference.tensors import BadTensor

log = logging.getLogger(__name__)

BACK_OFF = BackOff(first=1.0, ceiling=60.0)
HEALTHY_SECONDS = 60.0  # a source that ran this long owes nothing to earlier failures
MODEL_SECONDS = 0.5  # between two looks for a model that is not served
BUSY_SECONDS = 1.0  # the longest pause before a busy model is asked again
TICK = 0.25
STOP_SECONDS = 3.0

State = Literal["starting", "running", "waiting", "failing", "stopped"]


class Pipeline:
    """A running pipeline. `Feed` for its source."""

    def __init__(
        self,
        settings: PipelineSettings,
        source: Source,
        asker: Asker,
        deliveries: Sequence[Delivery],
        *,
        random: Callable[[], float],
        back_off: BackOff = BACK_OFF,
    ) -> None:
        """Start nothing yet."""
        self.settings = settings
        self.stop = threading.Event()
        self.health = Health()  # of the source
        self.mailbox = Mailbox(settings.queue, latest=settings.policy == "latest")
        self.deliveries = tuple(deliveries)
        self.frames = 0  # handed over by the source
        self.answered = 0
        self.bad = 0  # frames that could not be used
        self.refused = 0  # the model had no room for them
        self.failed = 0  # the model failed on them
        self.error = ""  # of the last frame that could not be used
        self.last_ms = 0  # UTC, of the last result
        self._source = source
        self._asker = asker
        self._random = random
        self._back_off = back_off
        self._missing = ""  # why the model cannot be asked
        self._threads: tuple[threading.Thread, ...] = ()

    # ------------------------------------------------------------ life
    def start(self) -> None:
        """Run in the background."""
        name = self.settings.name
        for number, delivery in enumerate(self.deliveries):
            delivery.start(f"{name}-sink-{number}")
        self._threads = tuple(
            threading.Thread(target=work, name=f"{name}-{what}", daemon=True)
            for work, what in ((self._fetch_all, "source"), (self._ask_all, "model"))
        )
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Stop fetching, then asking, then delivering; return when that is done or has taken too long."""
        self.stop.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        for delivery in self.deliveries:
            delivery.stop()

    @property
    def state(self) -> State:
        """Return how it is faring, in a word."""
        if self.stop.is_set():
            return "stopped"
        return "waiting" if self._missing else self.health.state

    def describe(self) -> dict[str, Any]:
        """Return what ``GET /v2/pipelines`` says of it."""
        source = self.settings.source.__struct_config__.tag
        return {
            "name": self.settings.name,
            "model": self.settings.model,
            "state": self.state,
            "error": self._missing or self._source_error() or self.error,
            "policy": self.settings.policy,
            "frames": self.frames,
            "answered": self.answered,
            "dropped": self.mailbox.dropped,
            "bad": self.bad,
            "refused": self.refused,
            "failed": self.failed,
            "waiting": len(self.mailbox),
            "last_result": self.last_ms,
            "source": {
                "kind": source,
                "state": self.health.state,
                "error": self.health.error,
                "restarts": self.health.restarts,
            },
            "sinks": [_describe(delivery) for delivery in self.deliveries],
        }

    def _source_error(self) -> str:
        return self.health.error if self.health.state == "failing" else ""

    # ------------------------------------------------------------ fetching: what a source is given
    def up(self) -> None:
        """The source works."""
        if self.health.state != "running":
            self.health.state = "running"

    def put(self, frame: Frame) -> bool:
        """Take a frame from the source; False when the pipeline stops."""
        self.frames += 1
        while not self.stop.is_set():
            if self.mailbox.put(frame, TICK):
                return True
        return False

    def offer(self, frame: Frame) -> bool:
        """Take a frame if there is room now."""
        if self.stop.is_set() or not self.mailbox.put(frame, 0.0):
            return False
        self.frames += 1
        return True

    def _fetch_all(self) -> None:
        while not self.stop.is_set():
            started = time.monotonic()
            try:
                self._source.run(self)
                continue
            except SourceFailed as error:
                self._note(str(error), started)
            except Exception as error:  # whatever a source does, its thread goes on
                log.exception("the source of pipeline %s met a fault of this agent", self.settings.name)
                self._note(f"{type(error).__name__}: {error}", started)
            self.stop.wait(self._pause())
            self.health.restarts += 1
        self.health.state = "stopped"

    def _note(self, error: str, started: float) -> None:
        if time.monotonic() - started >= HEALTHY_SECONDS:
            self.health.failures = 0
        self.health.failed(error)
        if self.health.failures == 1:
            log.warning("pipeline %s: %s", self.settings.name, error)

    def _pause(self) -> float:
        """Return the seconds until the next start: at least half of the interval, for sources fail locally."""
        interval = self._back_off.interval(self.health.failures)
        return interval * (0.5 + 0.5 * self._random())

    # ------------------------------------------------------------ asking
    def _ask_all(self) -> None:
        while not self.stop.is_set():
            if not self._model_serves():
                self.stop.wait(MODEL_SECONDS)
                continue
            frame = self.mailbox.take(TICK)
            if frame is None:
                self._asker.forget()
                continue
            self._settle(frame, self._use(frame))

    def _model_serves(self) -> bool:
        try:
            self._asker.find()
        except UnknownModel as error:
            self._missing = str(error)
            self._asker.forget()
            return False
        self._missing = ""
        return True

    def _use(self, frame: Frame) -> Outcome:
        try:
            return self._ask(frame.name, frame.read())
        except (BadFrame, BadTensor) as error:
            self.bad += 1
            self.error = f"{frame.name}: {error}"[:500]
            return Outcome.BAD
        except ModelFailed as error:
            self.failed += 1
            self.error = f"{frame.name}: {error}"[:500]
            return Outcome.BAD
        except Exception as error:  # one frame must not end the pipeline
            log.exception("a frame of pipeline %s met a fault of this agent", self.settings.name)
            self.bad += 1
            self.error = f"{frame.name}: {type(error).__name__}: {error}"[:500]
            return Outcome.BAD

    def _ask(self, name: str, data: Data) -> Outcome:
        """Ask until there is an answer; where only the latest frame counts, a busy model drops this one."""
        while True:
            try:
                record = self._asker.ask(name, data)
            except (TurnedAway, UnknownModel) as error:
                self.refused += 1
                self.error = f"{name}: {error}"[:500]
                if self.settings.policy == "latest" or self.stop.wait(BUSY_SECONDS):
                    return Outcome.DROPPED
                continue
            self.answered += 1
            self.last_ms = time.time_ns() // 1_000_000
            for delivery in self.deliveries:
                delivery.put(record)
            return Outcome.USED

    def _settle(self, frame: Frame, outcome: Outcome) -> None:
        try:
            frame.settle(outcome)
        except OSError as error:
            self.error = f"{frame.name}: cannot be put away: {error.strerror}"[:500]


def _describe(delivery: Delivery) -> dict[str, Any]:
    return {
        "kind": delivery.kind,
        "state": delivery.health.state,
        "error": delivery.health.error,
        "delivered": delivery.delivered,
        "dropped": delivery.dropped,
        "failures": delivery.failures,
        "waiting": delivery.waiting,
    }
