"""Asks devices to do something once, and keeps what became of it.

A command is stored, then signed and sent; it is sent again, signed anew, whenever its device or the broker comes
back, until it is answered or its time is over. The device carries it out once, however often it comes. Its sequence
is the server's clock when that is higher than one more than the last, so that a server restored from a backup is
still believed.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_server.api_types import CommandRequest, CommandView
from fleet_server.ports import CommandRecord, CommandSigner, CommandStore, CommandUplink, Registry
from protocol.commands import Command, describe
from protocol.states import CommandState

MAX_LISTED = 200
_log = logging.getLogger(__name__)


class CannotCommand(Exception):
    """The device cannot be asked; the text says why. Nothing was stored."""


@dataclass(frozen=True, kw_only=True)
class Commands:
    """The driver. ``new_id`` makes ids of commands; ``is_ready`` tells whether devices can verify what is signed."""

    registry: Registry
    store: CommandStore
    signer: CommandSigner
    uplink: CommandUplink
    new_id: Callable[[], str]
    is_ready: Callable[[], bool]
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def give(self, device_id: str, request: CommandRequest, by: str, now: int) -> CommandView:
        """Store a command and send it. Raises `CannotCommand`."""
        self._check(device_id)
        with self._turn:
            command = Command(
                device=device_id,
                id=self.new_id(),
                sequence=max(self.store.highest(device_id) + 1, now),
                issued=now,
                expires=now + 1000 * request.life_seconds,
                command=request.command,
            )
            record = CommandRecord(command=command, by=by)
            self.store.add(record)
            self._send(command, now)
        _log.info("command %s to %s: %s (by %s)", command.id, device_id, describe(command.command), by)
        return _view(record, now)

    def of(self, device_id: str, limit: int, now: int) -> tuple[CommandView, ...]:
        """Return the newest commands to a device, newest first."""
        return tuple(_view(record, now) for record in self.store.newest(device_id, min(limit, MAX_LISTED)))

    def send_waiting(self, device_id: str | None, now: int) -> None:
        """Send again what is not answered: to a device that came back, or (None) to all, through a new connection."""
        with self._turn:
            for command in self.store.waiting(device_id, now):
                self._send(command, now)

    def _check(self, device_id: str) -> None:
        device = self.registry.device(device_id)
        if device is None:
            raise CannotCommand(f"there is no device {device_id[:80]!r}")
        if device.revoked:
            raise CannotCommand(f"{device_id} is revoked")
        if not self.is_ready():
            raise CannotCommand("the trust roots are missing; make them once with: edgewarden keys init --dir KEYS")

    def _send(self, command: Command, now: int) -> None:
        left = -(-(command.expires - now) // 1000)
        self.uplink.send_command(command.device, self.signer.sign_command(command), life_seconds=max(1, left))


def _view(record: CommandRecord, now: int) -> CommandView:
    command = record.command
    return CommandView(
        id=command.id,
        device=command.device,
        command=describe(command.command),
        by=record.by,
        issued_at=command.issued,
        expires_at=command.expires,
        state=_state(record, now),
        reason=record.reason,
        detail=record.detail,
        answered_at=record.answered_at,
    )


def _state(record: CommandRecord, now: int) -> CommandState:
    if record.outcome is not None:
        return CommandState(record.outcome.value)
    return CommandState.EXPIRED if record.command.expires <= now else CommandState.WAITING
