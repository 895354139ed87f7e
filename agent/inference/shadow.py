"""A candidate answers a sample of the live requests, unseen, and is compared with what the stable version said.

Off the hot path: a client's thread draws lots and at most copies its input into a bounded queue; where that is full
the sample is dropped. The shadow's own thread has a lower priority with the kernel, comes last in the candidate's
line, and after each answer rests until its CPU time is within its budget. What the counts mean is decided by control.
"""

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, NamedTuple

from agent.core.shadowing import MILLION, ShadowCounts
from agent.inference.loading import CannotServe
from agent.inference.pool import Retired
from agent.inference.prediction import Prediction
from agent.inference.tensors import Buffer
from protocol.manifest import TensorSpec
from protocol.statistics import bucket_index, histogram_from

if TYPE_CHECKING:  # a generation offers to its shadow
    from agent.inference.generation import Generation

log = logging.getLogger(__name__)

QUEUE = 8  # samples that may wait
NICE = 10
LOOK_SECONDS = 0.2  # how soon an idle or resting shadow hears that it ends


class _Sample(NamedTuple):
    inputs: tuple[bytes, ...]
    stable: Prediction
    request_id: str
    outputs: Sequence[bytes]  # the answer; empty: whatever the candidate says, nobody wants to know


class _Counts:
    """The difference since it was last taken. The shadow's thread counts, another takes; drops come from clients."""

    def __init__(self) -> None:
        self.compared = self.agreed = self.distance = self.dropped = self.failed = 0
        self.zero = self.sum = self.max = 0
        self.buckets: dict[int, int] = {}

    def time(self, microseconds: int) -> None:
        if microseconds:
            index = bucket_index(microseconds)
            self.buckets[index] = self.buckets.get(index, 0) + 1
        else:
            self.zero += 1
        self.sum += microseconds
        self.max = max(self.max, microseconds)


class Shadow:
    """One candidate in the shadow of one stable version."""

    def __init__(
        self,
        stable: "Generation",
        candidate: "Generation",
        *,
        share: float,
        cpu: float,
        threads: int = 1,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Compare a ``share`` of the requests on at most ``cpu`` of a core; raise `CannotServe` for what cannot be.

        ``threads``: how many threads one invoke of the candidate keeps busy.
        """
        _check_comparable(stable, candidate)
        self._stable = stable
        self._candidate = candidate
        self._share = share
        self._cpu = cpu
        self._threads = threads
        self._chance = chance
        self._lock = threading.Lock()
        self._counts = _Counts()
        self._queue: Queue[_Sample] = Queue(QUEUE)
        self._over = threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()
        self._stable.shadow = self

    def stop(self) -> None:
        """End, and wait for a comparison that runs."""
        self._stable.shadow = None
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def pause(self, *, paused: bool) -> None:
        """Leave the device its CPU for a while; what waits is dropped."""
        self._paused = paused

    def follow(self, stable: "Generation", candidate: "Generation") -> None:
        """Go on with the same bundles, which were loaded again."""
        stable.shadow = self
        self._stable, self._candidate = stable, candidate
        self._threads = candidate.threads

    def take(self) -> ShadowCounts | None:
        """Return what was counted since the last call, or None when nothing was."""
        with self._lock:
            taken, self._counts = self._counts, _Counts()
        if not (taken.compared or taken.failed or taken.dropped):
            return None
        return ShadowCounts(
            stable=self._stable.servable.digest,
            candidate=self._candidate.servable.digest,
            compared=taken.compared,
            agreed=taken.agreed,
            distance=taken.distance,
            dropped=taken.dropped,
            failed=taken.failed,
            latency=histogram_from(taken.buckets, zero=taken.zero, sum_=taken.sum, max_=taken.max),
        )

    # ------------------------------------------------------------ on a client's thread
    def offer(
        self, inputs: Sequence[Buffer], prediction: Prediction, request_id: str = "", outputs: Sequence[bytes] = ()
    ) -> None:
        """Maybe take a request that was answered; never waits. With ``outputs`` a disagreement is told of."""
        if self._paused or self._chance() >= self._share:
            return
        if self._queue.full():  # before the copy
            self._drop()
            return
        try:
            copied = tuple(bytes(data) for data in inputs)
            self._queue.put_nowait(_Sample(copied, prediction, request_id, outputs))
        except Full:
            self._drop()

    def _drop(self) -> None:
        with self._lock:
            self._counts.dropped += 1

    # ------------------------------------------------------------ on the shadow's thread
    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a system without priorities for threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._over.is_set():
            try:
                sample = self._queue.get(timeout=LOOK_SECONDS)
            except Empty:
                continue
            if self._paused:
                self._drop()
                continue
            spent = self._compare(sample)
            self._over.wait(spent / self._cpu - spent)

    def _compare(self, sample: _Sample) -> float:
        """Have the candidate answer; return the CPU seconds it took."""
        started, cpu = time.perf_counter_ns(), time.thread_time_ns()
        try:
            prediction, took = self._candidate.rehearse(sample.inputs)
        except Retired:  # it was loaded again just now
            self._drop()
        except Exception as error:  # noqa: BLE001 - whatever a candidate does, live requests must not feel it
            log.debug("the shadow failed: %s", error)
            with self._lock:
                self._counts.failed += 1
        else:
            self._count(sample.stable, prediction, took // 1000)
            if sample.outputs and sample.stable.label != prediction.label:
                self._stable.disagreed(sample.request_id, sample.inputs, sample.outputs)
        if self._threads > 1:  # the other threads' time is not this thread's: assume that all were busy
            return (time.perf_counter_ns() - started) * self._threads / 1e9
        return (time.thread_time_ns() - cpu) / 1e9

    def _count(self, stable: Prediction, candidate: Prediction, microseconds: int) -> None:
        with self._lock:
            self._counts.compared += 1
            self._counts.agreed += stable.label == candidate.label
            self._counts.distance += round(abs(stable.confidence - candidate.confidence) * MILLION)
            self._counts.time(microseconds)


def _check_comparable(stable: "Generation", candidate: "Generation") -> None:
    if not stable.servable.classes or stable.servable.classes != candidate.servable.classes:
        raise CannotServe("only classifiers of the same classes can be compared")
    if _meaning(stable.signature.inputs) != _meaning(candidate.signature.inputs):
        raise CannotServe("the candidate takes other inputs than the stable version, or in another scale")


def _meaning(inputs: Sequence[TensorSpec]) -> list[tuple[object, ...]]:
    """Return what the bytes of an input mean; its name does not matter."""
    return [(spec.dtype, spec.shape, spec.scale, spec.zero_point) for spec in inputs]
