"""Who may use the console: one admin account, log-in, sessions, and the guard that stands before every route.

Knows passwords (argon2id), session cookies, the log-in rate limit and the defence against cross-site requests. It
stops there: what a request does is for the routes. Routes are closed unless they say ``opt={"open": True}``.

A request that changes something must show that our own page or program sent it: a JSON or binary body with the
header ``X-Requested-With: edgewarden`` (which another site's form cannot send), or a form with the session's token.
"""

import hashlib
import hmac
import os
import secrets
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from litestar import Request, Response
from litestar.concurrency import sync_to_thread
from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie, State
from litestar.di import NamedDependency
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException, TooManyRequestsException
from litestar.handlers import BaseRouteHandler
from litestar.params import SkipValidation

from fleet_server.ports import Accounts, LoginSession
from fleet_server.web.problems import refuse_nul

ADMIN = "admin"
COOKIE = "edgewarden_session"
SESSION_LIFE = 12 * 3600 * 1000  # ms since the last use
ATTEMPTS = 5  # log-ins per address and minute
MINUTE = 60_000  # ms
MAX_ADDRESSES = 10_000  # remembered by the rate limit
MAX_PASSWORD = 1024  # characters; argon2 reads all of them
MAX_PASSWORD_FILE = 4096  # bytes
CSRF_FIELD = "csrf"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PROGRAM_BODIES = frozenset({"application/json", "application/octet-stream"})
_PROGRAM_HEADER = "edgewarden"

AnyRequest = Request[object, object, State]
AnyConnection = ASGIConnection[object, object, object, State]


class LoginGate:
    """Lets each address try a few times a minute. Thread-safe."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._tries: dict[str, deque[int]] = {}
        self._lock = threading.Lock()

    def pass_(self, address: str) -> None:
        """Count an attempt; raise TooManyRequestsException with the seconds to wait."""
        now = self._clock()
        with self._lock:
            if len(self._tries) > MAX_ADDRESSES:
                self._forget(now)
            tries = self._tries.setdefault(address, deque(maxlen=ATTEMPTS))
            if len(tries) == ATTEMPTS and now - tries[0] < MINUTE:
                wait = (MINUTE - (now - tries[0])) // 1000 + 1
                raise TooManyRequestsException(
                    f"too many log-ins; try again in {wait} s", headers={"Retry-After": str(wait)}
                )
            tries.append(now)

    def _forget(self, now: int) -> None:
        self._tries = {name: tries for name, tries in self._tries.items() if now - tries[-1] < MINUTE}


class Doorkeeper:
    """Checks passwords, and makes, finds and ends sessions. ``secure`` marks cookies for TLS only."""

    def __init__(self, accounts: Accounts, *, clock: Callable[[], int], secure: bool) -> None:
        self._accounts = accounts
        self._clock = clock
        self._secure = secure
        self._gate = LoginGate(clock)
        self._hasher = PasswordHasher()
        self._decoy = self._hasher.hash(secrets.token_hex(16))
        self._one_at_a_time = threading.Lock()  # each check takes 64 MiB

    def log_in(self, address: str, account: str, password: str) -> Cookie:
        """Return the cookie of a new session; raise NotAuthorizedException or TooManyRequestsException."""
        self._gate.pass_(address)
        if len(password) > MAX_PASSWORD or not self._is_right(account, password):
            raise NotAuthorizedException("the user name or the password is wrong")
        token = secrets.token_urlsafe(32)
        self._accounts.add_session(
            LoginSession(
                token_sha256=_sha256(token),
                account=account,
                csrf=secrets.token_urlsafe(24),
                expires_at=self._clock() + SESSION_LIFE,
            )
        )
        return self._cookie(token, max_age=None)

    def log_out(self, session: LoginSession) -> Cookie:
        """End a session; return the cookie that removes it from the browser."""
        self._accounts.end_session(session.token_sha256)
        return self._cookie("", max_age=0)

    def find(self, token: str | None) -> LoginSession | None:
        """Return the session of a cookie, and keep it alive."""
        if not token:
            return None
        now = self._clock()
        session = self._accounts.session(_sha256(token), now)
        if session is not None and session.expires_at - now < SESSION_LIFE // 2:
            self._accounts.extend_session(session.token_sha256, now + SESSION_LIFE)
        return session

    def _is_right(self, account: str, password: str) -> bool:
        """Compare in the same time whether or not the account exists."""
        stored = self._accounts.password_hash(account) if account.isprintable() else None
        with self._one_at_a_time:
            try:
                self._hasher.verify(stored or self._decoy, password)
            except (VerifyMismatchError, InvalidHashError):
                return False
        return stored is not None

    def _cookie(self, token: str, *, max_age: int | None) -> Cookie:
        return Cookie(
            key=COOKIE,
            value=token,
            httponly=True,
            samesite="strict",
            secure=self._secure,
            path="/",
            max_age=max_age,
        )


GivenDoorkeeper = NamedDependency[SkipValidation[Doorkeeper]]


def guard(doorkeeper: Doorkeeper) -> Callable[[AnyConnection, BaseRouteHandler], Awaitable[None]]:
    """Return the guard of every route."""

    async def require(connection: AnyConnection, handler: BaseRouteHandler) -> None:
        assert isinstance(connection, Request)  # there are no websockets
        refuse_nul(connection)
        _check_origin(connection)
        if not handler.opt.get("form"):
            _check_sent_by_program(connection)
        if handler.opt.get("open"):
            return
        session = await sync_to_thread(doorkeeper.find, connection.cookies.get(COOKIE))
        if session is None:
            raise NotAuthorizedException("log in first")
        connection.state.session = session
        if handler.opt.get("form"):
            await _check_form(connection, session)

    return require


def session_of(request: AnyRequest) -> LoginSession:
    """Return the session that the guard found."""
    session = request.state.session
    assert isinstance(session, LoginSession)
    return session


def address_of(request: AnyRequest) -> str:
    """Return where a request came from."""
    return request.client.host if request.client else "unknown"


def with_cookie(response: Response[object], cookie: Cookie) -> Response[object]:
    """Return a response that sets a cookie."""
    response.set_cookie(cookie)
    return response


def make_admin(accounts: Accounts, folder: Path) -> str | None:
    """Make the admin account if there is none; return its password, which is shown this once.

    The password is taken from ``admin-password`` when an operator put it there, else made and written to it.
    """
    if accounts.password_hash(ADMIN) is not None:
        return None
    password = _chosen_password(folder / "admin-password")
    accounts.set_password_hash(ADMIN, PasswordHasher().hash(password))
    return password


def _chosen_password(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            password = file.read(MAX_PASSWORD_FILE).strip()
    except FileNotFoundError:
        password = ""
    if password:
        return password
    password = secrets.token_urlsafe(15)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(password + "\n")
    return password


def _check_origin(request: AnyRequest) -> None:
    """Refuse what a browser says another site sent."""
    if request.method in _SAFE:
        return
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise PermissionDeniedException("this request was sent by another site")


def _check_sent_by_program(request: AnyRequest) -> None:
    if request.method in _SAFE:
        return
    body = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body not in _PROGRAM_BODIES or request.headers.get("x-requested-with") != _PROGRAM_HEADER:
        raise PermissionDeniedException(
            "a change needs a JSON or octet-stream body and the header X-Requested-With: edgewarden"
        )


async def _check_form(request: AnyRequest, session: LoginSession) -> None:
    form = await request.form()
    if not hmac.compare_digest(str(form.get(CSRF_FIELD, "")).encode(), session.csrf.encode()):
        raise PermissionDeniedException("this form is out of date; go back, reload the page and try again")


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
