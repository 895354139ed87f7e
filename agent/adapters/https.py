"""HTTP requests, capped and timed. The only importer of urllib3 in the control process.

Knows connections, time-outs and caps; what is asked for, and what an answer means, its callers know. Redirects are
never followed: the device talks to the one server whose CA it pins, and to the mirrors it was told of.
"""

import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NoReturn
from urllib.parse import urlsplit

import urllib3

from agent.ports import Refusal, Trouble, Weather
from protocol.states import RejectReason

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte; curl's --speed-time has the same default
MINIMUM_RATE = 128  # bytes per second over READ_TIMEOUT; a drip below it would hold the download for days
MAX_RETRY_AFTER = 24 * 3600.0  # seconds; a server cannot silence a device for longer
CHUNK = 64 * 1024
_POOL = 2  # connections kept: metadata may be asked for while a bundle comes in

NOT_YET_VALID, EXPIRED = 9, 10  # X509_V_ERR_… of OpenSSL, as `ssl.SSLCertVerificationError.verify_code` gives them
TOKEN_SLACK = 30.0  # seconds that a token's time may be off before the server's own is taken

Response = urllib3.BaseHTTPResponse
BrokenOff = (Weather, urllib3.exceptions.HTTPError)  # what reading an answer may raise before `open` makes it Weather


class NotYetValid(Weather):
    """A certificate is of the future, by this device's clock."""


class HttpsServer:
    """Requests to one server, each capped and timed."""

    def __init__(
        self,
        url: str,
        *,
        tls: Callable[[], ssl.SSLContext],
        authorise: Callable[[], str] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        read_timeout: float = READ_TIMEOUT,
    ) -> None:
        """``tls`` is asked at each request, so a context may be replaced; ``authorise`` returns a bearer token."""
        self.url = self._checked(url)
        self._tls = tls
        self._authorise = authorise
        self._monotonic = monotonic
        self._read_timeout = read_timeout
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._context: ssl.SSLContext | None = None
        self._told: tuple[float, float] | None = None  # the server's time (s) and ours (monotonic) when it was said

    @property
    def time_there(self) -> int | None:
        """Return the server's time (UTC ms), if it ever refused a token of ours and so gave reason to look at it."""
        told = self._told
        return None if told is None else int(1000 * (told[0] + self._monotonic() - told[1]))

    @contextmanager
    def open(
        self, path: str, *, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[Response]:
        """Yield the answer, whatever its status; raise `Weather` when there is none or it breaks off."""
        response = self._answer(path, body, headers or {})
        if response.status == HTTPStatus.UNAUTHORIZED and self._authorise is not None and self._hears_time(response):
            response.close()
            response = self._answer(path, body, headers or {})
        try:
            yield response
        except (urllib3.exceptions.HTTPError, ssl.SSLError) as error:
            raise Weather(f"{self.url} broke off: {error}") from error
        finally:
            response.close()  # a body that was not read to its end must not be taken for the next answer

    def _answer(self, path: str, body: bytes | None, headers: dict[str, str]) -> Response:
        sent = {"Accept-Encoding": "identity", "User-Agent": "edgewarden-agent", **headers}
        if self._authorise is not None:
            sent["Authorization"] = f"Bearer {self._authorise()}"
        try:
            return self._connections().request(
                "GET" if body is None else "POST",
                path,
                body=body,
                headers=sent,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=self._read_timeout),
            )
        except urllib3.exceptions.HTTPError as error:
            raise _unanswered(self.url, error) from error

    def _hears_time(self, response: Response) -> bool:
        """Take the time that a refusal came with, when it is news: the token may have been of another time."""
        try:
            there = parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
        except (ValueError, TypeError):
            return False
        known, self._told = self.time_there, (there, self._monotonic())
        return known is None or abs(known / 1000 - there) > TOKEN_SLACK

    def chunks(self, response: Response, size: Callable[[], int] = lambda: CHUNK) -> Iterator[bytes]:
        """Yield the body as it comes in, ``size`` bytes at a time at most; raise `Weather` when it is too slow."""
        since, count = self._monotonic(), 0
        while chunk := response.read1(size()):
            yield chunk
            count += len(chunk)
            passed = self._monotonic() - since
            if passed < self._read_timeout:
                continue
            if count < MINIMUM_RATE * passed:
                raise Weather(f"{self.url} sends only {count} bytes in {passed:.0f} s")
            since, count = self._monotonic(), 0

    def read(self, response: Response, cap: int, what: str) -> bytes:
        """Return the whole body; raise `Refusal` (MALFORMED) when it is over the cap."""
        data = bytearray()
        for chunk in self.chunks(response):
            data += chunk
            if len(data) > cap:
                raise Refusal(RejectReason.MALFORMED, f"{what} is over the cap of {cap} bytes")
        return bytes(data)

    def close(self) -> None:
        """Close idle connections."""
        if self._pool is not None:
            self._pool.close()

    def _checked(self, url: str) -> str:
        parts = urlsplit(url)
        if (
            parts.scheme != "https"
            or not parts.hostname
            or "@" in parts.netloc
            or parts.path.strip("/")
            or parts.query
        ):
            raise Trouble(f"{url!r} is not a server's address", remedy="It looks like https://host:8443")
        return f"https://{parts.netloc}"

    def _connections(self) -> urllib3.HTTPConnectionPool:
        context = self._tls()
        if self._pool is None or context is not self._context:
            self.close()
            address = urlsplit(self.url)
            host = address.hostname or ""
            self._pool = urllib3.HTTPSConnectionPool(host, address.port, maxsize=_POOL, ssl_context=context)
            self._context = context
        return self._pool


class Mirror(HttpsServer):
    """A file server that is trusted with nothing: no token goes there, and what comes is compared with its hash."""

    def __init__(self, url: str, *, read_timeout: float = READ_TIMEOUT) -> None:
        """``url``: ``http://`` or ``https://`` (then with the system's CAs), a folder may follow."""
        super().__init__(url, tls=ssl.create_default_context, read_timeout=read_timeout)

    def path_of(self, name: str) -> str:
        """Return the path of a file there."""
        return f"{urlsplit(self.url).path.rstrip('/')}/{name}"

    def _checked(self, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.query:
            raise Trouble(f"{url!r} is not a mirror's address", remedy="It looks like http://host/folder")
        return url

    def _connections(self) -> urllib3.HTTPConnectionPool:
        if self._pool is None:
            address = urlsplit(self.url)
            host = address.hostname or ""
            if address.scheme == "http":
                self._pool = urllib3.HTTPConnectionPool(host, address.port, maxsize=_POOL)
            else:
                self._pool = urllib3.HTTPSConnectionPool(host, address.port, maxsize=_POOL, ssl_context=self._tls())
        return self._pool


def _unanswered(url: str, error: urllib3.exceptions.HTTPError) -> Weather:
    """Say why there is no answer; of a certificate's dates, what this device's clock has to do with it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        inner = next((each for each in cause.args if isinstance(each, BaseException)), None)
        cause = inner or cause.__cause__ or cause.__context__
    code = cause.verify_code if cause is not None else 0
    text = f"{url} did not answer: {error}"
    if code in (NOT_YET_VALID, EXPIRED):
        text += (
            f". By the clock of this device it is {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC: is that so?"
        )
    return NotYetValid(text) if code == NOT_YET_VALID else Weather(text)


def raise_weather(response: Response, what: str) -> NoReturn:
    """Raise `Weather` for an answer that is none, with the patience it asks for."""
    raise Weather(f"the server answered {what} with status {response.status}", retry_after=retry_after_of(response))


def retry_after_of(response: Response) -> float | None:
    """Return the seconds of Retry-After. A date in it is read against the answer's own Date, not our clock."""
    said = response.headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return min(float(said), MAX_RETRY_AFTER)
    try:
        until = parsedate_to_datetime(said)
        seconds = (until - parsedate_to_datetime(response.headers.get("Date", ""))).total_seconds()
    except (ValueError, TypeError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


@contextmanager
def unverified() -> Iterator[ssl.SSLContext]:
    """Yield a context that believes every server, for what is compared with a pin afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
        yield context
