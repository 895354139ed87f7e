"""Keeps this device a member: renews its certificate, learns of new CAs, and finds out when it was shut out.

Each renewal is for a fresh key: a copy of the old one that somebody took is then worth nothing, and if the thief
renews first, the device is refused and says so. `core/renewal.py` decides when. The story of a renewal: the next key
is stored, a request signed with the key in force goes out, the answer is stored in one step, the connections are made
anew, and the first request with the new key ends the old one on the server. Cut short anywhere, it is told again from
the beginning with the same next key. Nothing here ever stops what serves.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from math import inf

from agent.core.renewal import Lease, Situation, Step, next_step, rest_after_failure, rest_after_refusal
from agent.ports import Background, Credentials, EventLog, MembershipServer, Refusal, ShutOut, Trouble, Weather
from protocol.device_api import RenewRequest
from protocol.states import EventKind

log = logging.getLogger(__name__)


class _Kind(Enum):
    """What came of an attempt."""

    RENEWED = "renewed"
    KNOWN = "known"
    SHUT_OUT = "shut out"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """It, and what was said."""

    kind: _Kind
    said: str = ""
    is_behind: bool = False  # the server has CAs that are not held here, or has dropped one that is
    retry_after: float | None = None


@dataclass
class _Memory:
    """What was tried, in seconds of the monotonic clock."""

    tried: float = -inf
    rest: float = 0.0
    failures: int = 0
    answered: float = -inf
    renewed: float = -inf
    connected: float = -inf
    wanted: bool = False
    busy: bool = False


class Renewing:
    """The driver; everything but the requests runs on the main thread."""

    def __init__(
        self,
        *,
        device: str,
        server: MembershipServer,
        credentials: Credentials,
        lease: Callable[[], Lease],
        connected: Callable[[], bool],
        renewed: Callable[[], None],
        background: Background,
        events: EventLog,
        clock_floor: Callable[[], int],
        monotonic: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        """``renewed`` is called when a new identity lies on the disk; ``random`` is in [0, 1)."""
        self._device = device
        self._server = server
        self._credentials = credentials
        self._lease = lease
        self._connected = connected
        self._renewed = renewed
        self._background = background
        self._events = events
        self._clock_floor = clock_floor
        self._monotonic = monotonic
        self._random = random
        self._memory = _Memory(connected=monotonic())
        self._shut_out = ""

    @property
    def shut_out(self) -> str:
        """Return what the server said when it refused this device; empty while it does not."""
        return self._shut_out

    def renew_now(self) -> None:
        """Renew as soon as may be, whatever the certificate's age."""
        memory = self._memory
        memory.wanted, memory.renewed, memory.rest = True, -inf, 0.0

    def doubt(self) -> None:
        """The broker refuses this device: ask the server soon whether it is still a member."""
        if not self._shut_out:
            self._memory.answered = -inf

    def tick(self, now: int) -> None:
        """Look at the time (UTC ms), and act when it has come."""
        memory, monotonic = self._memory, self._monotonic()
        if self._connected():
            memory.connected = monotonic
        if memory.busy:
            return
        step = next_step(self._situation(monotonic), max(now, self._clock_floor()))
        if step is not Step.WAIT:
            memory.busy, memory.tried = True, monotonic
            work = self._try_renewing if step is Step.RENEW else self._try_asking
            self._background.submit(f"membership: {step.value}", work, self._take)

    def _situation(self, monotonic: float) -> Situation:
        memory = self._memory
        return Situation(
            lease=self._lease(),
            wanted=memory.wanted,
            shut_out=bool(self._shut_out),
            since_answer=monotonic - memory.answered,
            since_renewal=monotonic - memory.renewed,
            cut_off=monotonic - memory.connected,
            rested=monotonic - memory.tried,
            rest=memory.rest,
        )

    # ------------------------------------------------------------ in the background
    def _try_renewing(self) -> _Outcome:
        return self._attempt(self._renew)

    def _try_asking(self) -> _Outcome:
        return self._attempt(self._ask)

    def _attempt(self, what: Callable[[], _Outcome]) -> _Outcome:
        try:
            return what()
        except ShutOut as error:
            return _Outcome(kind=_Kind.SHUT_OUT, said=str(error))
        except Weather as error:
            return _Outcome(kind=_Kind.FAILED, said=str(error), retry_after=error.retry_after)
        except (Trouble, Refusal) as error:
            return _Outcome(kind=_Kind.FAILED, said=str(error))

    def _renew(self) -> _Outcome:
        request = RenewRequest(csr=self._credentials.request(self._device))
        self._credentials.renew(self._server.renew(request))
        return _Outcome(kind=_Kind.RENEWED)

    def _ask(self) -> _Outcome:
        return _Outcome(kind=_Kind.KNOWN, is_behind=not self._credentials.holds(self._server.standing().ca))

    # ------------------------------------------------------------ what came of it
    def _take(self, outcome: _Outcome) -> None:
        memory, monotonic = self._memory, self._monotonic()
        memory.busy, memory.rest = False, 0.0
        memory.failures = memory.failures + 1 if outcome.kind is _Kind.FAILED else 0
        if outcome.kind is not _Kind.FAILED:
            memory.answered = monotonic
        match outcome.kind:
            case _Kind.RENEWED:
                self._memory = replace(
                    memory, wanted=False, renewed=monotonic, answered=-inf
                )  # use the new key at once
                self._member_again()
                self._renewed()
                self._tell("the certificate was renewed")
            case _Kind.KNOWN:
                memory.wanted = memory.wanted or outcome.is_behind
                self._member_again()
            case _Kind.SHUT_OUT:
                memory.rest = rest_after_refusal(self._random())
                self._refused(outcome.said)
            case _Kind.FAILED:
                memory.rest = rest_after_failure(memory.failures, self._random(), outcome.retry_after)
                log.warning("the server could not be asked about this device's certificate: %s", outcome.said)

    def _refused(self, said: str) -> None:
        if said != self._shut_out:
            self._shut_out = said
            self._tell(f"the fleet server refuses this device, which serves on: {said}")

    def _member_again(self) -> None:
        if self._shut_out:
            self._shut_out = ""
            self._tell("the fleet server takes this device for a member again")

    def _tell(self, detail: str) -> None:
        log.warning("%s", detail)
        self._events.record(kind=EventKind.AGENT, detail=detail)
