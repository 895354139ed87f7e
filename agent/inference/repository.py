"""What could serve here by name, and whether local clients may have it loaded and unloaded.

Remembers, for every name, where its bundle came from: the command line, or the fleet's last order. The fleet's word
goes first: an order replaces what a client unloaded, and what the fleet withdrew cannot be loaded again.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from agent.channel import STABLE
from agent.inference.engine import Engine, Flip, UnknownModel
from agent.inference.loading import CannotServe, Servable

UNLOADED = "unloaded by a client"
FLEET_DECIDES = (
    "models are managed by the fleet here; they are loaded and unloaded by its rollouts, "
    "unless inference.allow_repository_control is set"
)


class ModelState(str, Enum):
    """Triton's words for the state of a model."""

    READY = "READY"
    LOADING = "LOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A model as the index shows it."""

    name: str
    version: int
    state: ModelState
    reason: str = ""


class NotAllowed(Exception):
    """Local clients may not load and unload; the message says why."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    fetch: Callable[[], Servable]
    listed: Listed


class Repository:
    """The names of this process. Changes happen one at a time, from any thread; the index never waits for one."""

    def __init__(self, engine: Engine, *, forbidden: str = "") -> None:
        """``forbidden``: why local clients may not load and unload; empty when they may."""
        self._engine = engine
        self._forbidden = forbidden
        self._changing = threading.Lock()
        self._known: Mapping[str, _Known] = {}  # replaced as a whole, never changed

    @property
    def is_open(self) -> bool:
        """Tell whether local clients may load and unload."""
        return not self._forbidden

    def serve(self, servable: Servable, fetch: Callable[[], Servable] | None = None) -> Flip:
        """Have a bundle serve; ``fetch`` finds it again when it is to be loaded anew. Raises `CannotServe`."""
        with self._changing:
            flip = self._engine.serve(servable)
            self._note(_Known(fetch=fetch or (lambda: servable), listed=_listed(servable, ModelState.READY)))
            return flip

    def withdraw(self, model: str, alias: str = "") -> None:
        """Stop serving a model, or only what has this alias, and forget where it came from."""
        with self._changing:
            if alias in ("", STABLE):
                self._known = {name: known for name, known in self._known.items() if name != model}
            self._engine.withdraw(model, alias)

    def load(self, model: str) -> None:
        """Load a model again from where it came; raise `NotAllowed`, `UnknownModel` or `CannotServe`."""
        self._check_open()
        with self._changing:
            known = self._find(model)
            if known.listed.state is not ModelState.READY:
                self._note(_with(known, ModelState.LOADING))
            try:
                servable = _fetch(known, model)
                self._engine.serve(servable)
            except CannotServe as error:
                if known.listed.state is not ModelState.READY:  # otherwise the old one serves on
                    self._note(_with(known, ModelState.UNAVAILABLE, str(error)))
                raise
            self._note(_Known(fetch=known.fetch, listed=_listed(servable, ModelState.READY)))

    def unload(self, model: str) -> None:
        """Stop serving a model until it is loaded again; raise `NotAllowed` or `UnknownModel`."""
        self._check_open()
        with self._changing:
            known = self._find(model)
            self._engine.withdraw(model)
            self._note(_with(known, ModelState.UNAVAILABLE, UNLOADED))

    def index(self) -> tuple[Listed, ...]:
        """Return every model that is known, by name; one that serves in two versions stands there twice."""
        ready = [_listed(found.servable, ModelState.READY) for found in self._engine.all()]
        names = {one.name for one in ready}
        others = [one.listed for name, one in self._known.items() if name not in names]
        return tuple(sorted((*ready, *others), key=lambda one: one.name))

    def _check_open(self) -> None:
        if self._forbidden:
            raise NotAllowed(self._forbidden)

    def _find(self, model: str) -> _Known:
        known = self._known.get(model)
        if known is None:
            names = ", ".join(sorted(self._known)) or "none"
            raise UnknownModel(f"model {model[:80]!r} is not known here; models that are: {names}")
        return known

    def _note(self, known: _Known) -> None:
        self._known = {**self._known, known.listed.name: known}


def _fetch(known: _Known, model: str) -> Servable:
    servable = known.fetch()
    if servable.model != model:
        raise CannotServe(f"the bundle that {model} came from holds {servable.model} now")
    return servable


def _listed(servable: Servable, state: ModelState) -> Listed:
    return Listed(name=servable.model, version=servable.version, state=state)


def _with(known: _Known, state: ModelState, reason: str = "") -> _Known:
    return replace(known, listed=replace(known.listed, state=state, reason=reason))
