"""Says that the disk refuses what must be on it, for as long as it does, and says when it takes it again.

Those who write tell it of each refusal and try again by themselves; here it is put into one sentence for the fleet,
for the birth and for ``edgewarden-agent status``. A disk counts as well again when it has taken a trial write after a
while without a refusal. All methods run on the main thread.
"""

import logging
from collections.abc import Callable

from agent.ports import EventLog, Trouble
from protocol.states import EventKind

log = logging.getLogger(__name__)

QUIET_SECONDS = 6.0  # without a refusal, before a trial write; longer than any writer waits to try again


class DiskWatch:
    """What stands in the way of writing, if anything."""

    def __init__(
        self,
        *,
        trial: Callable[[], None],
        events: EventLog,
        changed: Callable[[], None],
        monotonic: Callable[[], float],
    ) -> None:
        """``trial`` writes and raises `Trouble`; ``changed`` is called when it begins and when it ends."""
        self._trial = trial
        self._events = events
        self._changed = changed
        self._monotonic = monotonic
        self._quiet_since = 0.0
        self.trouble = ""  # a sentence with its remedy; empty while all is well

    def refused(self, trouble: Trouble) -> None:
        """The disk refused something; told once until it has passed."""
        self._quiet_since = self._monotonic()
        if self.trouble:
            return
        self.trouble = str(trouble)
        log.error("%s", trouble)
        self._events.record(kind=EventKind.AGENT, detail=self.trouble)
        self._changed()

    def tick(self) -> bool:
        """Look whether it has passed; True when it has just done so."""
        if not self.trouble or self._monotonic() - self._quiet_since < QUIET_SECONDS:
            return False
        try:
            self._trial()
        except Trouble:
            self._quiet_since = self._monotonic()
            return False
        log.info("the disk takes what is written again")
        self.trouble = ""
        self._events.record(kind=EventKind.AGENT, detail="the disk takes what is written again")
        self._changed()
        return True
