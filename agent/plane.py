"""One data plane process, as the supervisor follows it: what is known of it, told to it, heard from it.

What is heard goes into one inbox, read by a thread for each process. What to tell is decided elsewhere.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.agenda import Key
from agent.channel import Answer, ChannelClosed, Drain, Hung, Order, Prepare, Ready
from agent.ports import DataPlaneProcess

log = logging.getLogger(__name__)

LEAVE_SECONDS = 5.0  # between the end of the channel and the end of the process


@dataclass(kw_only=True, eq=False)
class Plane:
    """What the supervisor knows of one process. All but `listen` is for its thread."""

    process: DataPlaneProcess
    started: float
    reloading: list[Key] = field(default_factory=list)  # what it was ordered to serve and does not, in that order
    ready: Ready | None = None
    open: bool = False  # accepts clients
    draining: bool = False
    hung: Hung | None = None  # its last words
    spare: bool = False  # waits to be needed; nobody else knows of it
    prepared: Prepare | None = None  # what it was told to import
    unheard: bool = False  # was a spare and has not answered since: it may have died before it stepped in

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, *orders: Order) -> None:
        """Send orders; one that is gone gets none, and its end is on the way."""
        try:
            for order in orders:
                self.process.send(order)
        except ChannelClosed:
            log.debug("data plane %d is gone; its end is on the way", self.pid)

    def drain(self) -> None:
        """Let it finish what it does, and end."""
        self.draining = True
        self.send(Drain())

    @property
    def last_words(self) -> str:
        """Return what it said of its end."""
        hung = self.hung
        return f"{hung.model} {hung.version} hung: one invoke took more than {hung.seconds:g} s" if hung else ""

    def log_end(self, returncode: int, *, planned: bool) -> None:
        """Tell people that it ended."""
        level = logging.INFO if planned else logging.WARNING
        log.log(level, "%s %d ended: %d", "spare" if self.spare else "data plane", self.pid, returncode)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A data plane has said something."""

    plane: Plane
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A data plane is no more; nothing is heard from it after this."""

    plane: Plane
    returncode: int


def follow(plane: Plane, put: Callable[[Answered | Ended], None]) -> None:
    """Hand on what a data plane says and how it ends, from a thread of its own."""
    name = f"data-plane-{plane.pid}"
    threading.Thread(target=_listen, args=(plane, put), name=name, daemon=True).start()


def _listen(plane: Plane, put: Callable[[Answered | Ended], None]) -> None:
    try:
        while True:
            put(Answered(plane=plane, answer=plane.process.receive()))
    except ChannelClosed:
        returncode = plane.process.wait(LEAVE_SECONDS)
    if returncode is None:
        plane.process.kill()
        returncode = plane.process.wait()
    put(Ended(plane=plane, returncode=-1 if returncode is None else returncode))
