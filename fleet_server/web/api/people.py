"""The REST API for people and their access: log-in, passwords, users, API tokens, the audit log.

A user has an ETag, its revision; a change that carries ``If-Match`` is made only to that revision (412 otherwise).
"""

import re
from typing import Annotated, Any

from litestar import Request, Response, Router, delete, get, patch, post
from litestar.datastructures import State
from litestar.exceptions import ClientException
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from fleet_server.access import Change
from fleet_server.api_types import (
    API,
    ApiTokenCreated,
    ApiTokenRequest,
    ApiTokenView,
    AuditEntry,
    AuditPage,
    LoginRequest,
    PasswordRequest,
    UserChange,
    UserRequest,
    UserView,
    WhoAmI,
)
from fleet_server.core.access import Permission, Standing
from fleet_server.core.audit import Entry
from fleet_server.ports import Account, ApiToken
from fleet_server.web.auth import GivenDoorkeeper, caller_of, needs

AnyRequest = Request[object, object, State]
EntryCount = Annotated[int, QueryParameter(ge=1, le=1000)]
Sequence_ = Annotated[int | None, QueryParameter(ge=0, le=2**62)]
_ETAG = re.compile(r'(?:W/)?"([0-9]{1,18})"')


# ---------------------------------------------------------------- oneself
@post("/login", opt=needs(Standing.ANYBODY), status_code=200, sync_to_thread=True)
def login(data: JSONBody[LoginRequest], request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[dict[str, str]]:
    """Log in; the answer sets the session cookie."""
    return Response({"user": data.user}, cookies=doorkeeper.log_in(request, data.user, data.password))


@post("/logout", opt=needs(Standing.PERSON), status_code=200, sync_to_thread=True)
def logout(request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[dict[str, str]]:
    """End the session."""
    return Response({}, cookies=[doorkeeper.log_out(request)])


@post("/logout-everywhere", opt=needs(Standing.PERSON), status_code=200, sync_to_thread=True)
def logout_everywhere(request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[dict[str, str]]:
    """End every session of the user; API tokens stay."""
    return Response({}, cookies=[doorkeeper.log_out(request, everywhere=True)])


@get("/whoami", opt=needs(Standing.KNOWN), sync_to_thread=False)
def whoami(request: AnyRequest) -> WhoAmI:
    """Say who asks, and what they may do."""
    caller = caller_of(request)
    return WhoAmI(
        user=caller.account,
        role=caller.role,
        permissions=tuple(permission for permission in Permission if permission in caller.permissions),
        by=caller.by,
    )


@post("/password", opt=needs(Standing.PERSON), status_code=200, sync_to_thread=True)
def change_password(
    data: JSONBody[PasswordRequest], request: AnyRequest, doorkeeper: GivenDoorkeeper
) -> Response[dict[str, str]]:
    """Change one's own password; every other session ends."""
    return Response({}, cookies=doorkeeper.change_password(request, data.present, data.new))


# ---------------------------------------------------------------- users
@get("/users", opt=needs(Permission.USERS), sync_to_thread=True)
def users(doorkeeper: GivenDoorkeeper) -> tuple[UserView, ...]:
    """List users."""
    return tuple(_view(account) for account in doorkeeper.access.accounts.accounts())


@post("/users", opt=needs(Permission.USERS, repeatable=True), sync_to_thread=True)
def add_user(data: JSONBody[UserRequest], request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[UserView]:
    """Make a user."""
    act = doorkeeper.act(request, f"{data.name} as {data.role.value}")
    return _answer(doorkeeper.access.add_user(data.name, data.password, data.role, act), status=201)


@get("/users/{name:str}", opt=needs(Permission.USERS), sync_to_thread=True)
def user(name: FromPath[str], doorkeeper: GivenDoorkeeper) -> Response[UserView]:
    """Show one user."""
    return _answer(doorkeeper.access.user(name))


@patch("/users/{name:str}", opt=needs(Permission.USERS), sync_to_thread=True)
def change_user(
    name: FromPath[str], data: JSONBody[UserChange], request: AnyRequest, doorkeeper: GivenDoorkeeper
) -> Response[UserView]:
    """Change role or password, disable or enable; the user's sessions end."""
    change = Change(role=data.role, disabled=data.disabled, password=data.password)
    act = doorkeeper.act(request, f"{name}: {_say(data)}")
    return _answer(doorkeeper.access.change_user(name, _wanted(request), change, act))


@delete("/users/{name:str}", opt=needs(Permission.USERS), sync_to_thread=True)
def remove_user(name: FromPath[str], request: AnyRequest, doorkeeper: GivenDoorkeeper) -> None:
    """Remove a user with sessions and API tokens."""
    doorkeeper.access.remove_user(name, _wanted(request), doorkeeper.act(request, name))


# ---------------------------------------------------------------- API tokens
@get("/api-tokens", opt=needs(Standing.PERSON), sync_to_thread=True)
def api_tokens(
    request: AnyRequest, doorkeeper: GivenDoorkeeper, everybody: FromQuery[bool] = False
) -> tuple[ApiTokenView, ...]:
    """List one's own API tokens; with ``everybody`` and the permission `users` all of them."""
    return tuple(_token_view(token) for token in doorkeeper.access.tokens(caller_of(request), everybody=everybody))


@post("/api-tokens", opt=needs(Standing.PERSON, repeatable=True), sync_to_thread=True)
def add_api_token(
    data: JSONBody[ApiTokenRequest], request: AnyRequest, doorkeeper: GivenDoorkeeper
) -> ApiTokenCreated:
    """Make an API token; it is shown only here."""
    act = doorkeeper.act(request, data.name)
    made, text = doorkeeper.access.add_token(caller_of(request), data.name, data.scopes, data.life_days, act)
    return ApiTokenCreated(token=text, id=made.id, expires_at=made.expires_at)


@delete("/api-tokens/{token_id:str}", opt=needs(Standing.PERSON), sync_to_thread=True)
def revoke_api_token(token_id: FromPath[str], request: AnyRequest, doorkeeper: GivenDoorkeeper) -> None:
    """Revoke an API token: one's own, or with the permission `users` anybody's."""
    doorkeeper.access.revoke_token(caller_of(request), token_id, doorkeeper.act(request, token_id))


# ---------------------------------------------------------------- the audit log
@get("/audit", opt=needs(Permission.AUDIT), sync_to_thread=True)
def audit(
    *,
    doorkeeper: GivenDoorkeeper,
    after: Sequence_ = None,
    before: Sequence_ = None,
    who: FromQuery[str | None] = None,
    action: FromQuery[str | None] = None,
    limit: EntryCount = 100,
) -> AuditPage:
    """Read the audit log, newest first and back from ``before``, or in order and on from ``after``."""
    log = doorkeeper.access.audit
    if after is None:
        entries = log.newest(before=before, limit=limit, who=who, action=action)
    elif (before, who, action) == (None, None, None):
        entries = log.entries(after=after, limit=limit)
    else:
        raise ClientException("after goes with no other filter: a chain has no gaps")
    full = len(entries) == limit
    return AuditPage(
        entries=tuple(_entry_view(entry) for entry in entries), next=entries[-1].sequence if full else None
    )


# ---------------------------------------------------------------- views
def _answer(account: Account, *, status: int = 200) -> Response[UserView]:
    return Response(_view(account), status_code=status, headers={"ETag": f'"{account.revision}"'})


def _wanted(request: AnyRequest) -> int | None:
    """Return the revision that a change is meant for."""
    given = request.headers.get("if-match")
    if given is None or given.strip() == "*":
        return None
    match = _ETAG.fullmatch(given.strip())
    if match is None:
        raise ClientException(f'If-Match must be the ETag of the user, such as "3", not {given[:80]}')
    return int(match[1])


def _say(change: UserChange) -> str:
    said: dict[str, Any] = {"role": change.role and change.role.value, "disabled": change.disabled}
    said["password"] = "new" if change.password is not None else None
    return ", ".join(f"{name} {value}".lower() for name, value in said.items() if value is not None) or "nothing"


def _view(account: Account) -> UserView:
    return UserView(
        name=account.name,
        role=account.role,
        disabled=account.disabled,
        created_at=account.created_at,
        revision=account.revision,
    )


def _token_view(token: ApiToken) -> ApiTokenView:
    return ApiTokenView(
        id=token.id,
        user=token.account,
        name=token.name,
        scopes=tuple(scope for scope in Permission if scope in token.scopes),
        created_at=token.created_at,
        expires_at=token.expires_at,
        last_used_at=token.last_used_at,
        revoked_at=token.revoked_at,
    )


def _entry_view(entry: Entry) -> AuditEntry:
    act = entry.act
    return AuditEntry(
        sequence=entry.sequence,
        at=act.at,
        who=act.who,
        by=act.by,
        address=act.address,
        action=act.action,
        about=act.about,
        result=act.result,
        detail=act.detail,
        previous=entry.previous,
        digest=entry.digest,
    )


router = Router(
    API,
    route_handlers=[
        login,
        logout,
        logout_everywhere,
        whoami,
        change_password,
        users,
        add_user,
        user,
        change_user,
        remove_user,
        api_tokens,
        add_api_token,
        revoke_api_token,
        audit,
    ],
)
