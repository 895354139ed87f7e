"""Has a spare data plane wait beside the one that serves: starts it, keeps it prepared, hands it over, lets it go.

It has imported everything and has no model, no settings and no clients; its end is nobody else's business. Whether
one is had now is decided in `core.sparing`; the supervisor's thread alone comes here.
"""

import logging
from collections.abc import Callable

from agent.agenda import Key
from agent.channel import Answer, Prepare, Ready
from agent.core.sparing import HEALTHY_SECONDS, SpareFacts, Step, decide
from agent.plane import Plane

log = logging.getLogger(__name__)

STUCK_SECONDS = 30.0  # a spare that is not ready by then is not waited for


class Spare:
    """The place for one spare."""

    def __init__(
        self,
        *,
        wanted: bool,
        launch: Callable[[], Plane | None],
        preparation: Callable[[], Prepare],
        memory_available: Callable[[], int | None],
        clock: Callable[[], float],
        calm_seconds: float,
    ) -> None:
        """Start nothing yet; nothing ever unless ``wanted``. ``preparation``: what it would need now."""
        self.next_look: float | None = None  # when to think of it again; None: when something happens
        self._wanted = wanted
        self._launch = launch
        self._preparation = preparation
        self._memory_available = memory_available
        self._clock = clock
        self._calm_seconds = calm_seconds
        self._plane: Plane | None = None
        self._calm_since = 0.0  # when a model was loaded last
        self._failures = 0  # spares that died young, one after the other
        self._failed_at = 0.0

    @property
    def plane(self) -> Plane | None:
        """Return the process that waits, if there is one."""
        return self._plane

    # ------------------------------------------------------------ looking after it
    def stir(self) -> None:
        """Something was loaded or opened: it is thought of again when things have calmed down."""
        self._calm_since = self._clock()
        if self._wanted:
            self.next_look = self._calm_since

    def rest(self) -> None:
        """Think of it no more."""
        self.next_look = None

    def is_due(self) -> bool:
        """Tell whether it is time to look."""
        return self.next_look is not None and self._clock() >= self.next_look

    def look(self, *, serves: bool, settled: bool, restarts: int, eased: bool, short: bool) -> Plane | None:
        """Do what is decided now (the facts are those of `SpareFacts`); return a spare that is let go."""
        decision = decide(
            SpareFacts(
                now=self._clock(),
                serves=serves,
                waits=self._plane is not None,
                calm_since=self._calm_since if settled else None,
                calm=self._calm_seconds,
                restarts=restarts,
                failures=self._failures,
                failed_at=self._failed_at,
                available=self._memory_available(),
                eased=eased,
                short=short,
            )
        )
        self.next_look = decision.again
        if decision.step is Step.LET_GO:
            return self.take_out()
        if decision.step is Step.START:
            self._plane = self._launch()
        self._prepare()
        return None

    def hear(self, plane: Plane, answer: Answer) -> None:
        """Take what a spare says: all it can say is that it is ready."""
        if isinstance(answer, Ready):
            plane.ready = answer
            self._prepare()

    def _prepare(self) -> None:
        """Have it import what it would need if it had to step in now."""
        plane, preparation = self._plane, self._preparation()
        if plane and plane.ready and plane.prepared != preparation:
            plane.prepared = preparation
            plane.send(preparation)

    # ------------------------------------------------------------ its end as a spare
    def promote(self, reloading: list[Key]) -> Plane | None:
        """Return it as the data plane that serves from now on, if there is one and it lives."""
        plane = self.take_out()
        if plane is None or plane.process.wait(0) is not None:
            return None
        if not plane.ready and self._clock() - plane.started > STUCK_SECONDS:
            plane.process.kill()
            return None
        log.info("data plane %d, the spare, steps in", plane.pid)
        plane.spare, plane.unheard = False, True
        plane.started, plane.reloading = self._clock(), reloading
        self._failures = 0
        return plane

    def take_out(self) -> Plane | None:
        """Return it, and have none any more."""
        plane, self._plane = self._plane, None
        return plane

    def ended(self, plane: Plane) -> None:
        """It died while it waited: another follows, ever later."""
        if plane is self._plane:
            self._plane = None
        is_young = self._clock() - plane.started < HEALTHY_SECONDS
        self._failures = self._failures + 1 if is_young else 1
        self._failed_at = self._clock()
        if self._wanted:
            self.next_look = self._failed_at
