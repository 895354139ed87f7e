"""The guard before every route: who asks, what the route's rule says, and that our own page or program sent it.

Each route names its rule beside itself: ``opt=needs(Permission.ORDER)``. A route without one lets nobody in. Knows
cookies, the API tokens' header and the defence against cross-site requests. It stops there: what a log-in is worth is
for `access.py`, who may do what for `core/access.py`, what is logged for `web/recording.py`.

A request that changes something must show that our own page or program sent it: a JSON or binary body with the header
``X-Requested-With: edgewarden`` (which another site's form cannot send), or a form with the session's token. One with
an API token needs no such proof, since no browser adds it by itself.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from litestar import Request
from litestar.concurrency import sync_to_thread
from litestar.connection import ASGIConnection
from litestar.datastructures import Cookie, State
from litestar.di import NamedDependency
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException, TooManyRequestsException
from litestar.handlers import BaseRouteHandler
from litestar.params import SkipValidation

from fleet_server.access import Access, Attempt, LoggedIn, LoginRefused, TooManyLogins
from fleet_server.core.access import Caller, Permission, Rule, Standing, may
from fleet_server.core.audit import Act
from fleet_server.web.problems import refuse_nul
from fleet_server.web.repeats import Repeats

COOKIE = "edgewarden_session"
BROWSER_COOKIE = "edgewarden_browser"  # says that this browser has logged in before; opens nothing
BROWSER_LIFE = 365 * 24 * 3600  # seconds
CSRF_FIELD = "csrf"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_PROGRAM_BODIES = frozenset({"application/json", "application/octet-stream"})
_PROGRAM_HEADER = "edgewarden"
_BEARER = "bearer "

AnyRequest = Request[object, object, State]
AnyConnection = ASGIConnection[object, object, object, State]


# ---------------------------------------------------------------- rules beside the routes
def needs(rule: Rule, *, form: bool = False, repeatable: bool = False) -> dict[str, Any]:
    """Return a route's ``opt``: who may use it.

    ``form``: it takes a form instead of JSON. ``repeatable``: an Idempotency-Key makes a repeat safe.
    """
    return {"rule": rule, "form": form, "repeatable": repeatable}


def rule_of(handler: BaseRouteHandler) -> Rule | None:
    """Return the rule of a route; None when nobody gave it one."""
    if getattr(handler, "http_methods", None) == {"OPTIONS"}:  # made by Litestar for each path
        return Standing.KNOWN
    rule = handler.opt.get("rule")
    return rule if isinstance(rule, Permission | Standing) else None


# ---------------------------------------------------------------- one request
@dataclass(kw_only=True)
class Visit:
    """What the guard found out about a request, and what its handler says of it for the audit log."""

    address: str
    action: str
    changes: bool  # by its method
    caller: Caller | None = None
    claimed: str = ""  # the user name that somebody gave who is not known yet
    offered: bool = False  # some proof of who asks came with it, right or wrong
    refused: bool = False
    logged: bool = False  # with the change itself
    about: str = ""
    detail: str = ""
    fresh: Cookie | None = None  # the session has got another token
    repeat: str | None = None  # key of a request that may be repeated; its answer is kept

    def act(self, at: int) -> Act:
        """Return what is logged of this request when it is done."""
        who, by = (self.caller.account, self.caller.by) if self.caller else (self.claimed, "")
        return Act(at=at, who=who, by=by, address=self.address, action=self.action, about=self.about)


def visit_of(request: AnyRequest) -> Visit:
    """Return what the guard found out."""
    visit = request.state.visit
    assert isinstance(visit, Visit)
    return visit


def caller_of(request: AnyRequest) -> Caller:
    """Return who asks, on routes that need a log-in."""
    caller = visit_of(request).caller
    assert caller is not None
    return caller


def note(request: AnyRequest, about: str) -> None:
    """Say for the audit log on what something is done; without it the parts of the path are logged."""
    visit_of(request).about = about


def address_of(request: AnyRequest) -> str:
    """Return where a request came from."""
    return request.client.host if request.client else "unknown"


# ---------------------------------------------------------------- cookies and tokens
class Doorkeeper:
    """Translates between HTTP and `Access`. ``secure`` marks cookies for TLS only."""

    def __init__(self, access: Access, repeats: Repeats, *, clock: Callable[[], int], secure: bool) -> None:
        self.access = access
        self.repeats = repeats
        self.clock = clock
        self._secure = secure

    def log_in(self, request: AnyRequest, name: str, password: str) -> list[Cookie]:
        """Return the cookies of a new session; raise NotAuthorizedException or TooManyRequestsException."""
        visit = visit_of(request)
        visit.claimed = name
        try:
            opened = self.access.log_in(_attempt(request, name, password), self.clock())
        except LoginRefused as error:
            raise NotAuthorizedException(str(error)) from error
        except TooManyLogins as error:
            raise _too_many(error) from error
        visit.logged = True
        return self._cookies(opened)

    def log_out(self, request: AnyRequest, *, everywhere: bool = False) -> Cookie:
        """End the session, or all of the user's; return the cookie that removes it from the browser."""
        act, caller = self.act(request), caller_of(request)
        if everywhere:
            self.access.log_out_everywhere(caller, act)
        else:
            self.access.log_out(caller, act)
        return self._cookie(COOKIE, "", max_age=0)

    def change_password(self, request: AnyRequest, present: str, new: str) -> list[Cookie]:
        """Give the caller another password; return the cookies of the one session that is left."""
        caller, act = caller_of(request), self.act(request)
        try:
            attempt = _attempt(request, caller.account, present)
            return self._cookies(self.access.change_own_password(caller, attempt, new, act))
        except TooManyLogins as error:
            raise _too_many(error) from error

    def act(self, request: AnyRequest, about: str = "") -> Act:
        """Return the act that is logged with the change itself; nothing more is logged when that succeeds."""
        visit = visit_of(request)
        visit.about = about or visit.about
        visit.logged = True
        return visit.act(self.clock())

    def identify(self, request: AnyRequest, visit: Visit) -> Caller | None:
        """Return who asks. An API token that is wrong is not made good by a cookie."""
        now, given = self.clock(), request.headers.get("authorization", "")
        if given:
            visit.offered = True
            is_token = given[: len(_BEARER)].lower() == _BEARER
            return self.access.find_by_token(given[len(_BEARER) :].strip(), now) if is_token else None
        token = request.cookies.get(COOKIE)
        found = self.access.find(token, now) if token else None
        if found is not None and found.fresh is not None:
            visit.fresh = self._cookie(COOKIE, found.fresh)
        return found.caller if found else None

    def _cookies(self, opened: LoggedIn) -> list[Cookie]:
        mark = self._cookie(BROWSER_COOKIE, opened.browser, max_age=BROWSER_LIFE)
        return [self._cookie(COOKIE, opened.token), mark]

    def _cookie(self, name: str, value: str, *, max_age: int | None = None) -> Cookie:
        return Cookie(
            key=name,
            value=value,
            httponly=True,
            samesite="strict",
            secure=self._secure,
            path="/",
            max_age=max_age,
        )


GivenDoorkeeper = NamedDependency[SkipValidation[Doorkeeper]]


# ---------------------------------------------------------------- the guard
def guard(doorkeeper: Doorkeeper) -> Callable[[AnyConnection, BaseRouteHandler], Awaitable[None]]:
    """Return the guard of every route."""

    async def require(connection: AnyConnection, handler: BaseRouteHandler) -> None:
        assert isinstance(connection, Request)  # there are no websockets
        visit = connection.state.visit = _visit(connection, handler)
        refuse_nul(connection)
        try:
            await _admit(doorkeeper, connection, handler, visit)
        except (NotAuthorizedException, PermissionDeniedException):
            visit.refused = True
            raise
        if handler.opt.get("repeatable") and visit.caller is not None:
            visit.repeat = await doorkeeper.repeats.begin(connection, visit.caller.account)

    return require


async def _admit(doorkeeper: Doorkeeper, request: AnyRequest, handler: BaseRouteHandler, visit: Visit) -> None:
    _check_origin(request)
    if not handler.opt.get("form") and "authorization" not in request.headers:
        _check_sent_by_program(request)
    rule = rule_of(handler)
    if rule is None:
        raise PermissionDeniedException("nobody said who may use this route: it lacks opt=needs(…)")
    if rule is Standing.ANYBODY:
        return
    visit.caller = await sync_to_thread(doorkeeper.identify, request, visit)
    if visit.caller is None:
        raise NotAuthorizedException("log in first", headers={"WWW-Authenticate": 'Bearer realm="edgewarden"'})
    if not may(visit.caller, rule):
        raise PermissionDeniedException(_why_not(visit.caller, rule))
    if handler.opt.get("form"):
        await _check_form(request, visit.caller)


def _why_not(caller: Caller, rule: Rule) -> str:
    if rule is Standing.PERSON:
        return "this needs a log-in; an API token is not enough"
    what = "your role" if caller.is_person else "this API token, or its user's role,"
    return f"{what} does not have the permission {rule.value!r} (you are {caller.account!r}, {caller.role.value})"


def _visit(request: AnyRequest, handler: BaseRouteHandler) -> Visit:
    parts: Mapping[str, object] = request.path_params
    return Visit(
        address=address_of(request),
        action=handler.handler_name.rpartition(".")[2].replace("_", "-"),
        changes=request.method not in _SAFE,
        about=" ".join(str(part) for part in parts.values()),
    )


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


async def _check_form(request: AnyRequest, caller: Caller) -> None:
    form = await request.form()
    if not hmac.compare_digest(str(form.get(CSRF_FIELD, "")).encode(), caller.csrf.encode()):
        raise PermissionDeniedException("this form is out of date; go back, reload the page and try again")


def _attempt(request: AnyRequest, name: str, password: str) -> Attempt:
    browser = request.cookies.get(BROWSER_COOKIE)
    return Attempt(name=name, password=password, address=address_of(request), browser=browser)


def _too_many(error: TooManyLogins) -> TooManyRequestsException:
    return TooManyRequestsException(str(error), headers={"Retry-After": str(error.seconds)})
