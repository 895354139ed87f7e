"""Which commands a device carries out, and what it remembers of them. Pure.

A command is carried out *at most once after it is remembered*: the driver keeps the ledger that `accept` returns on
the disk before it acts. When the power goes in between, or before the outcome is known, nobody can tell how far it
came; then `resume` answers that it was interrupted, and only a new command tries again.

Whether a command is signed as it must be is settled before it gets here.
"""

from dataclasses import dataclass, replace

from protocol.commands import MAX_LIFE_MS, Command
from protocol.states import CommandOutcome, RejectReason

REMEMBERED = 32  # commands whose outcome is known again when they come again

_INTERRUPTED = "the agent ended before the outcome was known; it is not tried again"


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """A command that was accepted, and what became of it."""

    id: str
    sequence: int
    outcome: CommandOutcome | None = None  # None: it is under way
    detail: str = ""
    told: bool = False  # the reply is in the spool


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All that is remembered, oldest first."""

    highest: int = 0  # sequence accepted; a lower one never counts again
    commands: tuple[Remembered, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Carry it out, once it is remembered."""


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """It came before: say again what became of it, if that is known."""

    known: Remembered


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Do nothing, and say why."""

    reason: RejectReason
    detail: str


def judge(ledger: Ledger, command: Command, *, device: str, at: int) -> Accepted | Repeated | Refused:
    """Say what is to be done about a well-signed command. ``at``: UTC ms, never before the clock's floor."""
    if command.device != device:
        return Refused(reason=RejectReason.WRONG_DEVICE, detail=f"this is {device}; the command is not for it")
    known = _find(ledger, command.id)
    if known and known.sequence == command.sequence:
        return Repeated(known=known)
    return _object_to(ledger, command, at) or Accepted()


def accept(ledger: Ledger, command: Command) -> Ledger:
    """Remember a command that `judge` accepted; the oldest make place."""
    new = Remembered(id=command.id, sequence=command.sequence)
    return Ledger(highest=command.sequence, commands=(*ledger.commands, new)[-REMEMBERED:])


def end(ledger: Ledger, command: str, outcome: CommandOutcome, detail: str) -> Ledger:
    """Remember what became of a command."""
    return _change(ledger, command, outcome=outcome, detail=detail)


def tell(ledger: Ledger, command: str) -> Ledger:
    """Remember that its reply is on its way for good."""
    return _change(ledger, command, told=True)


def resume(ledger: Ledger) -> Ledger:
    """Return the ledger as a start of the agent finds it: what was under way has ended."""
    for one in ledger.commands:
        if one.outcome is None:
            ledger = end(ledger, one.id, CommandOutcome.INTERRUPTED, _INTERRUPTED)
    return ledger


def untold(ledger: Ledger) -> tuple[Remembered, ...]:
    """Return the commands whose outcome the server has not been told."""
    return tuple(one for one in ledger.commands if one.outcome is not None and not one.told)


def _object_to(ledger: Ledger, command: Command, at: int) -> Refused | None:
    if not 0 < command.expires - command.issued <= MAX_LIFE_MS:
        return Refused(reason=RejectReason.MALFORMED, detail="the command expires before it is issued, or too late")
    if command.expires <= at:
        late = (at - command.expires) // 1000
        return Refused(reason=RejectReason.EXPIRED, detail=f"the command expired {late} s ago")
    if _find(ledger, command.id):
        return Refused(reason=RejectReason.REPLAYED, detail=f"id {command.id} was used by another command")
    if command.sequence <= ledger.highest:
        detail = f"sequence {command.sequence} comes after {ledger.highest}"
        return Refused(reason=RejectReason.REPLAYED, detail=detail)
    return None


def _find(ledger: Ledger, command: str) -> Remembered | None:
    return next((one for one in ledger.commands if one.id == command), None)


def _change(ledger: Ledger, command: str, **changes: object) -> Ledger:
    commands = tuple(
        replace(one, **changes) if one.id == command else one  # type: ignore[arg-type]  # mypy cannot see the names
        for one in ledger.commands
    )
    return replace(ledger, commands=commands)
