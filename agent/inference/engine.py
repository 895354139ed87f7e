"""Which bundle serves under which name, and how one takes another's place without losing a request.

A swap loads and warms the new bundle beside the old, flips one reference, lets the old one finish what it took, and
frees it. Requests that meet the old one after the flip go to the new one. Nothing here knows HTTP or the channel.
"""

import ctypes
import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.inference.generation import QUEUE_LIMIT, WAIT_SECONDS, Generation
from agent.inference.loading import CannotServe, Servable, Settings, load
from agent.inference.statistics import Statistics
from agent.inference.truth import TruthRing
from protocol.states import RuntimeName

log = logging.getLogger(__name__)


class UnknownModel(Exception):
    """Nothing serves under this name, or another version does; the message names what serves."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A bundle took up serving."""

    servable: Servable
    runtime: RuntimeName
    took_us: int  # load, warm-up and flip; the old one's last requests are not in it


class Engine:
    """All models of this process. Reading is lock-free; changes happen one at a time."""

    def __init__(
        self,
        *,
        settings: Settings,
        statistics: Statistics,
        truth: TruthRing,
        now_ms: Callable[[], int],
        queue_limit: int = QUEUE_LIMIT,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        """Serve nothing yet."""
        self.statistics = statistics
        self.truth = truth
        self._settings = settings
        self._now_ms = now_ms
        self._queue_limit = queue_limit
        self._wait_seconds = wait_seconds
        self._changing = threading.Lock()
        self._serving: dict[str, Generation] = {}  # replaced as a whole, never changed

    def all(self) -> tuple[Generation, ...]:
        """Return what serves, by name."""
        serving = self._serving
        return tuple(serving[name] for name in sorted(serving))

    def find(self, model: str, version: str | None = None) -> Generation:
        """Return what serves under a name; raise `UnknownModel` also when another version is asked for."""
        found = self._serving.get(model)
        if found is None:
            served = ", ".join(sorted(self._serving)) or "none"
            raise UnknownModel(f"model {model[:80]!r} is not served here; models that are: {served}")
        if version is not None and version != str(found.servable.version):
            raise UnknownModel(
                f"version {version[:20]!r} of {model} is not served here; version {found.servable.version} is served"
            )
        return found

    def serve(self, servable: Servable) -> Flip:
        """Let a bundle take up its name; raise `CannotServe`, and what served before serves on."""
        started = time.perf_counter_ns()
        with self._changing:
            old = self._serving.get(servable.model)
            if old is not None and old.servable.digest == servable.digest:
                return Flip(servable=servable, runtime=old.runtime, took_us=0)
            new = self._load(servable)
            self._serving = {**self._serving, servable.model: new}
            took = (time.perf_counter_ns() - started) // 1000
            if old is not None:
                self._drop(old)
        log.info("%s %d serves on %s after %d ms", servable.model, servable.version, new.runtime.value, took // 1000)
        return Flip(servable=servable, runtime=new.runtime, took_us=took)

    def withdraw(self, model: str) -> None:
        """Stop serving a model; one that is not served is fine."""
        with self._changing:
            old = self._serving.get(model)
            if old is None:
                return
            self._serving = {name: one for name, one in self._serving.items() if name != model}
            self._drop(old)
            self.truth.forget(model)

    def close(self) -> None:
        """Stop serving everything, finishing what was taken."""
        for generation in self.all():
            self.withdraw(generation.servable.model)

    def _load(self, servable: Servable) -> Generation:
        models, signature = load(servable, self._settings)
        counters = self.statistics.counters(
            model=servable.model,
            version=servable.version,
            digest=servable.digest,
            classes=len(servable.classes),
        )
        return Generation(
            servable,
            models,
            signature,
            counters=counters,
            truth=self.truth,
            now_ms=self._now_ms,
            queue_limit=self._queue_limit,
            wait_seconds=self._wait_seconds,
        )

    def _drop(self, old: Generation) -> None:
        old.retire()
        give_memory_back()


def give_memory_back() -> None:
    """Return freed heap pages to the kernel: without it every swap leaves some behind. musl has no such call."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


__all__ = ["CannotServe", "Engine", "Flip", "UnknownModel", "give_memory_back"]
