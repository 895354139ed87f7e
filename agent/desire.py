"""Turns what arrives on ``down/want`` into a verified desire, or into an event that says why not.

Runs on the main thread; verification (it may fetch metadata) runs in the background, one at a time, the newest
message wins. A refusal is final for that message and told once; weather is waited out with back-off. What to do about
a verified desire is the updater's business, what counts as verified is the `Trust` adapter's.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.facts import VerifiedDesire
from agent.core.retry import BackOff
from agent.ports import Background, EventLog, Refusal, Trouble, Trust, Weather
from protocol.codec import BadMessage, decode_desired_state
from protocol.states import EventKind, RejectReason

log = logging.getLogger(__name__)

BACK_OFF = BackOff(first=2.0, ceiling=300.0)  # seconds, while the Image repository cannot be reached


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    payload: bytes
    desire: VerifiedDesire | None = None
    refusal: Refusal | None = None
    weather: str = ""


class Desires:
    """The newest desired state that arrived, until it is verified or refused."""

    def __init__(
        self,
        *,
        trust: Trust,
        background: Background,
        events: EventLog,
        verified: Callable[[VerifiedDesire], None],
        clock: Callable[[], int],
        random: Callable[[], float],
    ) -> None:
        """``verified`` is called on the main thread; ``clock`` gives UTC ms; ``random`` numbers in [0, 1)."""
        self._trust = trust
        self._background = background
        self._events = events
        self._verified = verified
        self._clock = clock
        self._random = random
        self._pending: bytes | None = None
        self._busy = False
        self._failures = 0
        self._due = 0

    def arrived(self, payload: bytes, now: int) -> None:
        """Take a message; an older one that still waits is forgotten, since each is the full desired state."""
        log.info("a desired state arrived: %d bytes", len(payload))
        self._pending, self._failures, self._due = payload, 0, now
        self.tick(now)

    def tick(self, now: int) -> None:
        """Start a verification that is due."""
        if self._pending is None or self._busy or now < self._due:
            return
        payload, self._busy = self._pending, True
        self._background.submit("verify the desired state", lambda: self._verify(payload), self._done)

    def _verify(self, payload: bytes) -> _Outcome:
        try:
            message = decode_desired_state(payload)
            return _Outcome(payload=payload, desire=self._trust.verify(message, self._clock()))
        except BadMessage as error:
            return _Outcome(payload=payload, refusal=Refusal(RejectReason.MALFORMED, str(error)))
        except Refusal as refusal:
            return _Outcome(payload=payload, refusal=refusal)
        except (Weather, Trouble) as error:
            return _Outcome(payload=payload, weather=str(error))
        except Exception as error:  # a bug in verification must not stop later, good messages
            log.exception("verification failed")
            return _Outcome(payload=payload, weather=f"internal error: {error!r}")

    def _done(self, outcome: _Outcome) -> None:
        self._busy = False
        if outcome.weather:
            self._wait(outcome.weather)
        elif self._pending is outcome.payload:
            self._pending = None
        if outcome.refusal:
            self._tell(outcome.refusal)
        if outcome.desire:
            self._verified(outcome.desire)
        self.tick(self._clock())

    def _wait(self, weather: str) -> None:
        self._failures += 1
        pause = BACK_OFF.delay(self._failures, self._random())
        self._due = self._clock() + int(pause * 1000)
        log.warning("the desired state cannot be verified yet: %s; trying again in %.0f s", weather, pause)

    def _tell(self, refusal: Refusal) -> None:
        log.warning("refused a desired state: %s", refusal)
        self._events.record(kind=EventKind.REFUSED, reason=refusal.reason, detail=refusal.detail)
