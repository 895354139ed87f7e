"""Keeps a data plane running and serving what it should: starts, watches, restarts, replaces, has a spare.

One long-lived thread owns all state (and starts the children, which die with the thread that started them);
everything else reaches it through its inbox. A new process serves what served last before any client reaches it:
connections wait in the kernel's backlog until then. Who lives is decided here; what they are told is kept in
`agent.agenda`, and who waits to step in by `agent.spare`. What a crash means for a model on probation is decided by
the update machine, which hears of it by `DataPlaneExit`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

from agent.agenda import RELOADED, Agenda, Compared, Key, Wanted
from agent.channel import (
    STABLE,
    Answer,
    Configure,
    EndShadow,
    Govern,
    Hung,
    Open,
    Opened,
    Ready,
    Refused,
    SelfTest,
    Serving,
    Shadow,
)
from agent.core.sparing import CALM_SECONDS, HEALTHY_SECONDS
from agent.plane import Answered, Ended, Plane, follow
from agent.ports import DataPlaneExit, DataPlaneLauncher, StoredModel
from agent.spare import Spare

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.1  # before the second restart; the first is immediate
MAX_BACKOFF_SECONDS = 10.0
STOP_SECONDS = 12.0  # a drain takes 10 s at most; then it is killed

Event = Answer | DataPlaneExit


class _Replace:
    """A planned restart is asked for."""


class _Stop:
    """The agent ends."""


_Message = Answered | Ended | Wanted | Compared | Govern | _Replace | _Stop


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
        spare: bool = False,
        spare_calm_seconds: float = CALM_SECONDS,
        memory_available: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Start nothing yet. ``clock`` returns seconds; ``configuration`` goes to every data plane first.

        ``spare``: have one, when nothing has happened for so long and ``memory_available`` (bytes) allows it.
        """
        self._launcher = launcher
        self._post = post
        self._clock = clock
        self._first_backoff = first_backoff
        self._max_backoff = max_backoff
        self._stop_seconds = stop_seconds
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._agenda = Agenda(configuration)
        self._current: Plane | None = None
        self._successor: Plane | None = None
        self._leaving: list[Plane] = []
        self._replacing = False  # a planned restart waits until nothing is asked any more
        self._restarts = 0  # since the last healthy life
        self._next_start: float | None = None  # when to start again; None: not waiting
        self._stopping_until: float | None = None
        self._spare = Spare(
            wanted=spare,
            launch=lambda: self._launch(spare=True),
            preparation=self._agenda.preparation,
            memory_available=memory_available,
            clock=clock,
            calm_seconds=spare_calm_seconds,
        )

    # ------------------------------------------------------------ for other threads
    def start(self) -> None:
        """Start the data plane, in the background."""
        self._thread.start()

    def serve(self, ticket: int, model: StoredModel, alias: str = STABLE) -> None:
        """Order a bundle to serve; `Serving` or `Refused` with this ticket follows, unless the data plane dies first.

        Then `DataPlaneExit` is the answer, and whoever ordered decides whether to order again. Ticket `RELOADED` says
        that the bundle served before this start: it is loaded again after every death, and clients wait for it.
        """
        self._inbox.put(Wanted(ticket=ticket, name=model.manifest.model, model=model, alias=alias))

    def withdraw(self, ticket: int, model: str, alias: str = "") -> None:
        """Order a model, or only what has this alias, to stop serving; `Withdrawn` with this ticket follows."""
        self._inbox.put(Wanted(ticket=ticket, name=model, model=None, alias=alias))

    def shadow(self, order: Shadow) -> None:
        """Have a candidate compared; `Shadowing` follows, `ShadowDelta` each second, and `ShadowEnded` some day.

        It does not survive a data plane that dies: the candidate may be the cause.
        """
        self._inbox.put(Compared(ticket=order.ticket, name=order.model, wanted=order))

    def end_shadow(self, ticket: int, model: str) -> None:
        """Have a candidate compared no more; `ShadowEnded` with this ticket follows."""
        self._inbox.put(Compared(ticket=ticket, name=model, wanted=EndShadow(ticket=ticket, model=model)))

    def govern(self, order: Govern) -> None:
        """Have the data plane work less hard, or as it is set; one that is started later too."""
        self._inbox.put(order)

    def self_test(self, ticket: int, model: str) -> None:
        """Have the golden samples run where a model serves; `SelfTested` with this ticket follows."""
        self._inbox.put(Compared(ticket=ticket, name=model, wanted=SelfTest(ticket=ticket, model=model)))

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

    @property
    def spare_pid(self) -> int | None:
        """Return the process id of the spare, if one waits and has said that it is ready."""
        plane = self._spare.plane
        return plane.pid if plane and plane.ready else None

    # ------------------------------------------------------------ the thread
    def _run(self) -> None:
        self._next_start = self._clock()
        while not self._is_over():
            self._start_if_due()
            if self._spare.is_due():
                self._look_after_spare()
            try:
                message = self._inbox.get(timeout=self._patience())
            except Empty:
                continue
            self._handle(message)

    def _handle(self, message: _Message) -> None:
        match message:
            case Answered(plane=plane, answer=answer) if plane.spare:
                self._spare.hear(plane, answer)
            case Answered(plane=plane, answer=answer):
                self._on_answer(plane, answer)
            case Ended(plane=plane) if plane.spare:
                self._on_spare_end(plane, message.returncode)
            case Ended(plane=plane):
                self._on_end(plane, message.returncode)
            case Wanted(ticket=ticket, model=model) if ticket == RELOADED and model:
                self._adopt((message.name, message.alias), model)
            case Wanted() | Compared():
                self._agenda.hold(message)
                self._send_held()
            case Govern():
                self._govern(message)
            case _Replace():
                self._replacing = True
            case _Stop():
                self._begin_stop()
        self._replace_if_quiet()

    def _patience(self) -> float | None:
        moments = (self._next_start, self._spare.next_look, self._stopping_until)
        due = [moment for moment in moments if moment is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def _planes(self) -> list[Plane]:
        return [plane for plane in (self._current, self._successor, self._spare.plane, *self._leaving) if plane]

    # ------------------------------------------------------------ starting
    def _start_if_due(self) -> None:
        if self._next_start is not None and self._clock() >= self._next_start:
            self._next_start = None
            self._current = self._spare.promote(self._agenda.serving) or self._launch()
            if self._current is None:
                self._plan_restart()
            elif self._current.ready:
                self._brief(self._current)

    def _launch(self, *, spare: bool = False) -> Plane | None:
        try:
            process = self._launcher.launch()
        except OSError:
            log.exception("the data plane cannot be started")
            return None
        reloading = [] if spare else self._agenda.serving
        plane = Plane(process=process, started=self._clock(), reloading=reloading, spare=spare)
        follow(plane, self._inbox.put)
        return plane

    def _plan_restart(self) -> None:
        """First at once, then after 0.1 s, doubling."""
        wait = min(self._max_backoff, self._first_backoff * 2 ** (self._restarts - 1)) if self._restarts else 0.0
        self._restarts += 1
        self._next_start = self._clock() + wait

    def _brief(self, plane: Plane) -> None:
        """Tell a data plane what to do, and clients that it does."""
        plane.send(*self._agenda.first_orders(plane.reloading))
        if plane.ready:
            self._post(plane.ready)
        self._open_if_complete(plane)

    # ------------------------------------------------------------ hearing
    def _on_answer(self, plane: Plane, answer: Answer) -> None:
        is_moving = self._agenda.is_shadow_moving(answer, from_draining=plane.draining)
        self._agenda.hear(answer, in_office=plane is self._current)
        match answer:
            case Ready():
                plane.ready = answer
                self._brief(plane)
                return
            case Opened():
                self._on_opened(plane)
                return
            case Serving() | Refused():
                self._on_loaded(plane, answer)
            case Hung():
                plane.hung = answer
        if not is_moving:
            self._post(answer)
        self._open_if_complete(plane)

    def _on_loaded(self, plane: Plane, answer: Serving | Refused) -> None:
        key = (answer.model, answer.alias)
        if answer.ticket == RELOADED and key in plane.reloading:
            plane.reloading.remove(key)
        plane.unheard = False
        self._spare.stir()

    def _open_if_complete(self, plane: Plane) -> None:
        if not plane.ready or plane.reloading or plane.open or plane.draining:
            return
        plane.open = True
        self._agenda.absolve()
        plane.send(Open())
        self._send_held()
        self._spare.stir()

    def _on_opened(self, plane: Plane) -> None:
        """Only now may the one before it go: until here it alone held what is not inherited, such as gRPC's port."""
        if plane is self._successor:
            self._take_over(plane)
            self._send_held()
            self._spare.stir()

    def _on_end(self, plane: Plane, returncode: int) -> None:
        planned = plane.draining and returncode == 0
        plane.log_end(returncode, planned=planned)
        if plane is self._successor:
            self._successor = None  # the current one serves on
        elif plane in self._leaving:
            self._leaving.remove(plane)
        else:
            self._on_death(plane)
        self._post(DataPlaneExit(pid=plane.pid, returncode=returncode, planned=planned, detail=plane.last_words))
        self._send_held()

    def _on_death(self, plane: Plane) -> None:
        self._current = None
        if self._clock() - plane.started >= HEALTHY_SECONDS:
            self._restarts = 0
        if plane.ready and plane.reloading and not plane.unheard:
            self._post_all(self._agenda.blame(plane.reloading[0]))
        self._post_all(self._agenda.bury())
        if self._successor:
            self._current, self._successor = self._successor, None
        elif self._stopping_until is None:
            self._plan_restart()

    # ------------------------------------------------------------ ordering
    def _adopt(self, key: Key, model: StoredModel) -> None:
        """Count a bundle among those that served; a data plane that is not open yet waits for it."""
        order = self._agenda.adopt(key, model)
        plane = self._current
        if plane is None:
            return  # the next one begins with it
        if not plane.open and key not in plane.reloading:
            plane.reloading.append(key)
        if plane.ready:
            plane.send(order)

    def _govern(self, order: Govern) -> None:
        """One that is not ready is told in its first orders, and so is a spare that steps in."""
        if self._agenda.govern(order):
            self._spare.stir()
        for plane in (self._current, self._successor):
            if plane and plane.ready:
                plane.send(order)

    def _send_held(self) -> None:
        plane = self._current
        if plane is None or not plane.open or self._successor or self._replacing:
            return
        plane.send(*self._agenda.next_orders())

    def _post_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self._post(event)

    # ------------------------------------------------------------ the spare
    def _look_after_spare(self) -> None:
        current = self._current
        is_healthy = current and self._clock() - current.started >= HEALTHY_SECONDS
        gone = self._spare.look(
            serves=bool(self._agenda.serving),
            settled=bool(current and current.open and not self._successor and not self._replacing),
            restarts=0 if is_healthy else self._restarts,
            eased=self._agenda.is_eased,
            short=self._agenda.is_memory_short,
        )
        if gone:
            self._leave(gone)

    def _on_spare_end(self, plane: Plane, returncode: int) -> None:
        """Nobody asked it anything, so nobody hears of its end."""
        plane.log_end(returncode, planned=plane.draining)
        if plane in self._leaving:
            self._leaving.remove(plane)
        else:
            self._spare.ended(plane)

    # ------------------------------------------------------------ replacing and stopping
    def _replace_if_quiet(self) -> None:
        """Start the successor once every order is answered: it begins with what serves now."""
        if not self._replacing or not self._agenda.is_answered:
            return
        self._replacing = False
        if self._current and self._current.open and not self._successor:
            # Never the spare: nobody waits for a successor, and what is asked for is a process that is new.
            self._successor = self._launch()  # otherwise a new one is on its way already, or none is wanted

    def _take_over(self, plane: Plane) -> None:
        old, self._current, self._successor = self._current, plane, None
        plane.send(*self._agenda.moving_shadows())
        for one in (old, self._spare.take_out()):  # the spare is as old as the one that goes
            if one:
                self._leave(one)

    def _leave(self, plane: Plane) -> None:
        self._leaving.append(plane)
        plane.drain()

    def _begin_stop(self) -> None:
        self._stopping_until = self._clock() + self._stop_seconds
        self._next_start = None
        self._spare.rest()
        self._agenda.end_shadows()
        planes = (self._current, self._successor, self._spare.take_out())
        self._current = self._successor = None
        for plane in planes:
            if plane:
                self._leave(plane)

    def _is_over(self) -> bool:
        if self._stopping_until is None:
            return False
        if self._clock() >= self._stopping_until:
            for plane in self._planes():
                plane.process.kill()
            self._stopping_until = self._clock() + self._stop_seconds
        return not self._planes()
