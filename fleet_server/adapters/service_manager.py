"""Tells systemd how the service is doing (sd_notify(3)), when there is a systemd that asked for it."""

import socket


class ServiceManager:
    """Sends states to the socket that ``NOTIFY_SOCKET`` names; without one it does nothing."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    def ready(self, status: str) -> None:
        """Say that the service answers."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Say that the service is about to end."""
        self._send("STOPPING=1\nSTATUS=stopping")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect(address)
            notify.sendall(message.encode())
