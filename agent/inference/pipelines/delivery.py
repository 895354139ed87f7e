"""Hands results to one sink, on a thread of its own, so that a slow or broken sink holds up nothing.

Results wait in a bounded queue; what finds it full is dropped and counted. A delivery that fails is tried again with
growing pauses, a bounded number of times.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, Full, Queue

from agent.core.retry import BackOff, after_failure
from agent.inference.pipelines.flow import Health, Sink, SinkFailed, Undeliverable

log = logging.getLogger(__name__)

ATTEMPTS = 6  # with the pauses below: about a minute
BACK_OFF = BackOff(first=1.0, ceiling=30.0)
FLUSH_SECONDS = 2.0  # at the end, for what waits
TICK = 0.25


class Delivery:
    """One sink's queue and thread."""

    def __init__(
        self,
        kind: str,
        sink: Sink,
        *,
        queue: int,
        random: Callable[[], float],
        back_off: BackOff = BACK_OFF,
        attempts: int = ATTEMPTS,
    ) -> None:
        """Deliver nothing before `start`."""
        self.kind = kind
        self.health = Health()
        self.delivered = 0
        self.dropped = 0  # the queue was full, or every attempt failed
        self.failures = 0
        self._sink = sink
        self._queue: Queue[bytes] = Queue(queue)
        self._random = random
        self._back_off = back_off
        self._attempts = attempts
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Return how many results wait."""
        return self._queue.qsize()

    def start(self, name: str) -> None:
        """Deliver in the background."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, record: bytes) -> None:
        """Take a result, at once."""
        try:
            self._queue.put_nowait(record)
        except Full:
            self.dropped += 1

    def stop(self) -> None:
        """Deliver what waits if that goes quickly, and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(FLUSH_SECONDS + 1.0)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._next(TICK)
            deadline = time.monotonic() + FLUSH_SECONDS
            while not self._queue.empty() and time.monotonic() < deadline:
                self._next(0.0)
        finally:
            self.dropped += self._queue.qsize()
            self.health.state = "stopped"
            self._close()

    def _next(self, patience: float) -> None:
        try:
            record = self._queue.get(timeout=patience) if patience else self._queue.get_nowait()
        except Empty:
            return
        if self._deliver(record):
            self.delivered += 1
        else:
            self.dropped += 1

    def _deliver(self, record: bytes) -> bool:
        for failures in range(1, self._attempts + 1):
            try:
                self._sink.deliver(record)
            except Exception as error:  # noqa: BLE001 - whatever a sink does, its thread goes on
                self._note(error)
                if isinstance(error, Undeliverable) or failures == self._attempts:
                    return False
                wait = error.wait if isinstance(error, SinkFailed) else 0.0
                if self._stop.wait(after_failure(self._back_off, failures, self._random(), wait or None)):
                    return False
            else:
                self.health.up()
                return True
        return False

    def _note(self, error: Exception) -> None:
        self.failures += 1
        expected = isinstance(error, SinkFailed)
        self.health.failed(str(error) if expected else f"{type(error).__name__}: {error}")
        if self.health.failures == 1:
            log.warning("sink %s: %s", self.kind, self.health.error, exc_info=not expected)

    def _close(self) -> None:
        try:
            self._sink.close()
        except Exception:
            log.exception("sink %s cannot be closed", self.kind)
