"""Lets people and their programs in: log-in, sessions, users, API tokens.

Drives `core/access.py` (who may do what) and `core/attempts.py` (how often a password may be tried) over the stored
accounts. Every change is logged together with itself. It stops before HTTP: cookies and headers are in `web/auth.py`.

Errors: `LoginRefused`, `TooManyLogins` (the person, now or later) · `UnknownUser`, `UnknownToken`, `UserExists`,
`LastAdmin`, `Stale`, `NotAccepted` (whoever asked for the change; the text says what to do instead).
"""

import hashlib
import hmac
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from fleet_server.core.access import (
    MAX_PASSWORD,
    Caller,
    Permission,
    Role,
    fault_of_name,
    fault_of_password,
    permissions_of,
    permissions_of_token,
)
from fleet_server.core.attempts import Attempts, keys_of
from fleet_server.core.audit import SERVER, Act, Refusals, Result
from fleet_server.ports import Account, Accounts, ApiToken, AuditLog, LoginSession, Passwords

ADMIN = "admin"
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000  # ms
IDLE = 12 * HOUR  # a session ends when it was not used for so long
ABSOLUTE = 7 * DAY  # and in any case so long after the log-in
RENEW_AFTER = HOUR  # so old, a session gets another token
GRACE = 5 * MINUTE  # and the one before still counts for requests that are under way
TOKEN_PREFIX = "ew"  # noqa: S105 - begins every API token, so that scanners find one that was published by mistake
MAX_TOKEN_DAYS = 366
MAX_TOKEN_NAME = 64  # characters
_MAX_TOKEN = 200  # characters


class LoginRefused(Exception):
    """The user name or the password is wrong, or the user is disabled; which of them is not said."""

    def __init__(self) -> None:
        """Say no more than needed."""
        super().__init__("the user name or the password is wrong")


class TooManyLogins(Exception):
    """Wait first. Field: ``seconds``."""

    def __init__(self, seconds: int) -> None:
        """Say how long."""
        super().__init__(f"too many log-ins; try again in {seconds} s")
        self.seconds = seconds


class UnknownUser(Exception):
    """There is no such user."""

    def __init__(self, name: str) -> None:
        """Name it."""
        super().__init__(f"there is no user {name[:80]!r}")


class UnknownToken(Exception):
    """There is no such API token, or it is not the caller's."""

    def __init__(self, token_id: str) -> None:
        """Name it."""
        super().__init__(f"there is no API token {token_id[:80]!r}")


class UserExists(Exception):
    """The name is taken."""

    def __init__(self, name: str) -> None:
        """Name it."""
        super().__init__(f"there is a user {name!r} already")


class LastAdmin(Exception):
    """Nobody could manage users any more."""

    def __init__(self, name: str) -> None:
        """Say what to do first."""
        super().__init__(f"{name!r} is the last admin who may log in; make another one first")


class Stale(Exception):
    """Somebody else changed it meanwhile."""

    def __init__(self, name: str, revision: int) -> None:
        """Say which revision is there."""
        super().__init__(f"user {name!r} was changed meanwhile (now revision {revision}); look again, then repeat")


class NotAccepted(Exception):
    """A name, password, scope or life that is not possible; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Somebody tries to log in. ``browser``: what an earlier log-in left in this browser."""

    name: str
    password: str
    address: str
    browser: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoggedIn:
    """What a browser gets: the session's token, and a mark that it has logged in under this name."""

    token: str
    browser: str
    session: LoginSession


@dataclass(frozen=True, kw_only=True)
class Found:
    """Who a session's token belongs to; ``fresh`` when the session has just got another token."""

    caller: Caller
    fresh: str | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """What shall be different about a user; None leaves it."""

    role: Role | None = None
    disabled: bool | None = None
    password: str | None = None


@dataclass(kw_only=True)
class Access:
    """The driver. ``random_bytes`` makes secrets. Thread-safe."""

    accounts: Accounts
    audit: AuditLog
    passwords: Passwords
    random_bytes: Callable[[int], bytes]
    attempts: Attempts = field(default_factory=Attempts)
    refusals: Refusals = field(default_factory=Refusals)
    lock: threading.Lock = field(default_factory=threading.Lock)

    # ------------------------------------------------------------ log-in and sessions
    def log_in(self, attempt: Attempt, now: int) -> LoggedIn:
        """Open a session; raise `LoginRefused` or `TooManyLogins`."""
        account = self._check(attempt, now)
        return self._open(account, attempt, now)

    def find(self, token: str, now: int) -> Found | None:
        """Return who a session's token belongs to, and keep the session alive."""
        found = self.accounts.session(_sha256(token), now)
        if found is None:
            return None
        session, account = found
        fresh = self._renew(session, now) if _is_due(session, now) else None
        if fresh is None:
            self._extend(session, now)
        return Found(caller=_person(account, fresh[1] if fresh else session), fresh=fresh[0] if fresh else None)

    def log_out(self, caller: Caller, act: Act) -> None:
        """End a session."""
        self.accounts.end_session(caller.session_sha256, act)

    def log_out_everywhere(self, caller: Caller, act: Act) -> int:
        """End every session of the caller; return how many there were. API tokens stay."""
        return self.accounts.end_sessions(caller.account, act)

    # ------------------------------------------------------------ users
    def user(self, name: str) -> Account:
        """Return a user; raise `UnknownUser`."""
        account = self.accounts.account(name)
        if account is None:
            raise UnknownUser(name)
        return account

    def add_user(self, name: str, password: str, role: Role, act: Act) -> Account:
        """Make a user; raise `UserExists` or `NotAccepted`."""
        _accept(fault_of_name(name) or fault_of_password(password, name))
        account = Account(name=name, password_hash=self.passwords.hash(password), role=role, created_at=act.at)
        self.accounts.add_account(account, act)
        return account

    def change_user(self, name: str, revision: int | None, change: Change, act: Act) -> Account:
        """Change a user, whose sessions end; raise `UnknownUser`, `Stale`, `LastAdmin` or `NotAccepted`."""
        if change == Change():
            raise NotAccepted("nothing to change; give role, disabled or password")
        if change.password is not None:
            _accept(fault_of_password(change.password, name))
        hashed = None if change.password is None else self.passwords.hash(change.password)
        return self.accounts.change_account(
            name, revision, act, role=change.role, disabled=change.disabled, password_hash=hashed
        )

    def remove_user(self, name: str, revision: int | None, act: Act) -> None:
        """Remove a user with sessions and API tokens; raise `UnknownUser`, `Stale` or `LastAdmin`."""
        self.accounts.remove_account(name, revision, act)

    def change_own_password(self, caller: Caller, attempt: Attempt, new: str, act: Act) -> LoggedIn:
        """Give the caller another password; every session ends, and one begins. ``attempt`` holds the present one.

        Raises `TooManyLogins` or `NotAccepted`.
        """
        _accept(fault_of_password(new, caller.account))
        try:
            self._check(attempt, act.at)
        except LoginRefused as error:
            raise NotAccepted("the present password is wrong") from error
        hashed = self.passwords.hash(new)
        return self._open(
            self.accounts.change_account(caller.account, None, act, password_hash=hashed), attempt, act.at
        )

    # ------------------------------------------------------------ API tokens
    def add_token(
        self, caller: Caller, name: str, scopes: Collection[Permission], life_days: int, act: Act
    ) -> tuple[ApiToken, str]:
        """Make an API token; return it, and its text, which is shown this once. Raises `NotAccepted`."""
        beyond = sorted(scope.value for scope in set(scopes) - caller.permissions)
        if beyond:
            raise NotAccepted(f"your role {caller.role.value} does not have: {', '.join(beyond)}")
        if not scopes or not 1 <= life_days <= MAX_TOKEN_DAYS or not 1 <= len(name) <= MAX_TOKEN_NAME:
            raise NotAccepted(
                f"an API token has a name of 1 to {MAX_TOKEN_NAME} characters, at least one scope, "
                f"and a life of 1 to {MAX_TOKEN_DAYS} days"
            )
        token_id, secret = self.random_bytes(6).hex(), self.random_bytes(32).hex()
        token = ApiToken(
            id=token_id,
            account=caller.account,
            name=name,
            secret_sha256=_sha256(secret),
            scopes=frozenset(scopes),
            created_at=act.at,
            expires_at=act.at + life_days * DAY,
        )
        self.accounts.add_api_token(token, replace(act, about=f"{token_id} {name}"))
        return token, f"{TOKEN_PREFIX}_{token_id}_{secret}"

    def tokens(self, caller: Caller, *, everybody: bool) -> Sequence[ApiToken]:
        """Return the caller's API tokens, or everybody's as far as the caller may see them."""
        whole = everybody and Permission.USERS in caller.permissions
        return self.accounts.api_tokens(None if whole else caller.account)

    def find_by_token(self, text: str, now: int) -> Caller | None:
        """Return who an API token speaks for, unless it is unknown, over, revoked, or its user disabled."""
        prefix, _, rest = text[:_MAX_TOKEN].partition("_")
        token_id, _, secret = rest.partition("_")
        found = self.accounts.api_token(token_id) if prefix == TOKEN_PREFIX and token_id.isalnum() else None
        if found is None:
            return None
        token, account = found
        right = hmac.compare_digest(token.secret_sha256, _sha256(secret))
        if not right or token.revoked_at is not None or token.expires_at <= now or account.disabled:
            return None
        if now - (token.last_used_at or 0) >= MINUTE:
            self.accounts.note_use(token.id, now)
        return Caller(
            account=account.name,
            role=account.role,
            permissions=permissions_of_token(account.role, token.scopes),
            by=f"token:{token.id}",
        )

    def revoke_token(self, caller: Caller, token_id: str, act: Act) -> None:
        """Revoke an API token, one's own, or with the permission `users` anybody's; raise `UnknownToken`."""
        found = self.accounts.api_token(token_id) if token_id.isalnum() else None
        mine = found is not None and found[0].account == caller.account
        if not mine and (found is None or Permission.USERS not in caller.permissions):
            raise UnknownToken(token_id)
        self.accounts.revoke_api_token(token_id, act)

    # ------------------------------------------------------------ the audit log
    def note(self, act: Act) -> None:
        """Log an act that has happened; of many refusals of one kind the first, and later a sum."""
        if act.result is not Result.DONE:
            with self.lock:
                admitted = self.refusals.admit(act)
            if not admitted:
                return
        self.audit.append([act])

    def note_sums(self, now: int) -> None:
        """Log the sums of refusals whose minute is over."""
        with self.lock:
            due = self.refusals.due(now)
        if due:
            self.audit.append(due)

    # ------------------------------------------------------------ small parts
    def _check(self, attempt: Attempt, now: int) -> Account:
        """Return whose password this is; raise `LoginRefused` or `TooManyLogins`."""
        account = self.accounts.account(attempt.name) if fault_of_name(attempt.name) is None else None
        keys = keys_of(attempt.address, attempt.name, _proven(attempt.browser, account))
        self._pass_gate(keys, now)
        stored = account.password_hash if account is not None and not account.disabled else None
        right = len(attempt.password) <= MAX_PASSWORD and self.passwords.is_right(stored, attempt.password)
        if account is None or not right:
            raise LoginRefused
        with self.lock:
            self.attempts.take_back(keys)
        return self._with_newest_hash(account, attempt, now)

    def _pass_gate(self, keys: tuple[tuple[str, str], ...], now: int) -> None:
        with self.lock:
            wait = self.attempts.wait(keys, now)
            if wait:
                raise TooManyLogins(wait // 1000 + 1)
            self.attempts.count(keys, now)

    def _with_newest_hash(self, account: Account, attempt: Attempt, now: int) -> Account:
        """Hash the password anew where today's settings are stronger than those it was hashed with."""
        if not self.passwords.is_outdated(account.password_hash):
            return account
        act = Act(at=now, who=SERVER, by=SERVER, address="", action="rehash-password", about=account.name)
        hashed = self.passwords.hash(attempt.password)
        return self.accounts.change_account(account.name, None, act, password_hash=hashed)

    def _open(self, account: Account, attempt: Attempt, now: int) -> LoggedIn:
        token, session = self._new_session(account.name, started_at=now, now=now)
        act = Act(at=now, who=account.name, by="password", address=attempt.address, action="login")
        self.accounts.add_session(session, act)
        mark = _mark(_proven(attempt.browser, account) or self.random_bytes(12).hex(), account)
        return LoggedIn(token=token, browser=mark, session=session)

    def _new_session(self, account: str, *, started_at: int, now: int) -> tuple[str, LoginSession]:
        token = self.random_bytes(32).hex()
        session = LoginSession(
            token_sha256=_sha256(token),
            account=account,
            csrf=self.random_bytes(24).hex(),
            expires_at=min(now + IDLE, started_at + ABSOLUTE),
            started_at=started_at,
            renewed_at=now,
        )
        return token, session

    def _renew(self, session: LoginSession, now: int) -> tuple[str, LoginSession] | None:
        """Give a session another token; the forms that are open keep working. None: another request was faster."""
        token, new = self._new_session(session.account, started_at=session.started_at, now=now)
        new = replace(new, csrf=session.csrf)
        replaced = self.accounts.replace_session(session.token_sha256, new, min(now + GRACE, session.expires_at))
        return (token, new) if replaced else None

    def _extend(self, session: LoginSession, now: int) -> None:
        """Write no more often than needed: an end is exact to half an hour."""
        end = min(now + IDLE, session.started_at + ABSOLUTE)
        if not session.replaced and end - session.expires_at > IDLE // 24:
            self.accounts.extend_session(session.token_sha256, end)


def make_admin(access: Access, password: Callable[[], str], now: int) -> str | None:
    """Make the first user if there is none; return the password, which ``password`` made or found."""
    if access.accounts.accounts():
        return None
    chosen = password()
    account = Account(name=ADMIN, password_hash=access.passwords.hash(chosen), role=Role.ADMIN, created_at=now)
    act = Act(at=now, who=SERVER, by=SERVER, address="", action="add-user", about=f"{ADMIN} as admin")
    access.accounts.add_account(account, act)
    return chosen


def _is_due(session: LoginSession, now: int) -> bool:
    return not session.replaced and now - session.renewed_at >= RENEW_AFTER


def _person(account: Account, session: LoginSession) -> Caller:
    return Caller(
        account=account.name,
        role=account.role,
        permissions=permissions_of(account.role),
        csrf=session.csrf,
        session_sha256=session.token_sha256,
    )


def _accept(fault: str | None) -> None:
    if fault is not None:
        raise NotAccepted(fault)


# The mark of a browser: a name of its own, and a seal that only who knows the password's hash can make. Another
# password makes every mark void.
def _mark(browser: str, account: Account) -> str:
    seal = hmac.new(account.password_hash.encode(), f"{account.name}\n{browser}".encode(), "sha256")
    return f"{browser}.{seal.hexdigest()}"


def _proven(mark: str | None, account: Account | None) -> str | None:
    """Return the browser's name when it has logged in under this account before."""
    if mark is None or account is None:
        return None
    browser = mark[:_MAX_TOKEN].partition(".")[0]
    return browser if hmac.compare_digest(_mark(browser, account).encode(), mark[:_MAX_TOKEN].encode()) else None


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
