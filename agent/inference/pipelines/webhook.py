"""Results posted to an HTTP address, signed. The data plane's only importer of urllib3.

An attempt ends at its deadline however slowly the other side answers; redirects are not followed, for the signature
and the result are meant for the address that was set. When to try again is decided by the pipeline.
"""

import hashlib
import hmac
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from agent.core.pipelines import WebhookSink
from agent.inference.pipelines.flow import SinkFailed, Undeliverable

MAX_SECRET = 4096  # bytes
MAX_RETRY_AFTER = 300.0  # seconds
_TRY_AGAIN = frozenset({408, 425, 429})
_OK, _REDIRECT, _REFUSED, _BROKEN = 200, 300, 400, 500
SIGNATURE = "X-Edgewarden-Signature"
TIMESTAMP = "X-Edgewarden-Timestamp"


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return the signature's header: HMAC-SHA256 of the timestamp, a dot and the body."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class WebhookDelivery:
    """Implements `flow.Sink` with HTTP POST."""

    def __init__(self, settings: WebhookSink, *, clock: Callable[[], float] = time.time) -> None:
        """``clock``: UTC seconds, for the signature."""
        self._settings = settings
        self._clock = clock
        self._pool: urllib3.PoolManager | None = None

    def deliver(self, record: bytes) -> None:
        """Post one result; raise `SinkFailed`, or `Undeliverable` when the other side does not want it."""
        deadline = _Deadline(self._settings.timeout_seconds)
        with deadline.runs():
            status, retry_after = self._post(record, deadline)
        if _OK <= status < _REDIRECT:
            return
        if _REDIRECT <= status < _REFUSED:
            raise Undeliverable(f"{self._settings.url} redirects ({status}); redirects are not followed")
        message = f"{self._settings.url} answers {status}"
        if status in _TRY_AGAIN or status >= _BROKEN:
            raise SinkFailed(message, wait=retry_after)
        raise Undeliverable(message)

    def close(self) -> None:
        """Close the connection."""
        if self._pool is not None:
            self._pool.clear()
        self._pool = None

    def _post(self, record: bytes, deadline: "_Deadline") -> tuple[int, float]:
        self._pool = self._pool or _pool(self._settings)
        try:
            response = self._pool.request(
                "POST",
                self._settings.url,
                body=record,
                headers=self._headers(record),
                retries=False,
                redirect=False,
                preload_content=False,
                timeout=urllib3.Timeout(total=self._settings.timeout_seconds),
            )
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            self.close()
            # Two clocks limit an attempt, ours and urllib3's; whichever is first, it is the same news.
            late = deadline.passed or isinstance(error, urllib3.exceptions.ReadTimeoutError)
            raise SinkFailed(f"{self._settings.url}: {self._late if late else error}") from error
        try:
            if deadline.passed:  # a head that was cut off looks like one that is complete
                raise SinkFailed(f"{self._settings.url}: {self._late}")
            return response.status, _seconds(response.headers.get("Retry-After", ""))
        finally:
            response.close()  # its body is of no interest, and may be endless

    @property
    def _late(self) -> str:
        return f"no answer within {self._settings.timeout_seconds:g} s"

    def _headers(self, record: bytes) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "User-Agent": "edgewarden"}
        if self._settings.secret_file:
            timestamp = str(int(self._clock()))
            headers[TIMESTAMP] = timestamp
            headers[SIGNATURE] = sign(_secret(self._settings.secret_file), timestamp, record)
        return headers


# ---------------------------------------------------------------- an attempt's deadline
class _Deadline:
    """Cuts this thread's connection when an attempt takes too long: urllib3 only limits single reads."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    @contextmanager
    def runs(self) -> Iterator[None]:
        """Limit what is done meanwhile."""
        _current.sockets = self._sockets
        self._timer.start()
        try:
            yield
        finally:
            self._timer.cancel()
            self._timer.join()
            _current.sockets = None

    def _cut(self) -> None:
        self.passed = True
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _Current(threading.local):
    sockets: "list[socket.socket] | None" = None


_current = _Current()


class _Http(HTTPConnection):
    def request(self, *args: Any, **more: Any) -> None:
        super().request(*args, **more)
        _note(self.sock)


class _Https(HTTPSConnection):
    def request(self, *args: Any, **more: Any) -> None:
        super().request(*args, **more)
        _note(self.sock)


def _note(sock: socket.socket | None) -> None:
    if sock is not None and _current.sockets is not None:
        _current.sockets.append(sock)


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Https


def _pool(settings: WebhookSink) -> urllib3.PoolManager:
    more: dict[str, Any] = {"ca_certs": settings.ca_file} if settings.ca_file else {}
    pool = urllib3.PoolManager(num_pools=1, maxsize=1, **more)
    pool.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
    return pool


# ---------------------------------------------------------------- reading what belongs to it
def _secret(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            secret = stream.read(MAX_SECRET).strip()
    except OSError as error:
        raise SinkFailed(f"the secret file {file} cannot be read: {error.strerror}") from error
    if not secret:
        raise SinkFailed(f"the secret file {file} is empty")
    return secret


def _seconds(retry_after: str) -> float:
    return min(MAX_RETRY_AFTER, float(retry_after)) if retry_after.isdigit() else 0.0
