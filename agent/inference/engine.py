"""Which bundle serves under which name, and how one takes another's place without losing a request.

A swap loads and warms the new bundle beside the old, flips one reference, lets the old one finish what it took, and
frees it. Requests that meet the old one after the flip go to the new one. Where memory does not allow both, the old
one goes first and requests wait until the new one is there. A model has up to two versions side by side: the stable
one, and a candidate that is answered only by its version or alias. Nothing here knows HTTP or the channel.
"""

import ctypes
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from agent.channel import CANDIDATE, STABLE, Govern
from agent.core.delegates import Delegate
from agent.core.governor import TABLE, Level, Measures, part
from agent.core.shadowing import ShadowCounts
from agent.inference.generation import WAIT_SECONDS, Generation, Tap, Taps
from agent.inference.loading import CannotServe, Servable, Settings, load
from agent.inference.pool import QUEUE_LIMIT, TurnedAway
from agent.inference.shadow import Shadow
from agent.inference.statistics import Statistics
from agent.inference.tensors import Signature
from agent.inference.truth import TruthRing
from agent.inference.watchdog import Watchdog
from protocol.states import RuntimeName
from runtime.interpreter import LoadedModel

log = logging.getLogger(__name__)

ALIASES = (STABLE, CANDIDATE)
Key = tuple[str, str]  # model, alias


class UnknownModel(Exception):
    """Nothing serves under this name, or another version does; the message names what serves."""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A bundle took up serving."""

    servable: Servable
    runtime: RuntimeName
    took_us: int  # load, warm-up and flip; the old one's last requests are not in it
    stop_start: bool = False  # the old one was dropped first
    without_delegate: str = ""  # why it runs without the one that is preferred


@dataclass(frozen=True, kw_only=True)
class EndedShadow:
    """A shadow is over; its last counts."""

    model: str
    reason: str
    counts: ShadowCounts | None


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
        watchdog: Watchdog | None = None,
        memory_available: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Serve nothing yet. ``memory_available`` returns bytes, or None where nobody knows."""
        self.statistics = statistics
        self.truth = truth
        self.watchdog = watchdog or Watchdog()
        self._settings = settings
        self._now_ms = now_ms
        self._queue_limit = queue_limit
        self._wait_seconds = wait_seconds
        self._memory_available = memory_available
        self._taps = Taps()
        self._preferred: dict[str, Settings] = {}  # by digest
        self._without_delegate: dict[str, str] = {}  # by digest: why the preferred one is not used
        self._shadows: dict[str, Shadow] = {}  # by model
        self._ended: list[EndedShadow] = []
        self._changing = threading.Lock()
        self._governing = threading.Lock()  # never held for long
        self._governed: Govern | None = None
        # Both are replaced as a whole, never changed.
        self._serving: Mapping[Key, Generation] = {}
        self._gaps: Mapping[str, threading.Event] = {}  # models between two versions: the event ends the wait

    # ------------------------------------------------------------ finding
    def all(self) -> tuple[Generation, ...]:
        """Return what serves, by name, a model's stable version before its candidate."""
        return tuple(one for _, one in sorted(self._serving.items(), key=_by_name))

    def versions(self, model: str) -> tuple[Generation, ...]:
        """Return the versions of a model that serve, the stable one first."""
        serving = self._serving
        return tuple(serving[model, alias] for alias in ALIASES if (model, alias) in serving)

    def find(self, model: str, version: str | None = None) -> Generation:
        """Return what serves under a name: a version by its number, ``stable`` (the default) or ``candidate``.

        Raises `UnknownModel`. A model that is between two versions is waited for.
        """
        found = self._pick(model, version)
        if found is None and (gap := self._gaps.get(model)):
            gap.wait(self._wait_seconds)
        found = found or self._pick(model, version)  # a gap may also have ended between the two looks
        if found is None:
            raise UnknownModel(self._unknown(model, version))
        return found

    def _pick(self, model: str, version: str | None) -> Generation | None:
        if version is None or version in ALIASES:
            return self._serving.get((model, version or STABLE))
        return next((one for one in self.versions(model) if version == str(one.servable.version)), None)

    def _unknown(self, model: str, version: str | None) -> str:
        known = self.versions(model)
        if not known:
            served = ", ".join(sorted({name for name, _ in self._serving})) or "none"
            return f"model {model[:80]!r} is not served here; models that are: {served}"
        numbers = " and ".join(str(one.servable.version) for one in known)
        return f"version {(version or STABLE)[:20]!r} of {model} is not served here; version {numbers} is served"

    # ------------------------------------------------------------ changing
    def prefer(self, digest: str, *, runtime: str, threads: int, delegate: Delegate | None = None) -> None:
        """Load this bundle with another runtime or other threads than are set; empty and 0 stand for what is set."""
        usual = self._settings
        self._preferred[digest] = replace(
            usual, runtime=runtime or usual.runtime, threads=threads or usual.threads, delegate=delegate
        )
        self._without_delegate.pop(digest, None)

    def serve(self, servable: Servable, alias: str = STABLE) -> Flip:
        """Let a bundle take up its name; raise `CannotServe`, and what served before serves on."""
        started = time.perf_counter_ns()
        key, stop_start = (servable.model, alias), False
        with self._changing:
            old = self._serving.get(key)
            if old is not None and old.servable.digest == servable.digest:
                return Flip(servable=servable, runtime=old.runtime, took_us=0)
            self._end_shadow(servable.model, "another version takes its place")
            new = self._take_twin(servable, alias)
            if new is None and not self._has_room(servable):
                stop_start = self._make_room(key, servable)
            if stop_start and old is not None:
                new, took = self._stop_start(key, old, servable), _since(started)
            else:
                new = new or self._load(servable)
                self._put(key, new)
                took = _since(started)
                if old is not None:
                    self._drop(old)
        log.info("%s %d serves on %s after %d ms", servable.model, servable.version, new.runtime.value, took // 1000)
        return Flip(
            servable=servable,
            runtime=new.runtime,
            took_us=took,
            stop_start=stop_start,
            without_delegate=self._without_delegate.get(servable.digest, ""),
        )

    def withdraw(self, model: str, alias: str = "") -> None:
        """Stop serving a model, or only what has this alias; one that is not served is fine."""
        with self._changing:
            self._end_shadow(model, "a version is withdrawn")
            gone = [(name, one) for name, one in self._serving.items() if name[0] == model and alias in ("", name[1])]
            for key, old in gone:
                self._remove(key)
                self._drop(old)
            if not self.versions(model):
                self.truth.forget(model)

    def give_up(self, servable: Servable) -> None:
        """Turn everybody away who asks for a bundle that hangs."""
        for one in self.all():
            if one.servable.digest == servable.digest:
                one.pool.fail(TurnedAway("it hangs; the server starts again"))

    # ------------------------------------------------------------ shadows
    def start_shadow(self, model: str, *, share: float, cpu: float) -> tuple[Generation, Generation]:
        """Let a model's candidate answer a share of the requests, unseen; raise `CannotServe`."""
        with self._changing:
            known = {alias: self._serving.get((model, alias)) for alias in ALIASES}
            stable, candidate = known[STABLE], known[CANDIDATE]
            if stable is None or candidate is None:
                raise CannotServe(f"{model} has no stable version and candidate that serve here side by side")
            shadow = Shadow(stable, candidate, share=share, cpu=cpu, threads=candidate.threads)
            self._end_shadow(model, "another one begins")
            with self._governing:
                shadow.pause(paused=not self._measures.shadow)
                self._shadows[model] = shadow
            shadow.start()
            return stable, candidate

    def end_shadow(self, model: str, reason: str) -> None:
        """Compare no more; `take_ended_shadows` has the last counts."""
        with self._changing:
            self._end_shadow(model, reason)

    def take_shadows(self) -> tuple[tuple[str, ShadowCounts], ...]:
        """Return what the shadows that run have counted since the last call."""
        taken = ((model, shadow.take()) for model, shadow in self._shadows.copy().items())
        return tuple((model, counts) for model, counts in taken if counts is not None)

    def take_ended_shadows(self) -> tuple[EndedShadow, ...]:
        """Return the shadows that have ended since the last call."""
        ended, self._ended = self._ended, []
        return tuple(ended)

    def _end_shadow(self, model: str, reason: str) -> None:
        shadow = self._shadows.pop(model, None)
        if shadow is not None:
            shadow.stop()
            self._ended.append(EndedShadow(model=model, reason=reason, counts=shadow.take()))

    # ------------------------------------------------------------ how hard is worked
    @property
    def governed(self) -> Govern | None:
        """Return the order that stands, if control gave one."""
        return self._governed

    def govern(self, order: Govern) -> None:
        """Work as hard as is ordered, from now on; `rethread` does what takes longer."""
        with self._governing:
            self._governed = order
            for one in self.all():
                self._ease(one)
            for shadow in self._shadows.copy().values():
                shadow.pause(paused=not self._measures.shadow)

    def rethread(self) -> None:
        """Load again, each beside itself, what has other threads than are ordered. What cannot be stays as it is."""
        for key in self._serving:
            with self._changing:
                old = self._serving.get(key)
                if old is not None and self._should_rethread(old):
                    self._rethread(key, old)

    @property
    def _measures(self) -> Measures:
        return self._governed.measures if self._governed else TABLE[Level.NORMAL]

    def _ease(self, one: Generation) -> None:
        measures = self._measures
        one.pool.restrict(width=part(one.interpreters, measures.interpreters), lowest=measures.lowest)

    def _eased(self, settings: Settings) -> Settings:
        return replace(settings, threads=part(settings.threads, self._measures.threads))

    def _should_rethread(self, old: Generation) -> bool:
        """Where a delegate does the work, threads hardly matter, and it may not be had twice."""
        settings = self._settings_of(old.servable)
        if settings.delegate or old.threads == self._eased(settings).threads or not self._measures.reload:
            return False
        if not self._has_room(old.servable):
            log.info("%s keeps %d threads: memory is short for loading it twice", old.servable.model, old.threads)
            return False
        return True

    def _rethread(self, key: Key, old: Generation) -> None:
        try:
            new = self._load(old.servable)
        except CannotServe as error:
            log.warning("%s keeps %d threads: %s", old.servable.model, old.threads, error)
            return
        self._put(key, new)
        if shadow := self._shadows.get(key[0]):
            stable, candidate = self.versions(key[0])
            shadow.follow(stable, candidate)
        self._drop(old)
        log.info("%s %d goes on with threads: %d", new.servable.model, new.servable.version, new.threads)

    # ------------------------------------------------------------ end
    def tap(self, capture: Tap | None) -> None:
        """Let every answered request be looked at from now on, or no more."""
        self._taps.capture = capture

    def close(self) -> None:
        """Stop serving everything, finishing what was taken."""
        for generation in self.all():
            self.withdraw(generation.servable.model)

    def _put(self, key: Key, new: Generation) -> None:
        with self._governing:  # an order that comes now meets either what is eased here, or what serves
            self._ease(new)
            self._serving = {**self._serving, key: new}

    def _remove(self, key: Key) -> None:
        self._serving = {name: one for name, one in self._serving.items() if name != key}

    def _take_twin(self, servable: Servable, alias: str) -> Generation | None:
        """Return the candidate when it is what shall be stable: it is loaded already."""
        if alias == CANDIDATE:
            stable = self._serving.get((servable.model, STABLE))
            if stable is not None and stable.servable.digest == servable.digest:
                raise CannotServe(f"{servable.model} {servable.version} is the stable version already")
            return None
        candidate = self._serving.get((servable.model, CANDIDATE))
        if candidate is None or candidate.servable.digest != servable.digest:
            return None
        serving = {key: one for key, one in self._serving.items() if key != (servable.model, CANDIDATE)}
        self._serving = {**serving, (servable.model, STABLE): candidate}
        return candidate

    # ------------------------------------------------------------ memory
    def _has_room(self, servable: Servable) -> bool:
        available = self._memory_available()
        return available is None or servable.manifest is None or available >= self._needs(servable)

    def _needs(self, servable: Servable) -> int:
        return servable.manifest.needs.memory * self._settings.instances if servable.manifest else 0

    def _make_room(self, key: Key, servable: Servable) -> bool:
        """Tell whether the old one is to go first; a candidate never costs the stable version its place."""
        if key[1] == CANDIDATE:
            raise CannotServe(
                f"{servable.model} {servable.version} needs {self._needs(servable)} bytes, "
                f"{self._memory_available()} are left beside the stable version"
            )
        return key in self._serving  # where nothing serves, loading shows whether it fits

    def _stop_start(self, key: Key, old: Generation, servable: Servable) -> Generation:
        gap = threading.Event()
        self._gaps = {**self._gaps, key[0]: gap}
        try:
            self._remove(key)
            self._drop(old)
            try:
                new = self._load(servable)
            except Exception as error:
                self._restore(key, old.servable, error)
                raise
            self._put(key, new)
        finally:
            self._gaps = {name: one for name, one in self._gaps.items() if name != key[0]}
            gap.set()
        return new

    def _restore(self, key: Key, servable: Servable, reason: Exception) -> None:
        try:
            self._put(key, self._load(servable))
        except CannotServe as error:
            raise CannotServe(f"{reason}; nor can version {servable.version} be loaded again: {error}") from error

    def _settings_of(self, servable: Servable) -> Settings:
        return self._preferred.get(servable.digest, self._settings)

    def _load(self, servable: Servable) -> Generation:
        with self.watchdog.loading(servable, self._settings.instances):
            threads = self._eased(self._settings_of(servable)).threads
            models, signature = self._load_models(servable)
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
            taps=self._taps,
            watchdog=self.watchdog,
            threads=threads,
            delegate=self._delegate_of(servable),
        )

    def _delegate_of(self, servable: Servable) -> str:
        delegate = self._settings_of(servable).delegate
        return delegate.name if delegate else ""

    def _load_models(self, servable: Servable) -> tuple[tuple[LoadedModel, ...], Signature]:
        """Load as is preferred. An accelerator that is gone, busy or wrong costs speed, not the model."""
        settings = self._settings_of(servable)
        try:
            return load(servable, self._eased(settings))
        except CannotServe as error:
            if settings.delegate is None:
                raise
            log.error("it is loaded without delegate %s: %s", settings.delegate.name, error)
            self._without_delegate[servable.digest] = f"{settings.delegate.name}: {error}"
        without = replace(settings, delegate=None)
        loaded = load(servable, self._eased(without))
        self._preferred[servable.digest] = without
        return loaded

    def _drop(self, old: Generation) -> None:
        old.retire()
        give_memory_back()


def _by_name(item: tuple[Key, Generation]) -> tuple[str, int]:
    (model, alias), _ = item
    return model, ALIASES.index(alias)


def _since(started: int) -> int:
    return (time.perf_counter_ns() - started) // 1000


def give_memory_back() -> None:
    """Return freed heap pages to the kernel: without it every swap leaves some behind. musl has no such call."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


__all__ = ["CannotServe", "Engine", "Flip", "UnknownModel", "give_memory_back"]
