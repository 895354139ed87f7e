"""A stolen server's face: answers devices with the stolen TLS key, in front of the real server.

What nobody tampers with is passed on as it is; on the paths under attack the thief answers by himself. Used by tests;
what the thief can sign is in `attacks.py`.
"""

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 30.0
HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "content-length"})
CHUNK = b" " * 65536


class Handler(BaseHTTPRequestHandler):
    """One connection of a device."""

    protocol_version = "HTTP/1.1"
    server: "Impostor"

    def do_GET(self) -> None:
        """Pass a request on, or answer it as the thief likes."""
        self.server.seen.append((self.command, self.path))
        trick = self.server.trick_for(self.path)
        if trick is None:
            self._pass_on(None)
            return
        self.close_connection = True
        with contextlib.suppress(OSError):  # the device hung up: it has had enough
            trick(self)

    def do_POST(self) -> None:
        """Pass a request on."""
        self.server.seen.append((self.command, self.path))
        self._pass_on(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as in the standard library
        """Keep quiet."""

    def _pass_on(self, body: bytes | None) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        real = self.server.real()
        try:
            real.request(self.command, self.path, body, headers)
            answer = real.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # as if the server itself had broken off
            return
        finally:
            real.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


Trick = Callable[[Handler], None]


class Impostor(ThreadingHTTPServer):
    """The thief's server. It leaves devices alone until it is told to play a trick."""

    daemon_threads = True

    def __init__(self, authority: Path, real_port: int) -> None:
        """``authority``: the stolen folder with the server's certificate and key."""
        super().__init__(("127.0.0.1", 0), Handler)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(authority / "server.pem", authority / "server.key")
        self._upstream = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._upstream.check_hostname = False
        self._upstream.verify_mode = ssl.CERT_NONE  # the thief sits beside it
        self._real_port = real_port
        self._tricks: dict[str, Trick] = {}
        self.seen: list[tuple[str, str]] = []  # method and path of every request
        self._thread = threading.Thread(target=self.serve_forever, name="impostor", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where devices find it."""
        return f"https://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def playing(self, path: str, trick: Trick) -> Iterator[None]:
        """Answer the paths that contain ``path`` with a trick."""
        self._tricks[path] = trick
        try:
            yield
        finally:
            del self._tricks[path]

    def trick_for(self, path: str) -> Trick | None:
        """Return what to do about a request, None to pass it on."""
        return next((trick for part, trick in self._tricks.items() if part in path), None)

    def real(self) -> http.client.HTTPSConnection:
        """Return a new connection to the real server."""
        return http.client.HTTPSConnection(
            "127.0.0.1", self._real_port, timeout=ANSWER_SECONDS, context=self._upstream
        )

    def get_request(self) -> tuple[ssl.SSLSocket, Any]:
        """Accept; the handshake is made by the connection's own thread."""
        accepted, address = super().get_request()
        return self._tls.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A device that hangs up, or does not like the certificate, is no news."""

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, also one whose handshake failed."""
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
        request.close()

    def stop(self) -> None:
        """End it."""
        self.shutdown()
        self.server_close()
        self._thread.join()


def endless(request: Handler) -> None:
    """Send data that never ends, without saying how much it will be."""
    request.send_response(http.client.OK)
    request.end_headers()
    while True:  # ends when the device hangs up
        request.wfile.write(CHUNK)


def slow(request: Handler) -> None:
    """Send a byte a second: never silent, never done."""
    request.send_response(http.client.OK)
    request.send_header("Content-Length", "5000")
    request.end_headers()
    for _ in range(5000):
        request.wfile.write(b" ")
        request.wfile.flush()
        time.sleep(1)
