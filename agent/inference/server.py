"""Accepts clients and serves each on a thread of its own, until it drains.

Several processes may share the listening sockets: during a planned restart the new one accepts beside the old. To
drain is to close (never shut down) the listeners, to answer what comes on open connections with ``Connection:
close``, and to cut the connections that stay idle.
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from agent.inference.http import Disconnected, HttpConnection, Limits, Response
from agent.inference.parsing import Head, HttpError, check_local
from agent.inference.routes import SMALL_BODY, Plan, Routes

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
IDLE_GRACE_SECONDS = 1.0  # a drain waits this long for the next request on connections that are kept open
DRAIN_SECONDS = 10.0  # and this long in all
_OPEN, _DRAIN = b"o", b"d"


class Beside(Protocol):
    """Another transport of the same process, which opens and drains together with this one."""

    def start(self) -> None:
        """Begin to answer."""

    def begin_stop(self) -> None:
        """Take no more calls; return at once."""

    def finish(self) -> None:
        """Wait until every call has ended."""


class Server:
    """The connections of this process."""

    def __init__(
        self,
        listeners: Iterable[socket.socket],
        routes: Routes,
        limits: Limits,
        *,
        max_connections: int = MAX_CONNECTIONS,
        beside: Beside | None = None,
    ) -> None:
        """Take over listening sockets; nothing is accepted before `open`.

        ``on_opened`` may be set before that; it is called once, from the thread of `run`.
        """
        self.on_opened: Callable[[], None] = lambda: None
        self._listeners = tuple(listeners)
        self._routes = routes
        self._limits = limits
        self._max_connections = max_connections
        self._beside = beside
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._accepting = False
        self._draining = False
        self._changed = threading.Condition()
        self._open: dict[socket.socket, HttpConnection] = {}
        routes.when_ready(lambda: not self._draining)

    def run(self) -> None:
        """Accept from `open` until `drain`, then finish what is in flight. Call it once."""
        with selectors.DefaultSelector() as ready:
            ready.register(self._wake_receiver, selectors.EVENT_READ)
            while not self._draining:
                for key, _ in ready.select():
                    if key.data is None:
                        self._wake_up(ready)
                    else:
                        self._accept(key.data)
        self._finish()

    def open(self) -> None:
        """Begin to accept; until then clients wait in the backlog. Safe from other threads."""
        self._wake(_OPEN)

    def drain(self) -> None:
        """Stop accepting; `run` returns when the clients are done. Safe from other threads and signal handlers."""
        self._draining = True
        self._wake(_DRAIN)

    @property
    def busy(self) -> int:
        """Return how many connections wait for an answer."""
        with self._changed:
            return sum(not connection.idle for connection in self._open.values())

    def _wake(self, why: bytes) -> None:
        with contextlib.suppress(OSError):  # ended already
            self._wake_sender.send(why)

    def _wake_up(self, ready: selectors.BaseSelector) -> None:
        if self._wake_receiver.recv(1) == _OPEN and not self._accepting:
            self._accepting = True
            for listener in self._listeners:
                listener.setblocking(False)  # another process may be quicker to accept
                ready.register(listener, selectors.EVENT_READ, listener)
            if self._beside:
                self._beside.start()
            self.on_opened()

    # ------------------------------------------------------------ accepting
    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return  # the other process was quicker
        except OSError as error:  # out of descriptors: wait for a connection to end rather than spin
            log.warning("cannot accept: %s", error)
            time.sleep(0.1)
            return
        sock.setblocking(True)
        connection = HttpConnection(sock, self._limits)
        with self._changed:
            crowded = len(self._open) >= self._max_connections
            if not crowded:
                self._open[sock] = connection  # counted before its thread starts: a drain must not overlook it
        if crowded:
            self._turn_away(sock, connection)
        else:
            self._start(sock, connection)

    def _start(self, sock: socket.socket, connection: HttpConnection) -> None:
        thread = threading.Thread(target=self._serve, args=(sock, connection), name="client", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            self._forget(sock)
            self._turn_away(sock, connection)

    def _turn_away(self, sock: socket.socket, connection: HttpConnection) -> None:
        error = HttpError(503, "too many connections are open", headers={"Retry-After": "1"})
        with sock:
            sock.setblocking(False)
            try:
                connection.send(_error_response(error), close=True)
            except Disconnected:
                return

    # ------------------------------------------------------------ one client
    def _serve(self, sock: socket.socket, connection: HttpConnection) -> None:
        over_tcp = sock.family != socket.AF_UNIX
        before = _Before()
        try:
            if over_tcp:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._serve_one(connection, before, over_tcp=over_tcp):
                pass
        except Disconnected:
            pass
        except Exception:
            log.exception("a connection ended by a fault of this server")
        finally:
            sock.close()
            self._forget(sock)

    def _serve_one(self, connection: HttpConnection, before: "_Before", *, over_tcp: bool) -> bool:
        """Answer one request; False when the connection is done."""
        try:
            head = connection.read_head()
        except HttpError as error:
            connection.send(_error_response(error), close=True)
            connection.linger()
            return False
        if head is None:
            return False
        response, understood = self._answer(connection, head, before, over_tcp=over_tcp)
        keep = head.keep_alive and understood and not self._draining
        connection.send(response, close=not keep)
        if not understood:
            connection.linger()
        return keep

    def _answer(
        self, connection: HttpConnection, head: Head, before: "_Before", *, over_tcp: bool
    ) -> tuple[Response, bool]:
        """Return the response, and whether what follows on the connection can be understood."""
        body_read = False
        try:
            plan = before.plan if head is before.head else None
            if plan is None:
                plan = self._plan(head, before, over_tcp=over_tcp)
            body = connection.read_body(head, plan.body_cap)
            body_read = True
            return plan.answer(body), True
        except HttpError as error:
            understood = not error.close and (body_read or _skip_body(connection, head))
            return _error_response(error), understood
        except Disconnected:
            raise
        except Exception:
            log.exception("%s %s met a fault of this server", head.method, "/".join(head.path)[:200])
            return _error_response(HttpError(500, "a fault of this server; its log says more")), body_read

    def _plan(self, head: Head, before: "_Before", *, over_tcp: bool) -> Plan:
        if over_tcp:
            check_local(head)
        plan = self._routes.plan(head, over_tcp=over_tcp)
        before.head, before.plan = (head, plan) if plan.lasting else (None, None)
        return plan

    # ------------------------------------------------------------ draining
    def _finish(self) -> None:
        for listener in self._listeners:
            listener.close()
        if self._beside:
            self._beside.begin_stop()
        if not self._wait_until_empty(IDLE_GRACE_SECONDS):
            self._cut_idle()
            if not self._wait_until_empty(DRAIN_SECONDS - IDLE_GRACE_SECONDS):
                log.warning("%d requests did not end within %g s", len(self._open), DRAIN_SECONDS)
        if self._beside:
            self._beside.finish()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _wait_until_empty(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout=seconds)

    def _cut_idle(self) -> None:
        """End idle connections. What has arrived already is still read and answered after this."""
        with self._changed:
            for sock, connection in self._open.items():
                if connection.idle:
                    _stop_reading(sock)

    def _forget(self, sock: socket.socket) -> None:
        with self._changed:
            self._open.pop(sock, None)
            self._changed.notify_all()


class _Before:
    """What a connection's request before this one was: who keeps asking the same is planned for once."""

    __slots__ = ("head", "plan")

    def __init__(self) -> None:
        self.head: Head | None = None
        self.plan: Plan | None = None


def _stop_reading(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError:
        return  # gone already


def _skip_body(connection: HttpConnection, head: Head) -> bool:
    """Read over a body that nobody wants, if it is small; False when it stays unread."""
    if head.content_length > SMALL_BODY or head.expects_continue:
        return head.content_length == 0
    try:
        connection.read_body(head, SMALL_BODY)
    except HttpError:
        return False
    return True


def _error_response(error: HttpError) -> Response:
    return Response(status=error.status, body=(msgspec.json.encode({"error": error.message}),), headers=error.headers)
