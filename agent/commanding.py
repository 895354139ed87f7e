"""Carries out the commands that arrive on ``down/cmd``, each at most once, and replies.

Runs on the main thread. Which command counts is decided in `agent.core.commands`, whether it is signed as it must be
by the `CommandTrust` adapter. The order is everything: first the ledger is on the disk, then the command is carried
out, then its outcome is on the disk, then the reply is in the spool; a start goes on with whatever was left undone.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from agent.channel import SelfTested
from agent.core.commands import Accepted, Refused, Remembered, Repeated, accept, end, judge, resume, tell, untold
from agent.ports import (
    CommandedPlane,
    CommandMemory,
    CommandTrust,
    DataPlaneExit,
    EventLog,
    Refusal,
    RenewNow,
    Replies,
    Trouble,
)
from protocol.commands import Command, RenewCertificateCommand, RestartDataPlaneCommand, SelfTestCommand, describe
from protocol.states import CommandOutcome, EventKind, RejectReason

log = logging.getLogger(__name__)

PATIENCE = 120.0  # seconds that the data plane has for a command; a restart may have to load models
MAX_WAITING = 32  # replies in the spool; then nobody is answered a second time, and no refusal is
QUIET = 10.0  # seconds between two events for the same reason: who floods the topic must not fill the spool


@dataclass(frozen=True, kw_only=True)
class _Underway:
    command: str
    until: float  # monotonic
    replaces: int | None = None  # pid of the data plane that a restart is to end
    renews: bool = False


class Commanding:
    """The commands of one device."""

    def __init__(
        self,
        *,
        device: str,
        trust: CommandTrust,
        memory: CommandMemory,
        plane: CommandedPlane,
        renewal: RenewNow,
        replies: Replies,
        events: EventLog,
        clock_floor: Callable[[], int],
        monotonic: Callable[[], float],
    ) -> None:
        """``clock_floor`` gives the UTC ms before which it cannot be, ``monotonic`` seconds that never go back."""
        self._device = device
        self._trust = trust
        self._memory = memory
        self._plane = plane
        self._renewal = renewal
        self._replies = replies
        self._events = events
        self._clock_floor = clock_floor
        self._monotonic = monotonic
        self._ledger = memory.load()
        self._underway: dict[int, _Underway] = {}  # by ticket
        self._ticket = 0  # counts down: the update machine's tickets are above
        self._told: dict[RejectReason, float] = {}  # when a refusal was last an event

    def start(self) -> None:
        """Go on after a start: what was under way was interrupted, and is said to be."""
        self._ledger = resume(self._ledger)
        self._tell_all()

    def arrived(self, payload: bytes, now: int) -> None:
        """Take a message. Raises `Trouble` when the disk refuses; then nothing was done."""
        at = max(now, self._clock_floor())
        try:
            command = self._trust.open(payload, at)
        except Refusal as refusal:
            self._complain(refusal.reason, refusal.detail)
            return
        match judge(self._ledger, command, device=self._device, at=at):
            case Accepted():
                self._begin(command)
            case Repeated(known=known):
                self._say_again(known)
            case Refused(reason=reason, detail=detail):
                self._refuse(command, reason, detail)

    def tested(self, told: SelfTested) -> None:
        """The data plane has run a model's golden samples."""
        ours = self._underway.pop(told.ticket, None)
        if ours:
            outcome = CommandOutcome.DONE if told.passed else CommandOutcome.FAILED
            self._end(ours.command, outcome, told.detail if told.passed is not None else f"not run: {told.detail}")

    def plane_ended(self, told: DataPlaneExit) -> None:
        """A data plane has ended: as it was asked to, or by itself."""
        for ticket, ours in list(self._underway.items()):
            if ours.replaces is None or (ours.replaces != told.pid and told.planned):
                continue
            del self._underway[ticket]
            if told.planned:
                self._end(ours.command, CommandOutcome.DONE, f"{told.pid} was replaced by {self._plane.pid}")
            else:
                detail = f"data plane {told.pid} ended with code {told.returncode} {told.detail}".rstrip()
                self._end(ours.command, CommandOutcome.FAILED, detail)

    def renewed(self) -> None:
        """The device has a new certificate."""
        for ticket, ours in list(self._underway.items()):
            if ours.renews:
                del self._underway[ticket]
                self._end(ours.command, CommandOutcome.DONE, "the certificate was renewed")

    def tick(self) -> None:
        """Give up on what takes too long, and say what could not be said yet. Call about once a second."""
        now = self._monotonic()
        for ticket, ours in list(self._underway.items()):
            if now >= ours.until:
                del self._underway[ticket]
                self._end(ours.command, CommandOutcome.FAILED, f"no answer within {PATIENCE:.0f} s")
        self._tell_all()

    # ------------------------------------------------------------ doing
    def _begin(self, command: Command) -> None:
        ledger = accept(self._ledger, command)
        self._memory.save(ledger)
        self._ledger = ledger
        log.info("command %s: %s", command.id, describe(command.command))
        match command.command:
            case SelfTestCommand(model=model):
                self._plane.self_test(self._expect(command), model)
            case RestartDataPlaneCommand():
                self._restart(command)
            case RenewCertificateCommand():
                self._expect(command, renews=True)
                self._renewal.renew_now()

    def _restart(self, command: Command) -> None:
        pid = self._plane.pid
        if pid is None:
            self._end(command.id, CommandOutcome.FAILED, "there is no data plane now; a new one is being started")
            return
        self._expect(command, replaces=pid)
        self._plane.restart_planned()

    def _expect(self, command: Command, *, replaces: int | None = None, renews: bool = False) -> int:
        self._ticket -= 1
        until = self._monotonic() + PATIENCE
        self._underway[self._ticket] = _Underway(command=command.id, until=until, replaces=replaces, renews=renews)
        return self._ticket

    # ------------------------------------------------------------ saying
    def _end(self, command: str, outcome: CommandOutcome, detail: str) -> None:
        log.info("command %s: %s, %s", command, outcome.value, detail)
        self._ledger = end(self._ledger, command, outcome, detail)
        self._tell_all()

    def _tell_all(self) -> None:
        """Put what is not told yet on the disk, then into the spool; when the disk refuses, at the next tick."""
        waiting = untold(self._ledger)
        if not waiting:
            return
        try:
            self._memory.save(self._ledger)
            for one in waiting:
                self._reply(one)
                self._ledger = tell(self._ledger, one.id)
            self._memory.save(self._ledger)
        except Trouble as trouble:
            log.error("the reply to a command waits: %s", trouble)

    def _say_again(self, known: Remembered) -> None:
        """Reply once more, as far as there is room: what is not told yet is under way already."""
        if known.told and self._has_room():
            self._reply(known)

    def _reply(self, known: Remembered) -> None:
        assert known.outcome is not None  # only what has ended is told
        self._replies.reply(command=known.id, outcome=known.outcome, detail=known.detail)

    def _refuse(self, command: Command, reason: RejectReason, detail: str) -> None:
        self._complain(reason, detail)
        if reason is not RejectReason.WRONG_DEVICE and self._has_room():
            self._replies.reply(command=command.id, outcome=CommandOutcome.REFUSED, reason=reason, detail=detail)

    def _has_room(self) -> bool:
        return self._replies.replies_waiting < MAX_WAITING

    def _complain(self, reason: RejectReason, detail: str) -> None:
        log.warning("refused a command: %s: %s", reason.value, detail)
        now = self._monotonic()
        if now - self._told.get(reason, -QUIET) >= QUIET:
            self._told[reason] = now
            self._events.record(kind=EventKind.REFUSED, reason=reason, detail=f"a command: {detail}")
