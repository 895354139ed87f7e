"""Has the governor told how this machine is, and the data plane how hard to work.

Drives `agent.core.governor` and the ports `Sensors`, `Governed` and `EventLog`. The sensors are read on one thread,
since some take their time; everything else happens on the control process's main one. What is too much, and what is
done about it, is decided in core.
"""

import logging
from dataclasses import dataclass

from agent.channel import Govern
from agent.core.governor import Governor, Readings
from agent.ports import EventLog, Governed, Sensors
from protocol.states import EventKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Felt:
    """Readings, and when they were taken: seconds of a clock that never goes back."""

    readings: Readings
    at: float


class Governing:
    """Orders something only when that changes; says so only when the level does."""

    def __init__(self, *, sensors: Sensors, governor: Governor, plane: Governed, events: EventLog) -> None:
        """Order nothing yet."""
        self._sensors = sensors
        self._governor = governor
        self._plane = plane
        self._events = events
        self._ordered: Govern | None = None

    def feel(self, at: float) -> Felt:
        """Read the sensors; any thread, one at a time."""
        return Felt(readings=self._sensors.read(), at=at)

    def decide(self, felt: Felt) -> None:
        """Take readings, record the step that follows and give the order. Call about once a second."""
        if step := self._governor.take(felt.readings, felt.at):
            log.log(logging.WARNING if step.after.rank > step.before.rank else logging.INFO, "%s", step.said)
            self._events.record(kind=EventKind.GOVERNOR, detail=step.said)
        order = Govern(level=self._governor.level, measures=self._governor.measures)
        if order != self._ordered:
            self._ordered = order
            self._plane.govern(order)
