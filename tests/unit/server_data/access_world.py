"""Users of every role on a running web, each with the headers that say who asks."""

import secrets
from collections.abc import Sequence

import msgspec
from web_world import PASSWORD, Web

from fleet_server.access import Attempt
from fleet_server.api_types import AuditEntry, AuditPage
from fleet_server.core.access import Caller, Permission, Role, permissions_of
from fleet_server.core.audit import Act
from fleet_server.web.auth import COOKIE

GOOD = "a password of some length"
PROGRAM = {"Content-Type": "application/json", "X-Requested-With": "edgewarden"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def act_of(web: Web, action: str = "test") -> Act:
    return Act(at=web.clock(), who="test", by="test", address="", action=action)


def add_user(web: Web, name: str, role: Role) -> None:
    web.access.add_user(name, GOOD, role, act_of(web))


def log_in(web: Web, name: str, password: str = "") -> dict[str, str]:
    """Return the headers of a fresh session, opened without HTTP; from an address of its own."""
    password = password or (PASSWORD if name == "admin" else GOOD)
    attempt = Attempt(name=name, password=password, address=secrets.token_hex(4))
    return PROGRAM | {"Cookie": f"{COOKIE}={web.access.log_in(attempt, web.clock()).token}"}


def add_token(web: Web, name: str, *scopes: Permission, days: int = 1) -> dict[str, str]:
    """Return the headers of an API token."""
    account = web.access.user(name)
    caller = Caller(account=name, role=account.role, permissions=permissions_of(account.role), session_sha256="x")
    _, text = web.access.add_token(caller, "test", scopes, days, act_of(web))
    return {"Content-Type": "application/json", "Authorization": f"Bearer {text}"}


def log_of(web: Web, headers: dict[str, str], query: str = "") -> Sequence[AuditEntry]:
    """Read the audit log over HTTP, newest first."""
    answer = web.request("GET", f"/api/v1/audit?limit=1000{query}", headers=headers)
    assert answer.status == 200, answer.data
    return msgspec.json.decode(answer.data, type=AuditPage).entries
