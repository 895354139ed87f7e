"""One generation of a model: a loaded bundle with its queue and its workers, from warm to drained.

Connections queue jobs and wait; each worker owns one interpreter, copies a job's bytes in once, runs it, counts it,
and hands the result bytes over. The queue is bounded. Which generation serves under a name is the engine's business.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from agent.inference.loading import Servable
from agent.inference.statistics import Counters, Prediction, Timing
from agent.inference.tensors import Buffer, Signature
from agent.inference.truth import TruthRing
from runtime.calibrator import probabilities, top_class
from runtime.interpreter import LoadedModel

log = logging.getLogger(__name__)

QUEUE_LIMIT = 64  # requests waiting or running, per model
ANSWER_SECONDS = 30.0  # how long a connection waits for its result
RETIRE_SECONDS = 30.0  # how long a swap waits for the old generation's last jobs
_SMOOTHING = 0.1  # weight of the newest service time in the moving average


class Retired(Exception):
    """This generation takes no more jobs; another may serve under the name."""


class QueueFull(Exception):
    """Too many requests are waiting. ``retry_after``: seconds until the queue should have room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        """Say how many are waiting."""
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after = retry_after


class ModelFailed(Exception):
    """The runtime gave up on these values, or did not answer in time."""


class _Job:
    """One request on its way through a worker."""

    __slots__ = ("done", "failure", "inputs", "outputs", "queued", "request_id")

    def __init__(self, request_id: str, inputs: Sequence[Buffer]) -> None:
        self.request_id = request_id
        self.inputs = inputs
        self.outputs: list[bytes] = []
        self.failure = ""
        self.queued = time.perf_counter_ns()
        self.done = threading.Lock()  # the cheapest thing to wait on; held until the worker lets go
        self.done.acquire()


class Generation:
    """A loaded bundle that answers requests."""

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
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """Take over loaded models and start one worker thread for each."""
        self.servable = servable
        self.signature = signature
        self.counters = counters
        self.runtime = models[0].runtime
        self.workers = len(models)
        self._truth = truth
        self._now_ms = now_ms
        self._queue_limit = queue_limit
        self._answer_seconds = answer_seconds
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._waiting = 0  # queued or running
        self._retired = False
        self._service_ns = 0.0  # moving average
        self._threads = [self._start(model, k) for k, model in enumerate(models)]

    @property
    def waiting(self) -> int:
        """Return how many requests are queued or running."""
        return self._waiting

    def run(self, request_id: str, inputs: Sequence[Buffer]) -> list[bytes]:
        """Return the bytes of every output; raise `Retired`, `QueueFull` or `ModelFailed`."""
        job = _Job(request_id, inputs)
        self._enter(job)
        if not job.done.acquire(timeout=self._answer_seconds):
            raise ModelFailed(f"no answer within {self._answer_seconds:g} s")
        if job.failure:
            raise ModelFailed(job.failure)
        return job.outputs

    def misfit(self) -> None:
        """Count a request whose tensors do not fit: a new version that broke its clients must show."""
        self.counters.failed(self._now_ms())

    def retire(self) -> None:
        """Take no more jobs, finish those that were taken, free the interpreters."""
        with self._gate:
            if not self._retired:
                self._retired = True
                for _ in self._threads:
                    self._queue.put(None)
        deadline = time.monotonic() + RETIRE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.error("%s still runs a request; its memory stays taken", thread.name)

    def _enter(self, job: _Job) -> None:
        with self._gate:
            if self._retired:
                raise Retired
            if self._waiting >= self._queue_limit:
                self.counters.dropped()
                raise QueueFull(self._waiting, self._retry_after())
            self._waiting += 1
            self._queue.put(job)

    def _retry_after(self) -> int:
        return max(1, math.ceil(self._waiting * self._service_ns / self.workers / 1e9))

    # ------------------------------------------------------------ workers
    def _start(self, model: LoadedModel, number: int) -> threading.Thread:
        name = f"{self.servable.model}-{self.servable.version}-{number}"
        thread = threading.Thread(target=self._work, args=(model,), name=name, daemon=True)
        thread.start()
        return thread

    def _work(self, model: LoadedModel) -> None:
        while (job := self._queue.get()) is not None:
            started = time.perf_counter_ns()
            try:
                self._perform(model, job, started)
            except Exception as error:  # noqa: BLE001 - whatever a model does must not end its worker
                job.failure = str(error) or type(error).__name__
                self.counters.failed(self._now_ms(), time.perf_counter_ns() - started)
            self._leave(job, started)
        model.close()

    def _perform(self, model: LoadedModel, job: _Job, started: int) -> None:
        for index, data in enumerate(job.inputs):
            model.fill(index, data)
        filled = time.perf_counter_ns()
        model.invoke()
        invoked = time.perf_counter_ns()
        job.outputs = [model.read(index) for index in range(len(model.outputs))]
        prediction = self._predict(model)
        timing = Timing(
            queue=started - job.queued,
            copy_in=filled - started,
            infer=invoked - filled,
            copy_out=time.perf_counter_ns() - invoked,
        )
        self._count(job, timing, prediction)

    def _predict(self, model: LoadedModel) -> Prediction | None:
        if not self.servable.classes:
            return None
        scores = probabilities(model.array(0), model.outputs[0], self.servable.calibrator)
        index, confidence = top_class(scores)
        return Prediction(index=index, confidence=confidence)

    def _count(self, job: _Job, timing: Timing, prediction: Prediction | None) -> None:
        now = self._now_ms()
        self.counters.succeeded(timing, prediction, now)
        if prediction is not None:
            self._truth.remember(
                self.servable.model,
                job.request_id,
                digest=self.counters.short_digest,
                now_ms=now,
                predicted=prediction.index,
            )

    def _leave(self, job: _Job, started: int) -> None:
        taken = time.perf_counter_ns() - started
        with self._gate:
            self._waiting -= 1
            self._service_ns += _SMOOTHING * (taken - self._service_ns)
        job.done.release()
