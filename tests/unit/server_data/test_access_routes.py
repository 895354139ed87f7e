"""Every route of the console's port, for everybody: who gets through is what the rule beside the route says.

The routes come from the running app and the expectation from the table of permissions, so a new route is tested as
soon as it is there. One without a rule lets nobody in, and fails here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from access_world import FORM, PROGRAM, add_token, add_user, log_in, log_of
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute
from web_world import Web, running_web

from fleet_server.core.access import Caller, Permission, Role, Rule, Standing, may, permissions_of
from fleet_server.web.auth import CSRF_FIELD, rule_of

OPEN = {
    ("GET", "/health"),
    ("GET", "/login"),
    ("GET", "/metrics"),  # has a token of its own
    ("GET", "/static/{name:str}"),
    ("POST", "/login"),
    ("POST", "/api/v1/login"),
}


@dataclass(frozen=True)
class Case:
    """A route."""

    method: str
    template: str
    handler: HTTPRouteHandler

    @property
    def rule(self) -> Rule | None:
        return rule_of(self.handler)

    @property
    def path(self) -> str:
        return re.sub(r"\{[^}]*\}", "x", self.template)

    @property
    def changes(self) -> bool:
        return self.method not in ("GET", "OPTIONS")


def routes_of(app: Litestar) -> list[Case]:
    return [
        Case(method, route.path, route.route_handler_map[method][0])
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
    ]


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("routes")) as running:
        for role in set(Role) - {Role.ADMIN}:  # the first user is one
            add_user(running, role.value, role)
        yield running


# ---------------------------------------------------------------- the rules themselves
def test_every_route_says_who_may_use_it(web: Web) -> None:
    cases = routes_of(web.app)
    assert len(cases) > 60
    assert [(case.method, case.template) for case in cases if case.rule is None] == []


def test_only_these_routes_are_open_to_everybody(web: Web) -> None:
    found = {(case.method, case.template) for case in routes_of(web.app) if case.rule is Standing.ANYBODY}
    assert found == OPEN


def test_no_change_asks_for_less_than_a_permission_or_a_person(web: Web) -> None:
    changes = [case for case in routes_of(web.app) if case.changes]
    weak = {(case.method, case.template) for case in changes if case.rule in (Standing.KNOWN, Permission.LOOK)}
    assert weak == set()


# ---------------------------------------------------------------- everybody at every route
def ask(web: Web, case: Case, headers: dict[str, str]) -> int:
    body = b"{}"
    if case.handler.opt.get("form"):
        headers, body = headers | FORM, f"{CSRF_FIELD}={_csrf(web, headers)}".encode()
    return web.request(case.method, case.path, headers=headers, body=body if case.changes else None).status


def _csrf(web: Web, headers: dict[str, str]) -> str:
    token = headers.get("Cookie", "").partition("=")[2]
    found = web.access.find(token, web.clock()) if token else None
    return found.caller.csrf if found else ""


def verdict(status: int) -> str:
    return {401: "log in first", 403: "not allowed"}.get(status, "let through")


def expected(caller: Caller | None, rule: Rule) -> str:
    if may(caller, rule):
        return "let through"
    return "log in first" if caller is None else "not allowed"


def compare(web: Web, caller: Caller | None, headers: dict[str, str] | None, *, spare: set[str]) -> None:
    """Ask every route; ``headers`` None: of a fresh session each time that one may end."""
    fresh = partial(log_in, web, caller.account) if caller is not None else dict
    session = fresh() if headers is None else headers
    wrong = {}
    for case in routes_of(web.app):
        if case.template in spare or (case.method == "OPTIONS" and caller is not None):
            continue
        assert case.rule is not None
        status = ask(web, case, session)
        if verdict(status) != expected(caller, case.rule) or status >= 500:
            wrong[(case.method, case.template)] = (status, expected(caller, case.rule))
        if headers is None and "logout" in case.template:
            session = fresh()
    assert wrong == {}


OWN = {"/login", "/api/v1/login", "/metrics"}  # open, and 401 is their own answer


def test_nobody_gets_through_but_where_it_is_open(web: Web) -> None:
    compare(web, None, PROGRAM, spare=OWN)


@pytest.mark.parametrize("role", Role)
def test_a_person_gets_through_as_the_table_says(web: Web, role: Role) -> None:
    caller = Caller(account=role.value, role=role, permissions=permissions_of(role), session_sha256="x")
    compare(web, caller, None, spare=OWN)


@pytest.mark.parametrize("scope", Permission)
def test_a_token_gets_through_as_its_one_scope_says(web: Web, scope: Permission) -> None:
    caller = Caller(account="admin", role=Role.ADMIN, permissions=frozenset([scope]), by="token:x")
    compare(web, caller, add_token(web, "admin", scope), spare=OWN)


def test_a_token_never_has_more_than_its_user(web: Web) -> None:
    add_user(web, "grace", Role.OPERATOR)
    headers = add_token(web, "grace", *permissions_of(Role.OPERATOR))
    assert web.request("POST", "/api/v1/deployments", headers=headers, body=b"{}").status == 400
    body = b'{"role": "viewer"}'
    assert web.request("PATCH", "/api/v1/users/grace", headers=log_in(web, "admin"), body=body).status == 200
    assert web.request("POST", "/api/v1/deployments", headers=headers, body=b"{}").status == 403
    assert web.request("GET", "/api/v1/devices", headers=headers).status == 200


def test_every_change_and_every_refusal_is_in_the_log(web: Web) -> None:
    admin, viewer = log_in(web, "admin"), log_in(web, "viewer")
    missing = {}
    for case in [case for case in routes_of(web.app) if case.changes and case.rule is not Standing.ANYBODY]:
        if case.handler.opt.get("form") or "logout" in case.template:
            continue
        for who, headers in (("admin", admin), ("viewer", viewer)):
            web.clock.ahead += 61_000  # so that nothing is summed up
            web.access.note_sums(web.clock())
            before = log_of(web, admin)[0].sequence
            status = ask(web, case, headers)
            newest = log_of(web, admin)[0]
            result = "refused" if status in (401, 403, 429) else "failed" if status >= 400 else "done"
            if (newest.who, newest.result.value, newest.sequence > before) != (who, result, True):
                missing[(case.method, case.template)] = (status, newest)
    assert missing == {}
