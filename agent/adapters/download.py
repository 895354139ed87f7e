"""The fleet server over HTTPS: bundles, metadata, enrolment. The only importer of urllib3.

Knows requests, caps and time-outs. It verifies a bundle's length and SHA-256 against what was signed; what may be
downloaded at all is decided by `trust.py`. Redirects are never followed: the device talks to the one server whose CA
it pins.
"""

import errno
import hashlib
import logging
import os
import shutil
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, NoReturn
from urllib.parse import urlsplit

import msgspec
import urllib3

from agent.adapters.atomic_file import flush_folder
from agent.adapters.identity import context_for
from agent.ports import Refusal, Target, Trouble, Weather
from protocol.device_api import (
    BUNDLES_PATH,
    CA_PATH,
    DIRECTOR_METADATA_PATH,
    ENROL_PATH,
    IMAGE_METADATA_PATH,
    DeviceApiError,
    EnrolRequest,
    EnrolResponse,
)
from protocol.messages import DesiredState
from protocol.names import MAX_BUNDLE, MAX_DESIRED_MESSAGE, MAX_DEVICE_REQUEST, SHA256_HEX, check_name
from protocol.states import RejectReason

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 30.0  # seconds without a byte; curl's --speed-time has the same default
MINIMUM_RATE = 128  # bytes per second over READ_TIMEOUT; a drip below it would hold the download for days
RESERVE = 16 * 1024 * 1024  # bytes of disk that a download leaves free for the agent's own records
MAX_RETRY_AFTER = 24 * 3600.0  # seconds; a server cannot silence a device for longer
MAX_ROOT_STEPS = 256  # python-tuf's own limit of root rotations
_CHUNK = 64 * 1024
_POOL = 2  # connections kept: metadata may be asked for while a bundle comes in
_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})

_OK, _PARTIAL, _UNAUTHORISED, _NOT_FOUND, _CONFLICT, _GONE, _BAD_RANGE = 200, 206, 401, 404, 409, 410, 416
_BUSY = frozenset({429, 503})


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
        self.url = _https(url)
        self._tls = tls
        self._authorise = authorise
        self._monotonic = monotonic
        self._read_timeout = read_timeout
        self._pool: urllib3.HTTPSConnectionPool | None = None
        self._context: ssl.SSLContext | None = None

    @contextmanager
    def open(
        self, path: str, *, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """Yield the answer, whatever its status; raise `Weather` when there is none or it breaks off."""
        sent = {"Accept-Encoding": "identity", "User-Agent": "edgewarden-agent", **(headers or {})}
        if self._authorise is not None:
            sent["Authorization"] = f"Bearer {self._authorise()}"
        try:
            response = self._connections().request(
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
            raise Weather(f"{self.url} did not answer: {error}") from error
        try:
            yield response
        except (urllib3.exceptions.HTTPError, ssl.SSLError) as error:
            raise Weather(f"{self.url} broke off: {error}") from error
        finally:
            response.close()  # a body that was not read to its end must not be taken for the next answer

    def chunks(self, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        """Yield the body as it comes in; raise `Weather` when it comes too slowly."""
        since, count = self._monotonic(), 0
        while chunk := response.read1(_CHUNK):
            yield chunk
            count += len(chunk)
            passed = self._monotonic() - since
            if passed < self._read_timeout:
                continue
            if count < MINIMUM_RATE * passed:
                raise Weather(f"{self.url} sends only {count} bytes in {passed:.0f} s")
            since, count = self._monotonic(), 0

    def read(self, response: urllib3.BaseHTTPResponse, cap: int, what: str) -> bytes:
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

    def _connections(self) -> urllib3.HTTPSConnectionPool:
        context = self._tls()
        if self._pool is None or context is not self._context:
            self.close()
            address = urlsplit(self.url)
            host = address.hostname or ""
            self._pool = urllib3.HTTPSConnectionPool(host, address.port, maxsize=_POOL, ssl_context=context)
            self._context = context
        return self._pool


class HttpsMetadata:
    """Metadata files of both repositories, each capped by its reader."""

    def __init__(self, server: HttpsServer) -> None:
        """Requests need a bearer token."""
        self._server = server

    def image(self, name: str, cap: int) -> bytes | None:
        """Return a file of the Image repository, or None when the server has none of that name."""
        return self._file(f"{IMAGE_METADATA_PATH}/{name}", cap)

    def desired_state(self, director_root: int) -> DesiredState:
        """Return this device's desired state, as ``down/want`` carries it: for when the broker is out of reach."""
        return DesiredState(
            root=tuple(self._root_steps(director_root)),
            timestamp=self._part("timestamp.json"),
            snapshot=self._part("snapshot.json"),
            targets=self._part("targets.json"),
        )

    def _root_steps(self, held: int) -> Iterator[bytes]:
        for version in range(held + 1, held + 1 + MAX_ROOT_STEPS):
            root = self._file(f"{DIRECTOR_METADATA_PATH}/{version}.root.json", MAX_DESIRED_MESSAGE)
            if root is None:
                return
            yield root

    def _part(self, name: str) -> bytes:
        return self._file(f"{DIRECTOR_METADATA_PATH}/{name}", MAX_DESIRED_MESSAGE) or b""

    def _file(self, path: str, cap: int) -> bytes | None:
        with self._server.open(path) as response:
            if response.status == _NOT_FOUND:
                return None
            if response.status != _OK:
                _raise_weather(response, path)
            return self._server.read(response, cap, path)


class BundleDownloads:
    """Bundles (port `Downloads`): ``<sha256>.part`` while one comes in, ``<sha256>.ewb`` when it is right."""

    def __init__(
        self,
        server: HttpsServer,
        folder: Path,
        *,
        free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """``free`` returns the bytes that the disk of a folder has left."""
        self._server = server
        self._folder = folder
        self._free = free

    def fetch(self, target: Target, progress: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
        check_name("sha256", target.sha256, SHA256_HEX)
        if target.length > MAX_BUNDLE:
            raise Refusal(RejectReason.NO_SPACE, f"{target.length} bytes are over the cap of {MAX_BUNDLE}")
        done, part = self._files(target.sha256)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not _is_whole(done, target):
                transfer = _Transfer(server=self._server, target=target, progress=progress, cancelled=cancelled)
                self._complete(part, transfer)
                part.replace(done)
                flush_folder(self._folder)
        except Refusal:
            self.discard(target.sha256)
            raise
        except OSError as error:
            self._raise_disk(error, target.sha256)
        return str(done)

    def discard(self, sha256: str) -> None:
        for path in self._files(check_name("sha256", sha256, SHA256_HEX)):
            path.unlink(missing_ok=True)

    def _files(self, sha256: str) -> tuple[Path, Path]:
        return self._folder / f"{sha256}.ewb", self._folder / f"{sha256}.part"

    def _complete(self, part: Path, transfer: "_Transfer") -> None:
        target = transfer.target
        held = _length(part)
        if held > target.length:
            part.unlink()
            held = 0
        self._check_space(target.length - held)
        digest = transfer.receive(part)
        if digest != target.sha256 and held:
            # A power cut may have left a hole in the part that was here; only a fresh copy tells on the server.
            log.info("the part of %s that was on disk is damaged; starting over", target.sha256)
            part.unlink()
            digest = transfer.receive(part)
        if digest != target.sha256:
            raise Refusal(RejectReason.HASH_MISMATCH, f"the server's bytes have the SHA-256 {digest}")

    def _check_space(self, needed: int) -> None:
        free = self._free(self._folder)
        if free < needed + RESERVE:
            raise Refusal(
                RejectReason.NO_SPACE, f"{needed} bytes to come, {RESERVE} in reserve, {free} free on the disk"
            )

    def _raise_disk(self, error: OSError, sha256: str) -> NoReturn:
        if error.errno in _OUT_OF_SPACE:
            self.discard(sha256)
            raise Refusal(RejectReason.NO_SPACE, f"the disk is full: {error}") from error
        raise Trouble(f"cannot keep a download in {self._folder}: {error}", remedy="Check the disk") from error


@dataclass(frozen=True, kw_only=True)
class _Transfer:
    """One bundle on its way into its part file."""

    server: HttpsServer
    target: Target
    progress: Callable[[int], None]
    cancelled: Callable[[], bool]

    def receive(self, part: Path) -> str:
        """Bring the part to its full length, from where it stands; return its SHA-256."""
        with part.open("a+b") as file:
            digest = _hash(file)
            if file.tell() < self.target.length:
                digest = self._request(file, digest)
        return digest.hexdigest()

    def _request(self, file: IO[bytes], digest: "hashlib._Hash") -> "hashlib._Hash":
        offset = file.tell()
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self.server.open(f"{BUNDLES_PATH}/{self.target.sha256}", headers=headers) as response:
            _check_status(response, file)
            if response.status == _OK and offset:  # the server does not do ranges: from the start again
                file.truncate(0)
                offset, digest = 0, hashlib.sha256()
            self._check_announced(response, offset, file)
            try:
                self._copy(response, file, offset, digest)
            except (Weather, urllib3.exceptions.HTTPError):
                _flush(file)  # what came so far is kept
                raise
            _flush(file)
        return digest

    def _copy(self, response: urllib3.BaseHTTPResponse, file: IO[bytes], held: int, digest: "hashlib._Hash") -> None:
        length = self.target.length
        for chunk in self.server.chunks(response):
            held += len(chunk)
            if held > length:
                raise Refusal(RejectReason.HASH_MISMATCH, "the server sends more bytes than were signed")
            file.write(chunk)
            digest.update(chunk)
            self.progress(held)
            if self.cancelled():
                raise Weather("the download was cancelled")
        if held < length:
            raise Weather(f"the server stopped {length - held} bytes before the end")

    def _check_announced(self, response: urllib3.BaseHTTPResponse, offset: int, file: IO[bytes]) -> None:
        """Refuse, before reading, an answer that announces other bytes than were asked for."""
        length = self.target.length
        if response.status == _PARTIAL and not _continues(response, offset, length):
            file.truncate(0)
            raise Weather(f"the server answered another range: {response.headers.get('Content-Range')!r}")
        announced = response.headers.get("Content-Length", "")
        if announced.isdecimal() and int(announced) > length - offset:
            raise Refusal(RejectReason.HASH_MISMATCH, f"the server announces {announced} bytes, signed are {length}")


class HttpsEnrolment:
    """The open part of the device API (port `EnrolmentServer`)."""

    def __init__(self, url: str, *, read_timeout: float = READ_TIMEOUT) -> None:
        """``url``: ``https://host:port``."""
        self.url = _https(url)
        self._read_timeout = read_timeout

    def ca(self) -> str:
        with warnings.catch_warnings():
            # Nobody can vouch for the server yet: the caller compares what comes with the token's pin.
            warnings.simplefilter("ignore", urllib3.exceptions.InsecureRequestWarning)
            return self._ask(_unverified(), CA_PATH, None).decode("ascii", "replace")

    def enrol(self, request: EnrolRequest, ca: str) -> EnrolResponse:
        body = self._ask(context_for(ca), ENROL_PATH, msgspec.json.encode(request))
        try:
            return msgspec.json.decode(body, type=EnrolResponse)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Trouble(
                f"{self.url} answered something else than a certificate: {error}",
                remedy="Check that the address is the fleet server's device port",
            ) from error

    def _ask(self, context: ssl.SSLContext, path: str, body: bytes | None) -> bytes:
        server = HttpsServer(self.url, tls=lambda: context, read_timeout=self._read_timeout)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            with server.open(path, body=body, headers=headers) as response:
                answer = server.read(response, MAX_DEVICE_REQUEST, path)
                if not _OK <= response.status < 300:  # noqa: PLR2004 - the end of HTTP's successes
                    self._raise_answer(response, answer)
                return answer
        except Refusal as error:
            raise Trouble(str(error), remedy="Check that the address is the fleet server's device port") from error
        finally:
            server.close()

    def _raise_answer(self, response: urllib3.BaseHTTPResponse, answer: bytes) -> NoReturn:
        if response.status >= 500 or response.status in _BUSY:  # noqa: PLR2004 - HTTP's server errors
            _raise_weather(response, response.geturl() or self.url)
        try:
            said = msgspec.json.decode(answer, type=DeviceApiError)
        except (msgspec.DecodeError, UnicodeDecodeError):
            said = DeviceApiError(error=f"{self.url} refused with status {response.status}")
        raise Trouble(said.error, remedy=said.remedy or _remedy(response.status))


def _remedy(status: int) -> str:
    if status == _CONFLICT:
        return (
            "Either the server has no trust roots yet (the operator runs `edgewarden keys init`), "
            "or this id is enrolled already (choose another, or let the operator open it)"
        )
    if status in (_UNAUTHORISED, 403):
        return "Ask the operator for a new token: this one is unknown, used up or expired"
    return "Check that the address is the fleet server's device port"


def _check_status(response: urllib3.BaseHTTPResponse, file: IO[bytes]) -> None:
    if response.status in (_OK, _PARTIAL):
        return
    if response.status in (_NOT_FOUND, _GONE):
        raise Refusal(RejectReason.UNREACHABLE, f"the server has no such bundle (status {response.status})")
    if response.status == _BAD_RANGE:
        file.truncate(0)
    _raise_weather(response, "the bundle")


def _raise_weather(response: urllib3.BaseHTTPResponse, what: str) -> NoReturn:
    raise Weather(f"the server answered {what} with status {response.status}", retry_after=_retry_after(response))


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
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


def _continues(response: urllib3.BaseHTTPResponse, offset: int, length: int) -> bool:
    return response.headers.get("Content-Range", "") == f"bytes {offset}-{length - 1}/{length}"


def _is_whole(path: Path, target: Target) -> bool:
    if _length(path) != target.length or not path.exists():
        return False
    with path.open("rb") as file:
        return _hash(file).hexdigest() == target.sha256


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _hash(file: IO[bytes]) -> "hashlib._Hash":
    """Return the SHA-256 of all that a file holds; leaves the file at its end."""
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size
    file.seek(0)
    while left and (chunk := file.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    return digest


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _https(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or "@" in parts.netloc or parts.path.strip("/") or parts.query:
        raise Trouble(f"{url!r} is not a server's address", remedy="It looks like https://host:8443")
    return f"https://{parts.netloc}"
