"""A real HTTPS server for tests whose answers each test writes itself."""

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Request(BaseHTTPRequestHandler):
    """One request; a test's answer writes to it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second must not wait for an acknowledgement
    timeout = 10  # seconds; a client that keeps a connection open must not hold up the end of a test
    server: "_Server"

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Answer with a body of the length it announces."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", "0")))

    def do_GET(self) -> None:
        self.server.book.seen.append((self.path, dict(self.headers)))
        self.server.book.answer(self)

    do_POST = do_GET  # noqa: N815 - the names that http.server looks for

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing."""


@dataclass
class Book:
    """What the server answers next, and what it was asked."""

    url: str = ""
    answer: Callable[[Request], None] = lambda request: request.reply(404)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    book: Book

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


@contextmanager
def https_server(tls: ssl.SSLContext | None) -> Iterator[Book]:
    """Serve on a free port of 127.0.0.1; without a context, plain HTTP."""
    server = _Server(("127.0.0.1", 0), Request)
    server.book = Book(url=f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}")
    # The handshake belongs to the connection's thread, not to the one that accepts.
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.book
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
