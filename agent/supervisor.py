"""Keeps a data plane running and serving what it should: starts, watches, restarts, replaces.

One long-lived thread owns all state (and starts the children, which die with the thread that started them);
everything else reaches it through its inbox. Knows which bundles served last, so that a new process serves the same
before any client reaches it: connections wait in the kernel's backlog until then. What a crash means for a model on
probation is decided by the update machine, which hears of it by `DataPlaneExit`.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import msgspec

from agent.channel import (
    CANDIDATE,
    STABLE,
    Answer,
    ChannelClosed,
    Configure,
    Drain,
    EndShadow,
    Hung,
    Open,
    Order,
    Ready,
    Refused,
    Serve,
    Serving,
    Shadow,
    ShadowDelta,
    ShadowEnded,
    Shadowing,
    StatisticsDelta,
    Withdraw,
    Withdrawn,
)
from agent.ports import DataPlaneExit, DataPlaneLauncher, DataPlaneProcess, StoredModel

log = logging.getLogger(__name__)

_PLANE_DIED = "the data plane ended; the candidate may be the cause"

FIRST_BACKOFF_SECONDS = 0.1  # before the second restart; the first is immediate
MAX_BACKOFF_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # a data plane that lived this long owes nothing to the ones before
STOP_SECONDS = 12.0  # a drain takes 10 s at most; then it is killed
LEAVE_SECONDS = 5.0  # between the end of the channel and the end of the process
MAX_RELOAD_DEATHS = 3  # a bundle that took this many data planes with it while being reloaded is left out
RELOADED = 0  # ticket of orders the supervisor gives itself

Event = Answer | DataPlaneExit
Key = tuple[str, str]  # model, alias


@dataclass(kw_only=True, eq=False)
class _Plane:
    """One data plane process, as far as the supervisor follows it."""

    process: DataPlaneProcess
    started: float
    reloading: list[Key] = field(default_factory=list)  # what it was ordered to serve and does not, in that order
    ready: bool = False
    open: bool = False  # accepts clients
    draining: bool = False
    hung: Hung | None = None  # its last words


# What arrives in the inbox.
@dataclass(frozen=True, kw_only=True)
class _Answered:
    plane: _Plane
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class _Ended:
    plane: _Plane
    returncode: int


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """An order from the update machine; ``model`` is None to withdraw. No ``alias``: all versions."""

    ticket: int
    name: str
    model: StoredModel | None
    alias: str = STABLE

    def order(self) -> Order:
        if self.model is None:
            return Withdraw(ticket=self.ticket, model=self.name, alias=self.alias)
        return _serve_order(self.ticket, self.model, self.alias)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """An order about a shadow."""

    ticket: int
    name: str
    wanted: Shadow | EndShadow

    def order(self) -> Order:
        return self.wanted


class _Replace:
    """A planned restart is asked for."""


class _Stop:
    """The agent ends."""


_Message = _Answered | _Ended | _Wanted | _Compared | _Replace | _Stop


class Supervisor:
    """Implements `agent.ports.DataPlane`. Answers and exits are handed to ``post``, from the supervisor's thread."""

    def __init__(
        self,
        launcher: DataPlaneLauncher,
        post: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        first_backoff: float = FIRST_BACKOFF_SECONDS,
        max_backoff: float = MAX_BACKOFF_SECONDS,
        stop_seconds: float = STOP_SECONDS,
        configuration: Configure | None = None,
    ) -> None:
        """Start nothing yet. ``clock`` returns seconds; ``configuration`` goes to every data plane first."""
        self._launcher = launcher
        self._post = post
        self._clock = clock
        self._first_backoff = first_backoff
        self._max_backoff = max_backoff
        self._stop_seconds = stop_seconds
        self._configuration = configuration
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._current: _Plane | None = None
        self._successor: _Plane | None = None
        self._leaving: list[_Plane] = []
        self._serving: dict[Key, StoredModel] = {}  # what served last
        self._shadows: dict[str, Shadow] = {}  # by model; they end with a data plane that dies
        self._held: list[_Wanted | _Compared] = []  # orders that wait until a data plane is open
        self._asked: dict[int, _Wanted | _Compared] = {}  # orders sent and not answered, by ticket
        self._replacing = False  # a planned restart waits until nothing is asked any more
        self._reload_deaths: Counter[str] = Counter()  # by digest
        self._restarts = 0  # since the last healthy life
        self._next_start: float | None = None  # when to start again; None: not waiting
        self._stopping_until: float | None = None

    # ------------------------------------------------------------ for other threads
    def start(self) -> None:
        """Start the data plane, in the background."""
        self._thread.start()

    def serve(self, ticket: int, model: StoredModel, alias: str = STABLE) -> None:
        """Order a bundle to serve; `Serving` or `Refused` with this ticket follows, unless the data plane dies first.

        Then `DataPlaneExit` is the answer, and whoever ordered decides whether to order again. Ticket `RELOADED` says
        that the bundle served before this start: it is loaded again after every death, and clients wait for it.
        """
        self._inbox.put(_Wanted(ticket=ticket, name=model.manifest.model, model=model, alias=alias))

    def withdraw(self, ticket: int, model: str, alias: str = "") -> None:
        """Order a model, or only what has this alias, to stop serving; `Withdrawn` with this ticket follows."""
        self._inbox.put(_Wanted(ticket=ticket, name=model, model=None, alias=alias))

    def shadow(self, order: Shadow) -> None:
        """Have a candidate compared; `Shadowing` follows, `ShadowDelta` each second, and `ShadowEnded` some day.

        It does not survive a data plane that dies: the candidate may be the cause.
        """
        self._inbox.put(_Compared(ticket=order.ticket, name=order.model, wanted=order))

    def end_shadow(self, ticket: int, model: str) -> None:
        """Have a candidate compared no more; `ShadowEnded` with this ticket follows."""
        self._inbox.put(_Compared(ticket=ticket, name=model, wanted=EndShadow(ticket=ticket, model=model)))

    def restart_planned(self) -> None:
        """Replace the data plane without losing a request; a planned `DataPlaneExit` of the old one follows."""
        self._inbox.put(_Replace())

    def stop(self) -> None:
        """Drain the data plane, or kill it if it does not end; return when it is gone (blocking)."""
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            self._thread.join()

    @property
    def pid(self) -> int | None:
        """Return the process id of the data plane that serves, if one lives."""
        plane = self._current
        return plane.process.pid if plane else None

    # ------------------------------------------------------------ the thread
    def _run(self) -> None:
        self._next_start = self._clock()
        while not self._is_over():
            self._start_if_due()
            try:
                message = self._inbox.get(timeout=self._patience())
            except Empty:
                continue
            self._handle(message)

    def _handle(self, message: _Message) -> None:
        match message:
            case _Answered():
                self._on_answer(message.plane, message.answer)
            case _Ended():
                self._on_end(message.plane, message.returncode)
            case _Wanted(ticket=ticket, model=model) if ticket == RELOADED and model:
                self._adopt((message.name, message.alias), model)
            case _Wanted() | _Compared():
                self._held.append(message)
                self._send_held()
            case _Replace():
                self._replacing = True
            case _Stop():
                self._begin_stop()
        self._replace_if_quiet()

    def _patience(self) -> float | None:
        due = [moment for moment in (self._next_start, self._stopping_until) if moment is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def _planes(self) -> list[_Plane]:
        return [plane for plane in (self._current, self._successor, *self._leaving) if plane]

    # ------------------------------------------------------------ starting
    def _start_if_due(self) -> None:
        if self._next_start is not None and self._clock() >= self._next_start:
            self._next_start = None
            self._current = self._launch()
            if self._current is None:
                self._plan_restart()

    def _launch(self) -> _Plane | None:
        try:
            process = self._launcher.launch()
        except OSError:
            log.exception("the data plane cannot be started")
            return None
        plane = _Plane(process=process, started=self._clock(), reloading=list(self._serving))
        threading.Thread(target=self._listen, args=(plane,), name=f"data-plane-{process.pid}", daemon=True).start()
        return plane

    def _plan_restart(self) -> None:
        """First at once, then after 0.1 s, doubling."""
        wait = min(self._max_backoff, self._first_backoff * 2 ** (self._restarts - 1)) if self._restarts else 0.0
        self._restarts += 1
        self._next_start = self._clock() + wait

    def _listen(self, plane: _Plane) -> None:
        """Hand on what a data plane says, then how it ended. Runs on a thread of its own."""
        try:
            while True:
                self._inbox.put(_Answered(plane=plane, answer=plane.process.receive()))
        except ChannelClosed:
            returncode = plane.process.wait(LEAVE_SECONDS)
        if returncode is None:
            plane.process.kill()
            returncode = plane.process.wait()
        self._inbox.put(_Ended(plane=plane, returncode=-1 if returncode is None else returncode))

    # ------------------------------------------------------------ hearing
    def _on_answer(self, plane: _Plane, answer: Answer) -> None:
        match answer:
            case Ready():
                plane.ready = True
                if self._configuration is not None:
                    self._send(plane, self._configuration)
                for key in plane.reloading:
                    self._send(plane, _serve_order(RELOADED, self._serving[key], key[1]))
            case Serving() | Refused() if answer.ticket == RELOADED:
                self._on_reloaded(plane, answer)
            case Shadowing() | ShadowEnded():
                self._on_compared(plane, answer)
            case Serving() | Refused() | Withdrawn():
                self._on_ordered(answer)
            case Hung():
                plane.hung = answer
            case StatisticsDelta() | ShadowDelta():
                pass
        if not self._goes_on(plane, answer):
            self._post(answer)
        self._open_if_complete(plane)

    def _goes_on(self, plane: _Plane, answer: Answer) -> bool:
        """Tell whether this is how a shadow moves from a data plane to its successor: nobody needs to hear of it."""
        if isinstance(answer, ShadowEnded):
            return plane.draining and answer.model in self._shadows
        return isinstance(answer, Shadowing) and answer.ticket == RELOADED

    def _on_reloaded(self, plane: _Plane, answer: Serving | Refused) -> None:
        key = (answer.model, answer.alias)
        if key in plane.reloading:
            plane.reloading.remove(key)
        if isinstance(answer, Refused):
            log.error("%s served before and cannot be loaded again: %s", answer.model, answer.reason)
            self._serving.pop(key, None)

    def _on_ordered(self, answer: Serving | Refused | Withdrawn) -> None:
        wanted = self._asked.pop(answer.ticket, None)
        if not isinstance(wanted, _Wanted) or isinstance(answer, Refused):
            return
        if wanted.model is None:
            self._forget(wanted)
            return
        candidate = self._serving.get((wanted.name, CANDIDATE))
        if wanted.alias == STABLE and candidate and candidate.digest == wanted.model.digest:
            del self._serving[wanted.name, CANDIDATE]  # it was promoted
        self._serving[wanted.name, wanted.alias] = wanted.model

    def _forget(self, withdrawn: _Wanted) -> None:
        for alias in (STABLE, CANDIDATE) if not withdrawn.alias else (withdrawn.alias,):
            self._serving.pop((withdrawn.name, alias), None)

    def _on_compared(self, plane: _Plane, answer: Shadowing | ShadowEnded) -> None:
        asked = self._asked.pop(answer.ticket, None)
        if isinstance(answer, ShadowEnded):
            if plane is self._current:  # one that drains ends what its successor goes on with
                self._shadows.pop(answer.model, None)
        elif isinstance(asked, _Compared) and isinstance(asked.wanted, Shadow):
            self._shadows[answer.model] = asked.wanted

    def _open_if_complete(self, plane: _Plane) -> None:
        if not plane.ready or plane.reloading or plane.open or plane.draining:
            return
        plane.open = True
        self._reload_deaths.clear()
        self._send(plane, Open())
        if plane is self._successor:
            self._take_over(plane)
        self._send_held()

    def _on_end(self, plane: _Plane, returncode: int) -> None:
        planned = plane.draining and returncode == 0
        log.log(
            logging.INFO if planned else logging.WARNING, "data plane %d ended: %d", plane.process.pid, returncode
        )
        if plane is self._successor:
            self._successor = None  # the current one serves on
        elif plane in self._leaving:
            self._leaving.remove(plane)
        else:
            self._on_death(plane)
        self._post(
            DataPlaneExit(pid=plane.process.pid, returncode=returncode, planned=planned, detail=_last_words(plane))
        )
        self._send_held()

    def _on_death(self, plane: _Plane) -> None:
        self._current = None
        if self._clock() - plane.started >= HEALTHY_SECONDS:
            self._restarts = 0
        self._blame(plane)
        self._forget_asked()
        self._end_shadows()
        if self._successor:
            self._current, self._successor = self._successor, None
        elif self._stopping_until is None:
            self._plan_restart()

    def _blame(self, plane: _Plane) -> None:
        """A bundle whose reload keeps killing data planes must not take the others down for ever."""
        if not plane.ready or not plane.reloading:
            return
        suspect = plane.reloading[0]
        model = self._serving[suspect]
        self._reload_deaths[model.digest] += 1
        if self._reload_deaths[model.digest] >= MAX_RELOAD_DEATHS:
            del self._serving[suspect]
            reason = f"{MAX_RELOAD_DEATHS} data planes died while they loaded it"
            log.error("%s %d is left out: %s", suspect[0], model.manifest.version, reason)
            self._post(Refused(ticket=RELOADED, model=suspect[0], reason=reason, alias=suspect[1]))

    def _forget_asked(self) -> None:
        """Orders died with the data plane; a model whose withdrawal was ordered must not come back."""
        asked, self._asked = self._asked, {}
        for wanted in asked.values():
            if isinstance(wanted, _Compared):
                self._post(ShadowEnded(ticket=wanted.ticket, model=wanted.name, reason=_PLANE_DIED))
            elif wanted.model is None:
                self._forget(wanted)
                self._post(Withdrawn(ticket=wanted.ticket, model=wanted.name))

    def _end_shadows(self) -> None:
        shadows, self._shadows = self._shadows, {}
        for model in shadows:
            self._post(ShadowEnded(ticket=RELOADED, model=model, reason=_PLANE_DIED))

    # ------------------------------------------------------------ ordering
    def _adopt(self, key: Key, model: StoredModel) -> None:
        """Count a bundle among those that served; a data plane that is not open yet waits for it."""
        self._serving[key] = model
        plane = self._current
        if plane is None:
            return  # the next one begins with it
        if not plane.open and key not in plane.reloading:
            plane.reloading.append(key)
        if plane.ready:
            self._send(plane, _serve_order(RELOADED, model, key[1]))

    def _send_held(self) -> None:
        plane = self._current
        if plane is None or not plane.open or self._successor or self._replacing:
            return
        held, self._held = self._held, []
        for wanted in held:
            self._asked[wanted.ticket] = wanted
            self._send(plane, wanted.order())

    def _send(self, plane: _Plane, order: Order) -> None:
        try:
            plane.process.send(order)
        except ChannelClosed:
            log.debug("data plane %d is gone; its end is on the way", plane.process.pid)

    # ------------------------------------------------------------ replacing and stopping
    def _replace_if_quiet(self) -> None:
        """Start the successor once every order is answered: it begins with what serves now."""
        if not self._replacing or self._asked:
            return
        self._replacing = False
        if self._current and self._current.open and not self._successor:
            self._successor = self._launch()  # otherwise a new one is on its way already, or none is wanted

    def _take_over(self, plane: _Plane) -> None:
        old, self._current, self._successor = self._current, plane, None
        for shadow in self._shadows.values():
            self._send(plane, msgspec.structs.replace(shadow, ticket=RELOADED))
        if old:
            self._leave(old)

    def _leave(self, plane: _Plane) -> None:
        plane.draining = True
        self._leaving.append(plane)
        self._send(plane, Drain())

    def _begin_stop(self) -> None:
        self._stopping_until = self._clock() + self._stop_seconds
        self._next_start = None
        self._shadows.clear()
        planes = [plane for plane in (self._current, self._successor) if plane]
        self._current = self._successor = None
        for plane in planes:
            self._leave(plane)

    def _is_over(self) -> bool:
        if self._stopping_until is None:
            return False
        if self._clock() >= self._stopping_until:
            for plane in self._planes():
                plane.process.kill()
            self._stopping_until = self._clock() + self._stop_seconds
        return not self._planes()


def _last_words(plane: _Plane) -> str:
    hung = plane.hung
    return f"{hung.model} {hung.version} hung: one invoke took more than {hung.seconds:g} s" if hung else ""


def _serve_order(ticket: int, model: StoredModel, alias: str) -> Serve:
    return Serve(
        ticket=ticket,
        model=model.manifest.model,
        version=model.manifest.version,
        digest=model.digest,
        folder=model.folder,
        alias=alias,
        runtime=model.rung.runtime.value if model.rung else "",
        threads=model.rung.threads if model.rung else 0,
    )
