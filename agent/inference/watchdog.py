"""Sees a model that hangs: an invoke cannot be interrupted, so the process that it runs in has to end.

Knows which interpreter runs since when, and looks ten times a second. What becomes of the process is the business of
whoever is told; it is told once.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from agent.inference.loading import Servable

INVOKE_SECONDS = 10.0  # the default limit of one invoke
LOOK_SECONDS = 0.1


class Hang(NamedTuple):
    """Something ran for longer than it may."""

    servable: Servable
    seconds: float  # the limit that it broke


class _Running(NamedTuple):
    servable: Servable
    until: int  # ns of `time.perf_counter_ns`
    seconds: float


class Watchdog:
    """The invokes that run now. `begin` and `end` are on the hot path: one dictionary operation each."""

    def __init__(self, seconds: float = INVOKE_SECONDS) -> None:
        """Allow an invoke this many seconds. Nothing is watched before `start`."""
        self.seconds = seconds
        self._ns = int(seconds * 1e9)
        self._running: dict[object, _Running] = {}
        self._over = threading.Event()

    def begin(self, key: object, servable: Servable) -> None:
        """Remember that an invoke starts; ``key`` tells it from the others."""
        self._running[key] = _Running(servable, time.perf_counter_ns() + self._ns, self.seconds)

    def end(self, key: object) -> None:
        """Forget an invoke that came back."""
        del self._running[key]

    @contextmanager
    def loading(self, servable: Servable, instances: int) -> Iterator[None]:
        """Watch a load: an invoke for each golden sample, and one for the rest."""
        samples = servable.golden.samples if servable.golden else 0
        seconds = self.seconds * (samples + 1) * instances
        key = object()
        self._running[key] = _Running(servable, time.perf_counter_ns() + int(seconds * 1e9), seconds)
        try:
            yield
        finally:
            self.end(key)

    def overdue(self) -> Hang | None:
        """Return what runs for longer than it may, if anything does."""
        now = time.perf_counter_ns()
        for running in self._running.copy().values():  # copying is one step to other threads
            if now >= running.until:
                return Hang(running.servable, running.seconds)
        return None

    def start(self, on_hang: Callable[[Hang], None]) -> None:
        """Look out in the background; ``on_hang`` is called once, from there."""
        threading.Thread(target=self._look, args=(on_hang,), name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _look(self, on_hang: Callable[[Hang], None]) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if hang := self.overdue():
                on_hang(hang)
                return
