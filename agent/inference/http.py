"""HTTP/1.1 on one blocking socket: reads requests under caps and deadlines, writes responses.

Knows heads, bodies and the connection's buffer. It stops there: what a path means is `routes`' business. Whatever a
client may send wrongly ends in an `HttpError` with its status, and whatever it may do to stall ends in a deadline.
Chunked bodies are not accepted: a body's size must be known before it is read.
"""

import functools
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple

from agent.inference.parsing import Head, HttpError, parse_head

END_OF_HEAD = b"\r\n\r\n"
LINGER_SECONDS = 2.0  # how long a refused body is read and thrown away, so that the client sees the refusal
LINGER_CHUNK = 65536
JSON = "application/json"
_NEW_TIMES = 66  # SO_RCVTIMEO_NEW of asm-generic/socket.h: 64-bit times on a 32-bit machine
_TIMEVAL = struct.Struct("@qq" if socket.SO_RCVTIMEO == _NEW_TIMES else "@ll")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large and how slow a client may be."""

    head_bytes: int = 16 * 1024
    body_bytes: int = 64 * 1024 * 1024
    idle_seconds: float = 75.0  # between two requests; longer than what common clients keep a connection
    head_seconds: float = 10.0  # from the first byte of a head to its last
    body_seconds: float = 30.0
    send_seconds: float = 30.0


class Response(NamedTuple):
    """What is sent back. ``body`` parts are sent one after the other without being joined first."""

    status: int = 200
    body: tuple[bytes, ...] = ()
    content_type: str = JSON
    headers: Mapping[str, str] = MappingProxyType({})


class Disconnected(Exception):
    """The client went away, or stalled where no answer can reach it."""


class HttpConnection:
    """One client's connection. Owned by one thread."""

    def __init__(self, sock: socket.socket, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """Take over a connected socket."""
        self._sock = sock
        self._limits = limits
        self._clock = clock
        self._buffer = bytearray(limits.head_bytes)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # the bytes between were received and not used yet
        self._body = bytearray()
        # The kernel keeps the deadlines that hold for most calls; Python's own cost two system calls each time.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(limits.idle_seconds))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(limits.send_seconds))
        self.idle = True  # between two requests: nothing is lost when the connection ends here

    def read_head(self) -> Head | None:
        """Wait for the next request and return its head, or None at the end of the connection."""
        end = self._find_head()
        if end < 0:
            if not self._start_head():
                return None
            end = self._finish_head()
        self.idle = False
        head = parse_head(bytes(self._view[self._start : end]))
        self._start = end + len(END_OF_HEAD)
        return head

    def read_body(self, head: Head, cap: int) -> memoryview:
        """Return the request's body in this connection's own buffer; it is overwritten by the next request's."""
        length = head.content_length
        if length > cap:
            raise HttpError(413, f"the body has {length} bytes, at most {cap} are accepted here", close=True)
        if length > len(self._body):
            self._body = bytearray(length)
        view = memoryview(self._body)[:length]
        got = self._take_buffered(view)
        if got < length and head.expects_continue:
            self._send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._receive_body(view, got)
        return view

    def send(self, response: Response, *, close: bool) -> None:
        """Send a response; raise `Disconnected` when the client does not take it."""
        length = sum(map(len, response.body))
        head = _head(response.status, response.content_type, length, tuple(response.headers.items()), close)
        self.idle = True
        try:
            sent = self._sock.sendmsg((head, *response.body))
            if sent < length + len(head):
                self._sock.sendall(b"".join((head, *response.body))[sent:])
        except OSError as error:
            raise Disconnected(str(error)) from error

    def linger(self) -> None:
        """Throw away what the client still sends: closing on unread bytes would take the answer from it."""
        deadline = self._clock() + LINGER_SECONDS
        try:
            self._sock.shutdown(socket.SHUT_WR)
            while (left := deadline - self._clock()) > 0:
                self._sock.settimeout(left)
                if not self._sock.recv(LINGER_CHUNK):
                    return
        except OSError:
            return

    # ------------------------------------------------------------ reading a head
    def _find_head(self) -> int:
        return self._buffer.find(END_OF_HEAD, self._start, self._end)

    def _start_head(self) -> bool:
        """Wait for a request's first bytes; False when the client ended or stayed idle for too long."""
        if self._start == self._end:
            self._start = self._end = 0
            return self._receive_head()
        self._move_down()
        return True

    def _finish_head(self) -> int:
        self.idle = False
        deadline = self._clock() + self._limits.head_seconds
        while (end := self._find_head()) < 0:
            if self._end == len(self._buffer):
                raise HttpError(431, f"the request's head is over the cap of {len(self._buffer)} bytes", close=True)
            left = deadline - self._clock()
            if left <= 0 or not self._receive_head(left):
                raise HttpError(408, f"the head did not arrive within {self._limits.head_seconds:g} s", close=True)
        return end

    def _receive_head(self, seconds: float | None = None) -> bool:
        """Wait for some bytes of a head, for as long as a connection may be idle if no seconds are said."""
        try:
            got = self._receive_into(self._view[self._end :], seconds)
        except TimeoutError:
            return False
        if not got and not self.idle:
            raise Disconnected("the client ended within a head")
        self._end += got
        return got > 0

    def _move_down(self) -> None:
        rest = self._buffer[self._start : self._end]
        self._buffer[: len(rest)] = rest
        self._start, self._end = 0, len(rest)

    # ------------------------------------------------------------ reading a body
    def _take_buffered(self, view: memoryview) -> int:
        got = min(len(view), self._end - self._start)
        view[:got] = self._view[self._start : self._start + got]
        self._start += got
        return got

    def _receive_body(self, view: memoryview, got: int) -> None:
        deadline = self._clock() + self._limits.body_seconds
        while got < len(view):
            left = deadline - self._clock()
            if left <= 0:
                raise HttpError(408, f"the body did not arrive within {self._limits.body_seconds:g} s", close=True)
            try:
                chunk = self._receive_into(view[got:], left)
            except TimeoutError:
                continue
            if not chunk:
                raise Disconnected("the client ended within a body")
            got += chunk

    def _receive_into(self, view: memoryview, seconds: float | None) -> int:
        """Receive some bytes; raise TimeoutError, or `Disconnected`."""
        try:
            if seconds is None:
                return self._sock.recv_into(view)
            self._sock.settimeout(seconds)
            try:
                return self._sock.recv_into(view)
            finally:
                self._sock.settimeout(None)
        except BlockingIOError as error:
            raise TimeoutError from error
        except TimeoutError:
            raise
        except OSError as error:
            raise Disconnected(str(error)) from error

    def _send_all(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise Disconnected(str(error)) from error


@functools.lru_cache(maxsize=256)  # answers differ in their lengths, by as much as their ids do
def _head(status: int, content_type: str, length: int, headers: tuple[tuple[str, str], ...], close: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n",
        f"Content-Type: {content_type}\r\nContent-Length: {length}\r\n",
        *(f"{name}: {value}\r\n" for name, value in headers),
        "Connection: close\r\n\r\n" if close else "\r\n",
    ]
    return "".join(lines).encode("latin-1")


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
