"""One generation of a model: a loaded bundle with its interpreters, from warm to drained.

A connection's thread leases an interpreter, copies the request's bytes in once, runs it, gives the interpreter back
and counts the request, so nothing is handed from thread to thread. Who may go first, and who has to wait or leave,
is decided in `pool`; which generation serves under a name is the engine's business.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from agent.inference.loading import Servable
from agent.inference.pool import (
    DEFAULT_PRIORITY,
    LOWEST,
    NORMAL,
    QUEUE_LIMIT,
    NoneFree,
    Pool,
    QueueFull,
    Retired,
    Shed,
    TooLate,
    TurnedAway,
    Urgency,
    is_past,
)
from agent.inference.prediction import Prediction, Predictor
from agent.inference.shadow import Shadow
from agent.inference.statistics import Counters, Timing
from agent.inference.tensors import Buffer, Signature
from agent.inference.truth import TruthRing
from agent.inference.watchdog import Watchdog
from runtime.interpreter import LoadedModel

log = logging.getLogger(__name__)

WAIT_SECONDS = 30.0  # how long a request waits for an interpreter
RETIRE_SECONDS = 30.0  # how long a swap waits for the old generation's last requests


class ModelFailed(Exception):
    """The runtime gave up on these values, or no interpreter came free in time."""


class Tap(Protocol):
    """Looks at requests that were answered."""

    def offer(self, found: "Generation", request_id: str, inputs: Sequence[Buffer], outputs: Sequence[bytes]) -> bool:
        """Take a look, at once, and tell whether it is kept; never raises. The inputs are overwritten afterwards."""

    def disagreed(
        self, found: "Generation", request_id: str, inputs: Sequence[Buffer], outputs: Sequence[bytes]
    ) -> None:
        """Look again at a request that was not kept: the candidate answered otherwise. Never raises."""


class Taps:
    """Who looks. Shared by the generations of an engine, so that it may change while they serve."""

    capture: Tap | None = None


class _Run(NamedTuple):
    """What one run of an interpreter gave, and when its steps ended (ns)."""

    outputs: list[bytes]
    started: int
    filled: int
    invoked: int
    read: int


class Generation:
    """A loaded bundle that answers requests, from any thread."""

    def __init__(
        self,
        servable: Servable,
        models: Sequence[LoadedModel],
        signature: Signature,
        *,
        counters: Counters,
        truth: TruthRing,
        now_ms: Callable[[], int],
        queue_limit: int = QUEUE_LIMIT,
        wait_seconds: float = WAIT_SECONDS,
        watchdog: Watchdog | None = None,
        taps: Taps | None = None,
        threads: int = 1,
        delegate: str = "",
    ) -> None:
        """Take over loaded models; each is one interpreter and was loaded with so many threads, on this delegate."""
        self.servable = servable
        self.signature = signature
        self.counters = counters
        self.runtime = models[0].runtime
        self.interpreters = len(models)
        self.threads = threads
        self.delegate = delegate
        self.pool = Pool(models, queue_limit)
        self._truth = truth
        self._now_ms = now_ms
        self._wait_seconds = wait_seconds
        self._watchdog = watchdog or Watchdog()
        self._taps = taps or Taps()
        self.shadow: Shadow | None = None  # compares a candidate with what is answered here
        self._predictor = Predictor(models[0].outputs[0], servable.calibrator) if servable.classes else None

    @property
    def waiting(self) -> int:
        """Return how many requests wait or run."""
        return self.pool.waiting

    def run(self, request_id: str, inputs: Sequence[Buffer], urgency: Urgency = NORMAL) -> list[bytes]:
        """Return the bytes of every output; raise `Retired`, `TurnedAway` or `ModelFailed`."""
        queued = time.perf_counter_ns()
        model = self._lease(urgency)
        run = self._run_and_return(model, inputs)
        if is_past(urgency):
            self.counters.dropped(late=True)
            raise TooLate("the answer was ready only after the deadline")
        prediction = self._predict(run.outputs)
        self._count(request_id, run, prediction, queued)
        tap, shadow = self._taps.capture, self.shadow
        kept = tap is not None and tap.offer(self, request_id, inputs, run.outputs)
        if shadow is not None and prediction is not None:
            shadow.offer(inputs, prediction, request_id, () if kept else run.outputs)
        return run.outputs

    def disagreed(self, request_id: str, inputs: Sequence[Buffer], outputs: Sequence[bytes]) -> None:
        """Hear that the candidate answered a request otherwise than it was answered here."""
        if self._taps.capture is not None:
            self._taps.capture.disagreed(self, request_id, inputs, outputs)

    def rehearse(self, inputs: Sequence[Buffer]) -> tuple[Prediction, int]:
        """Answer a classifier's request that nobody asked: last in line, not counted. Returns the time in ns too."""
        model = self.pool.lease(Urgency(LOWEST), self._wait_seconds)
        try:
            run = self._perform(model, inputs, time.perf_counter_ns())
        finally:
            self.pool.give_back(model)
        assert self._predictor is not None  # only classifiers are compared
        return self._predictor.predict(run.outputs[0]), run.read - run.started

    @contextmanager
    def borrow(self) -> Iterator[LoadedModel]:
        """Lend an interpreter to the device's own ends: last in line, watched, not counted.

        Raises what `Pool.lease` raises.
        """
        model = self.pool.lease(Urgency(LOWEST), self._wait_seconds)
        self._watchdog.begin(model, self.servable)
        try:
            yield model
        finally:
            self._watchdog.end(model)
            self.pool.give_back(model)

    def misfit(self) -> None:
        """Count a request whose tensors do not fit: a new version that broke its clients must show."""
        self.counters.failed(self._now_ms())

    def retire(self) -> None:
        """Take no more requests, wait for those that were taken, free the interpreters."""
        self.pool.retire()
        deadline = time.monotonic() + RETIRE_SECONDS
        while self.pool.waiting and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        free = self.pool.empty()
        for model in free:
            model.close()
        if len(free) < self.interpreters:
            log.error(
                "%s %d still runs a request; its memory stays taken", self.servable.model, self.servable.version
            )

    # ------------------------------------------------------------ waiting
    def _lease(self, urgency: Urgency) -> LoadedModel:
        try:
            return self.pool.lease(urgency, self._wait_seconds)
        except TurnedAway as refusal:
            self.counters.dropped(late=isinstance(refusal, TooLate), shed=isinstance(refusal, Shed))
            raise
        except NoneFree:
            if urgency.priority > DEFAULT_PRIORITY:  # it let others go first, which is no fault of the model
                self.counters.dropped(late=True)
                raise TooLate(f"more urgent requests took all of {self._wait_seconds:g} s") from None
            self.counters.failed(self._now_ms())
            raise ModelFailed(f"no interpreter came free within {self._wait_seconds:g} s") from None

    # ------------------------------------------------------------ running
    def _run_and_return(self, model: LoadedModel, inputs: Sequence[Buffer]) -> _Run:
        """Run a leased interpreter and give it back; raise `ModelFailed`."""
        started, took = time.perf_counter_ns(), 0
        try:
            run = self._perform(model, inputs, started)
            took = run.read - started
        except Exception as error:  # whatever a model does, its interpreter goes on
            self.counters.failed(self._now_ms(), time.perf_counter_ns() - started)
            raise ModelFailed(str(error) or type(error).__name__) from error
        finally:
            self.pool.give_back(model, took)
        return run

    def _perform(self, model: LoadedModel, inputs: Sequence[Buffer], started: int) -> _Run:
        for index, data in enumerate(inputs):
            model.fill(index, data)
        filled = time.perf_counter_ns()
        self._watchdog.begin(model, self.servable)
        try:
            model.invoke()
        finally:
            self._watchdog.end(model)
        invoked = time.perf_counter_ns()
        outputs = [model.read(index) for index in range(len(model.outputs))]
        return _Run(outputs, started, filled, invoked, time.perf_counter_ns())

    def _predict(self, outputs: Sequence[bytes]) -> Prediction | None:
        try:
            return self._predictor.predict(outputs[0]) if self._predictor else None
        except Exception as error:  # scores that are no numbers are the model's failure
            self.counters.failed(self._now_ms())
            raise ModelFailed(str(error) or type(error).__name__) from error

    def _count(self, request_id: str, run: _Run, prediction: Prediction | None, queued: int) -> None:
        ended = time.perf_counter_ns()
        timing = Timing(run.started - queued, run.filled - run.started, run.invoked - run.filled, ended - run.invoked)
        now = self._now_ms()
        self.counters.succeeded(timing, prediction, now)
        if prediction is not None:
            self._truth.remember(
                self.servable.model,
                request_id,
                digest=self.counters.short_digest,
                now_ms=now,
                predicted=prediction.label,
            )


_POLL_SECONDS = 0.001  # a swap's wait; a condition would cost every request a notification

__all__ = [
    "NORMAL",
    "QUEUE_LIMIT",
    "Generation",
    "ModelFailed",
    "QueueFull",
    "Retired",
    "Shed",
    "Tap",
    "Taps",
    "TooLate",
    "TurnedAway",
    "Urgency",
]
