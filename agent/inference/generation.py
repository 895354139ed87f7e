"""One generation of a model: a loaded bundle with its interpreters, from warm to drained.

A connection's thread leases an interpreter, copies the request's bytes in once, runs it, counts the request and puts
the interpreter back, so nothing is handed from thread to thread; whoever finds none waits, and only so many may wait.
Which generation serves under a name is the engine's business.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from agent.inference.loading import Servable
from agent.inference.prediction import Prediction, Predictor
from agent.inference.statistics import Counters, Timing
from agent.inference.tensors import Buffer, Signature
from agent.inference.truth import TruthRing
from runtime.interpreter import LoadedModel

log = logging.getLogger(__name__)

QUEUE_LIMIT = 64  # requests waiting or running, per model
WAIT_SECONDS = 30.0  # how long a request waits for an interpreter
RETIRE_SECONDS = 30.0  # how long a swap waits for the old generation's last requests
_SMOOTHING = 0.1  # weight of the newest service time in the moving average


class Retired(Exception):
    """This generation takes no more requests; another may serve under the name."""


class QueueFull(Exception):
    """Too many requests are waiting. ``retry_after``: seconds until the queue should have room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        """Say how many are waiting."""
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after = retry_after


class ModelFailed(Exception):
    """The runtime gave up on these values, or no interpreter came free in time."""


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
    ) -> None:
        """Take over loaded models; each is one interpreter."""
        self.servable = servable
        self.signature = signature
        self.counters = counters
        self.runtime = models[0].runtime
        self.interpreters = len(models)
        self._truth = truth
        self._now_ms = now_ms
        self._queue_limit = queue_limit
        self._wait_seconds = wait_seconds
        self._predictor = Predictor(models[0].outputs[0], servable.calibrator) if servable.classes else None
        self._idle: SimpleQueue[LoadedModel] = SimpleQueue()
        for model in models:
            self._idle.put(model)
        self._gate = threading.Lock()
        self._waiting = 0
        self._retired = False
        self._service_ns = 0.0  # moving average

    @property
    def waiting(self) -> int:
        """Return how many requests wait or run."""
        return self._waiting

    def run(self, request_id: str, inputs: Sequence[Buffer]) -> list[bytes]:
        """Return the bytes of every output; raise `Retired`, `QueueFull` or `ModelFailed`."""
        queued = time.perf_counter_ns()
        self._enter()
        try:
            model = self._lease()
            try:
                return self._perform(model, request_id, inputs, queued)
            finally:
                self._idle.put(model)
        finally:
            self._leave()

    def misfit(self) -> None:
        """Count a request whose tensors do not fit: a new version that broke its clients must show."""
        self.counters.failed(self._now_ms())

    def retire(self) -> None:
        """Take no more requests, wait for those that were taken, free the interpreters."""
        with self._gate:
            self._retired = True
        deadline = time.monotonic() + RETIRE_SECONDS
        while self._waiting and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for _ in range(self.interpreters):
            try:
                self._idle.get_nowait().close()
            except Empty:
                log.error("%s %d still runs a request; its memory stays taken", *self._name)

    @property
    def _name(self) -> tuple[str, int]:
        return self.servable.model, self.servable.version

    # ------------------------------------------------------------ waiting
    def _enter(self) -> None:
        with self._gate:
            if self._retired:
                raise Retired
            if self._waiting >= self._queue_limit:
                self.counters.dropped()
                raise QueueFull(self._waiting, self._retry_after())
            self._waiting += 1

    def _leave(self) -> None:
        with self._gate:
            self._waiting -= 1

    def _retry_after(self) -> int:
        return max(1, math.ceil(self._waiting * self._service_ns / self.interpreters / 1e9))

    def _lease(self) -> LoadedModel:
        try:
            return self._idle.get(timeout=self._wait_seconds)
        except Empty:
            self.counters.failed(self._now_ms())
            raise ModelFailed(f"no interpreter came free within {self._wait_seconds:g} s") from None

    # ------------------------------------------------------------ running
    def _perform(self, model: LoadedModel, request_id: str, inputs: Sequence[Buffer], queued: int) -> list[bytes]:
        started = time.perf_counter_ns()
        try:
            for index, data in enumerate(inputs):
                model.fill(index, data)
            filled = time.perf_counter_ns()
            model.invoke()
            invoked = time.perf_counter_ns()
            outputs = [model.read(index) for index in range(len(model.outputs))]
            prediction = self._predictor.predict(outputs[0]) if self._predictor else None
        except Exception as error:  # whatever a model does, its interpreter goes on
            self.counters.failed(self._now_ms(), time.perf_counter_ns() - started)
            raise ModelFailed(str(error) or type(error).__name__) from error
        ended = time.perf_counter_ns()
        self._service_ns += _SMOOTHING * (ended - started - self._service_ns)
        timing = Timing(started - queued, filled - started, invoked - filled, ended - invoked)
        self._count(request_id, timing, prediction)
        return outputs

    def _count(self, request_id: str, timing: Timing, prediction: Prediction | None) -> None:
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
