"""Tells systemd how the agent is (sd_notify(3)), with the standard library only.

Does nothing when NOTIFY_SOCKET is unset, so that the agent runs the same in a terminal. Never raises: a supervisor
that cannot be told is no reason to stop.
"""

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

_MAX_STATUS = 200  # characters; systemctl shows one line


class Notifier:
    """Sends the agent's state to the socket that systemd named."""

    def __init__(self, address: str | None = None) -> None:
        """``address``: value of NOTIFY_SOCKET; None or empty when not started by systemd."""
        self._address = _decoded(address or "")

    @property
    def enabled(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def ready(self) -> None:
        """The agent is up."""
        self._send("READY=1")

    def status(self, sentence: str) -> None:
        """Show one line in ``systemctl status``."""
        line = " ".join(sentence.split())[:_MAX_STATUS]
        self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Pet the watchdog (WatchdogSec=)."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The agent begins to shut down."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(1.0)  # a wedged supervisor must not stop the agent
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            log.warning("systemd could not be told %s: %s", message, error)


def notifier_from(environment: Mapping[str, str] = os.environ) -> Notifier:
    """Return the notifier for this process."""
    return Notifier(environment.get("NOTIFY_SOCKET"))


def watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Return the seconds between two signs of life (half of WatchdogSec), or None when nobody watches."""
    watched = environment.get("WATCHDOG_PID", str(pid))
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 2_000_000 if microseconds > 0 and watched == str(pid) else None


def _decoded(address: str) -> str:
    """Return the address for ``sendto``: a leading @ stands for the abstract namespace."""
    return "\0" + address[1:] if address.startswith("@") else address
