"""A session with the fleet server's REST API: the log-in cookie, requests, and errors that say what to do.

Knows HTTP and the problem+json errors of `fleet_server.api_types`. It stops there: what an answer means is for the
commands. Paths are relative to ``/api/v1``.

Errors::

    ApiError            the server said no; ``detail`` is its sentence         (exit code 1)
    ├── NotLoggedIn     there is no session, or it is over                      (exit code 3)
    └── Unreachable     no answer: wrong address, server down, TLS not trusted  (exit code 4)

Environment: EDGEWARDEN_SERVER (address), EDGEWARDEN_TOKEN (an API token, instead of a log-in), EDGEWARDEN_USER and
EDGEWARDEN_PASSWORD (logs in by itself; the user is ``admin`` unless said), EDGEWARDEN_CA (PEM file that signs the
console's certificate when it is served over TLS).
"""

import json
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.cookies import SimpleCookie
from pathlib import Path
from typing import IO, TypeVar

import msgspec
import urllib3

from fleet_server.api_types import API, LoginRequest, Problem

DEFAULT_SERVER = "http://127.0.0.1:8080"
ADMIN = "admin"
COOKIE, BROWSER_COOKIE = "edgewarden_session", "edgewarden_browser"
_BROWSER = "#browser"  # after the server's address: the mark of who logged in here before
MAX_ANSWER = 64 * 1024 * 1024  # bytes; a fleet's device list is far below, a runaway answer is not read
_TIMEOUT = urllib3.Timeout(connect=5.0, read=60.0)
_UPLOAD_TIMEOUT = urllib3.Timeout(connect=5.0, read=600.0)
_FIRST_ERROR = HTTPStatus.BAD_REQUEST  # 4xx and 5xx are the errors
_CSRF = {"X-Requested-With": "edgewarden"}

T = TypeVar("T")


class ApiError(Exception):
    """The server refused a request. Fields: ``status``, ``title``, ``detail``."""

    exit_code = 1

    def __init__(self, status: int, title: str, detail: str = "") -> None:
        """Keep the parts of the problem; the text is the most useful of them."""
        super().__init__(detail or title)
        self.status = status
        self.title = title
        self.detail = detail


class NotLoggedIn(ApiError):
    """The server wants a log-in first."""

    exit_code = 3


class Unreachable(ApiError):
    """No answer came."""

    exit_code = 4


class Session:
    """One operator talking to one fleet server."""

    def __init__(
        self,
        server: str | None = None,
        *,
        cookies: Path | None = None,
        password: str | None = None,
        user: str | None = None,
        token: str | None = None,
        ca: str | None = None,
    ) -> None:
        """Take what is not given from the environment; no request is made yet."""
        self.server = (server or os.environ.get("EDGEWARDEN_SERVER") or DEFAULT_SERVER).rstrip("/")
        self._cookies = CookieFile(cookies or default_cookie_file())
        self._token = token or os.environ.get("EDGEWARDEN_TOKEN")
        self._user = user or os.environ.get("EDGEWARDEN_USER") or ADMIN
        self._password = None if self._token else password or os.environ.get("EDGEWARDEN_PASSWORD")
        self._pool = urllib3.PoolManager(ca_certs=_readable(ca or os.environ.get("EDGEWARDEN_CA")), retries=False)

    def close(self) -> None:
        """Close the connections; the log-in stays."""
        self._pool.clear()

    def login(self, password: str, user: str | None = None) -> None:
        """Log in and keep the cookie for later commands; raise `NotLoggedIn` when refused."""
        request = LoginRequest(user=user or self._user, password=password)
        answer = self._send("POST", "/login", msgspec.json.encode(request))
        if answer.status >= _FIRST_ERROR:
            raise _error(answer)
        if COOKIE not in answer.cookies:
            detail = "the server accepted the log-in but sent no session cookie"
            raise ApiError(answer.status, "no session", detail)

    def logout(self, *, everywhere: bool = False) -> None:
        """End the session on the server, or all of the user's, and forget the cookie."""
        if everywhere:
            self._answer("POST", "/logout-everywhere", b"{}")
        else:
            self._send("POST", "/logout", b"{}")
        self._cookies.save(self.server, None)

    def get(self, path: str, type: type[T]) -> T:  # noqa: A002 - reads as `get(path, type=...)`
        """GET a resource; raise `ApiError`."""
        return msgspec.json.decode(self._answer("GET", path), type=type)

    def create(self, path: str, body: msgspec.Struct, type: type[T]) -> T:  # noqa: A002 - as in get
        """POST what makes something new, once: when the answer is lost it is asked for again; raise `ApiError`."""
        key, content = {"Idempotency-Key": str(uuid.uuid4())}, msgspec.json.encode(body)
        try:
            answer = self._answer("POST", path, content, headers=key)
        except Unreachable:
            answer = self._answer("POST", path, content, headers=key)
        return msgspec.json.decode(answer, type=type)

    def patch(self, path: str, body: msgspec.Struct, type: type[T], *, revision: int) -> T:  # noqa: A002 - as in get
        """PATCH a resource if it still has this revision; raise `ApiError`."""
        content, headers = msgspec.json.encode(body), {"If-Match": f'"{revision}"'}
        return msgspec.json.decode(self._answer("PATCH", path, content, headers=headers), type=type)

    def delete(self, path: str, *, revision: int | None = None) -> None:
        """DELETE a resource, if it still has this revision; raise `ApiError`."""
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        self._answer("DELETE", path, b"{}", headers=headers)

    def get_bytes(self, path: str) -> bytes:
        """GET a file, such as signed metadata, exactly as stored; raise `ApiError`."""
        return self._answer("GET", path)

    def post(self, path: str, body: msgspec.Struct, type: type[T]) -> T:  # noqa: A002 - as in get
        """POST a JSON body; raise `ApiError`."""
        return msgspec.json.decode(self._answer("POST", path, msgspec.json.encode(body)), type=type)

    def upload(self, path: str, fileobj: IO[bytes], length: int) -> None:
        """POST a file's bytes as they are, e.g. to ``/models/bundles/<sha256>``; raise `ApiError`."""
        self._login_by_environment()
        answer = self._send("POST", path, fileobj, length=length)
        if answer.status >= _FIRST_ERROR:
            raise _error(answer)

    def _answer(
        self, method: str, path: str, body: bytes | None = None, *, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """Send; when the session is over and a password is at hand, log in and send once more."""
        self._login_by_environment()
        answer = self._send(method, path, body, headers=headers)
        if answer.status == HTTPStatus.UNAUTHORIZED and self._password:
            self.login(self._password)
            answer = self._send(method, path, body, headers=headers)
        if answer.status >= _FIRST_ERROR:
            raise _error(answer)
        return answer.data

    def _login_by_environment(self) -> None:
        if self._password and not self._cookies.load(self.server):
            self.login(self._password)

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        *,
        length: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> "Answer":
        headers = {**_CSRF, **self._proof(), **(headers or {})}
        if length is not None:
            headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(length)}
        elif body is not None:
            headers["Content-Type"] = "application/json"
        timeout = _TIMEOUT if length is None else _UPLOAD_TIMEOUT
        try:
            answer = self._pool.request(
                method,
                f"{self.server}{API}{path}",
                body=body,
                headers=headers,
                timeout=timeout,
                redirect=False,
                preload_content=False,
            )
            read = _read_capped(answer)
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(0, "no answer", f"no answer from {self.server}: {error}") from error
        self._keep(read.cookies)
        return read

    def _proof(self) -> dict[str, str]:
        """Return the header that says who asks."""
        if self._token:
            return {"Authorization": f"Bearer {self._token}"}
        kept = {COOKIE: self._cookies.load(self.server), BROWSER_COOKIE: self._cookies.load(self.server + _BROWSER)}
        cookies = "; ".join(f"{name}={value}" for name, value in kept.items() if value)
        return {"Cookie": cookies} if cookies else {}

    def _keep(self, cookies: Mapping[str, str]) -> None:
        """Keep what the server set: at a log-in, and when a session gets another id."""
        for name, place in ((COOKIE, self.server), (BROWSER_COOKIE, self.server + _BROWSER)):
            if cookies.get(name):
                self._cookies.save(place, cookies[name])


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back, read within the cap."""

    status: int
    data: bytes
    cookies: dict[str, str]  # that it sets


class CookieFile:
    """Log-in cookies by server address, in a file only its owner may read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, server: str) -> str | None:
        """Return the cookie of a server, or None."""
        cookie = self._all().get(server)
        return cookie if isinstance(cookie, str) else None

    def save(self, server: str, cookie: str | None) -> None:
        """Store a cookie (None forgets it); the file is replaced in one step and never readable by others."""
        cookies = {**self._all(), server: cookie}
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=self._path.parent)  # mkstemp makes it 0600
        with os.fdopen(handle, "w") as file:
            json.dump({k: v for k, v in cookies.items() if v}, file)
        Path(name).replace(self._path)

    def _all(self) -> dict[str, object]:
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def default_cookie_file() -> Path:
    """Return ``$XDG_CONFIG_HOME/edgewarden/session.json`` (default ``~/.config``)."""
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "edgewarden" / "session.json"


def _readable(ca: str | None) -> str | None:
    """Return the CA file's path; raise `ApiError` naming it when it cannot be read (urllib3 would not)."""
    if ca is not None and not os.access(ca, os.R_OK):
        raise ApiError(0, "no CA", f"the CA file {ca} (EDGEWARDEN_CA) cannot be read")
    return ca


def _read_capped(answer: urllib3.BaseHTTPResponse) -> "Answer":
    data = answer.read(MAX_ANSWER + 1)
    answer.release_conn()
    if len(data) > MAX_ANSWER:
        raise ApiError(answer.status, "answer too long", f"the answer is over {MAX_ANSWER} bytes")
    return Answer(status=answer.status, data=data, cookies=_cookies_of(answer.headers.getlist("Set-Cookie")))


def _cookies_of(headers: Sequence[str]) -> dict[str, str]:
    jars = [SimpleCookie(header) for header in headers]
    return {name: morsel.value for jar in jars for name, morsel in jar.items()}


def _error(answer: Answer) -> ApiError:
    """Turn a problem+json answer into an error; any other body becomes its status text."""
    kind = NotLoggedIn if answer.status == HTTPStatus.UNAUTHORIZED else ApiError
    try:
        problem = msgspec.json.decode(answer.data, type=Problem)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return kind(answer.status, f"HTTP {answer.status}", f"the server answered {answer.status}")
    return kind(answer.status, problem.title, problem.detail)
