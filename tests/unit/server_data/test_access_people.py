"""Users, sessions, passwords, API tokens and the audit log over real HTTP: what ends when, and what is kept."""

import re
import uuid
from collections.abc import Iterator
from http.cookies import SimpleCookie

import msgspec
import pytest
import sqlalchemy as sa
from access_world import GOOD, PROGRAM, add_token, add_user, log_in, log_of
from urllib3 import BaseHTTPResponse
from web_world import PASSWORD, Web, running_web

from fleet_server.access import ABSOLUTE, DAY, GRACE, HOUR, IDLE, RENEW_AFTER
from fleet_server.adapters.database import tables
from fleet_server.api_types import ApiTokenCreated, ApiTokenView, Problem, UserView, WhoAmI
from fleet_server.core.access import Permission, Role
from fleet_server.core.audit import Act
from fleet_server.ingest import StoreUnavailable
from fleet_server.web.auth import BROWSER_COOKIE, COOKIE

USERS, TOKENS = "/api/v1/users", "/api/v1/api-tokens"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("people")) as running:
        yield running


@pytest.fixture
def name(web: Web) -> str:
    """A fresh operator."""
    made = f"u{uuid.uuid4().hex[:8]}"
    add_user(web, made, Role.OPERATOR)
    return made


@pytest.fixture
def admin(web: Web) -> dict[str, str]:
    return log_in(web, "admin")


def send(
    web: Web, method: str, path: str, headers: dict[str, str], body: object = None, **more: str
) -> BaseHTTPResponse:
    return web.request(method, path, headers=headers | more, body=msgspec.json.encode({} if body is None else body))


def problem(answer: BaseHTTPResponse) -> Problem:
    return msgspec.json.decode(answer.data, type=Problem)


def who(web: Web, headers: dict[str, str]) -> int:
    return web.request("GET", "/api/v1/whoami", headers=headers).status


def cookies_of(answer: BaseHTTPResponse) -> dict[str, str]:
    jars = [SimpleCookie(header) for header in answer.headers.getlist("Set-Cookie")]
    return {key: morsel.value for jar in jars for key, morsel in jar.items()}


# ---------------------------------------------------------------- sessions
def test_a_session_ends_when_it_is_not_used(web: Web, name: str) -> None:
    used, idle = log_in(web, name), log_in(web, name)
    before = web.clock.ahead
    web.clock.ahead += RENEW_AFTER - 60_000
    assert who(web, used) == 200
    web.clock.ahead = before + IDLE + 1
    assert (who(web, used), who(web, idle)) == (200, 401)
    web.clock.ahead = before


def test_a_session_ends_a_week_after_the_log_in_however_much_it_is_used(web: Web, name: str) -> None:
    before, mine = web.clock.ahead, log_in(web, name)
    for _ in range(ABSOLUTE // (IDLE - HOUR)):
        web.clock.ahead += IDLE - HOUR
        answer = web.request("GET", "/api/v1/whoami", headers=mine)
        assert answer.status == 200
        if fresh := cookies_of(answer).get(COOKIE):
            mine = PROGRAM | {"Cookie": f"{COOKIE}={fresh}"}
    web.clock.ahead = before + ABSOLUTE
    assert who(web, mine) == 401
    web.clock.ahead = before


def test_a_session_gets_another_id_and_the_one_before_ends_soon(web: Web, name: str) -> None:
    before, mine = web.clock.ahead, log_in(web, name)
    web.clock.ahead += RENEW_AFTER
    answer = web.request("GET", "/api/v1/whoami", headers=mine)
    fresh = PROGRAM | {"Cookie": f"{COOKIE}={cookies_of(answer)[COOKIE]}"}
    cookie = answer.headers["Set-Cookie"]
    assert ("HttpOnly" in cookie, "samesite=strict" in cookie.lower(), "secure" in cookie.lower()) == (
        True,
        True,
        False,
    )
    again = web.request("GET", "/api/v1/whoami", headers=mine)
    assert (again.status, COOKIE in cookies_of(again)) == (200, False)
    web.clock.ahead += GRACE
    assert (who(web, mine), who(web, fresh)) == (401, 200)
    assert send(web, "POST", "/api/v1/logout", fresh).status == 200
    assert who(web, fresh) == 401
    web.clock.ahead = before


def test_logging_out_ends_the_id_before_as_well(web: Web, name: str) -> None:
    before, mine = web.clock.ahead, log_in(web, name)
    web.clock.ahead += RENEW_AFTER
    answer = send(web, "POST", "/api/v1/logout", mine)
    assert (answer.status, cookies_of(answer)[COOKIE]) == (200, "")
    assert who(web, mine) == 401
    web.clock.ahead = before


def test_logging_out_everywhere_ends_all_sessions_and_no_token(web: Web, name: str) -> None:
    one, other, token = log_in(web, name), log_in(web, name), add_token(web, name, Permission.LOOK)
    assert send(web, "POST", "/api/v1/logout-everywhere", one).status == 200
    assert (who(web, one), who(web, other), who(web, token)) == (401, 401, 200)


# ---------------------------------------------------------------- passwords
def test_ones_own_password_needs_the_present_one_and_ends_other_sessions(web: Web, name: str) -> None:
    mine, other = log_in(web, name), log_in(web, name)
    wrong = send(web, "POST", "/api/v1/password", mine, {"present": "no", "new": "another good password"})
    assert (wrong.status, problem(wrong).detail) == (400, "the present password is wrong")
    short = send(web, "POST", "/api/v1/password", mine, {"present": GOOD, "new": "short"})
    assert (short.status, "12" in problem(short).detail) == (400, True)
    done = send(web, "POST", "/api/v1/password", mine, {"present": GOOD, "new": "another good password"})
    fresh = PROGRAM | {"Cookie": f"{COOKIE}={cookies_of(done)[COOKIE]}"}
    assert (done.status, who(web, mine), who(web, other), who(web, fresh)) == (200, 401, 401, 200)
    assert who(web, log_in(web, name, "another good password")) == 200


def login(web: Web, name: str, password: str, **more: str) -> BaseHTTPResponse:
    return send(web, "POST", "/api/v1/login", PROGRAM, {"user": name, "password": password}, **more)


def test_a_stranger_cannot_lock_out_who_has_logged_in_from_this_browser(web: Web, name: str) -> None:
    web.clock.ahead += DAY
    mark = {"Cookie": f"{BROWSER_COOKIE}={cookies_of(login(web, name, GOOD))[BROWSER_COOKIE]}"}
    while login(web, name, "wrong password").status == 401:
        pass
    shut = login(web, name, GOOD)
    assert (shut.status, 0 < int(shut.headers["Retry-After"]) <= 601) == (429, True)
    assert login(web, name, GOOD, **mark).status == 200
    forged = {"Cookie": mark["Cookie"][:-1] + ("0" if mark["Cookie"][-1] != "0" else "1")}
    assert login(web, name, GOOD, **forged).status == 429
    web.clock.ahead += DAY


def test_a_disabled_user_gets_nowhere(web: Web, name: str, admin: dict[str, str]) -> None:
    mine, token = log_in(web, name), add_token(web, name, Permission.LOOK)
    assert send(web, "PATCH", f"{USERS}/{name}", admin, {"disabled": True}).status == 200
    assert (who(web, mine), who(web, token), login(web, name, GOOD).status) == (401, 401, 401)
    assert send(web, "PATCH", f"{USERS}/{name}", admin, {"disabled": False}).status == 200
    assert (who(web, mine), who(web, token), login(web, name, GOOD).status) == (401, 200, 200)


# ---------------------------------------------------------------- users
def test_a_user_is_made_shown_changed_and_removed(web: Web, admin: dict[str, str]) -> None:
    made = send(web, "POST", USERS, admin, {"name": "grace", "password": GOOD, "role": "viewer"})
    assert (made.status, made.headers["ETag"]) == (201, '"1"')
    changed = send(web, "PATCH", f"{USERS}/grace", admin, {"role": "releaser"}, **{"If-Match": '"1"'})
    view = msgspec.json.decode(changed.data, type=UserView)
    assert (changed.status, view.role, view.revision, changed.headers["ETag"]) == (200, Role.RELEASER, 2, '"2"')
    assert send(web, "DELETE", f"{USERS}/grace", admin, **{"If-Match": '"2"'}).status == 204
    assert web.request("GET", f"{USERS}/grace", headers=admin).status == 404
    assert GOOD.encode() not in web.request("GET", "/api/v1/audit?limit=1000", headers=admin).data


BAD = {
    "no such role": ("POST", USERS, {"name": "x", "password": GOOD, "role": "king"}, 400, "king"),
    "a bad name": ("POST", USERS, {"name": "A b", "password": GOOD, "role": "viewer"}, 400, "a-z"),
    "a short password": ("POST", USERS, {"name": "x", "password": "short", "role": "viewer"}, 400, "12"),
    "a name that is taken": ("POST", USERS, {"name": "admin", "password": GOOD, "role": "viewer"}, 409, "admin"),
    "a field that is none": ("PATCH", f"{USERS}/admin", {"rôle": "viewer"}, 400, ""),
    "no change": ("PATCH", f"{USERS}/admin", {}, 400, "nothing"),
    "an unknown user": ("PATCH", f"{USERS}/nobody", {"role": "viewer"}, 404, "nobody"),
    "the last admin made less": ("PATCH", f"{USERS}/admin", {"role": "viewer"}, 409, "last admin"),
    "the last admin disabled": ("PATCH", f"{USERS}/admin", {"disabled": True}, 409, "last admin"),
    "the last admin removed": ("DELETE", f"{USERS}/admin", {}, 409, "last admin"),
    "a scope that is none": ("POST", TOKENS, {"name": "x", "scopes": ["all"]}, 400, ""),
    "no scope": ("POST", TOKENS, {"name": "x", "scopes": []}, 400, "scope"),
    "a life of ten years": ("POST", TOKENS, {"name": "x", "scopes": ["look"], "life_days": 3650}, 400, "366"),
    "a token that is none": ("DELETE", f"{TOKENS}/0123", {}, 404, "0123"),
    "a token's id that is none": ("DELETE", f"{TOKENS}/%27--", {}, 404, ""),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_is_refused_in_words(
    web: Web, admin: dict[str, str], case: tuple[str, str, object, int, str]
) -> None:
    method, path, body, status, word = case
    answer = send(web, method, path, admin, body)
    assert (answer.status, word in problem(answer).detail) == (status, True), answer.data
    assert who(web, admin) == 200


def test_a_change_to_what_somebody_else_changed_meanwhile_is_refused(
    web: Web, name: str, admin: dict[str, str]
) -> None:
    stale = {"If-Match": web.request("GET", f"{USERS}/{name}", headers=admin).headers["ETag"]}
    assert send(web, "PATCH", f"{USERS}/{name}", admin, {"role": "viewer"}, **stale).status == 200
    for method, body in (("PATCH", {"role": "admin"}), ("DELETE", {})):
        answer = send(web, method, f"{USERS}/{name}", admin, body, **stale)
        assert (answer.status, "revision 2" in problem(answer).detail) == (412, True)
    assert send(web, "PATCH", f"{USERS}/{name}", admin, {"role": "admin"}, **{"If-Match": "2"}).status == 400


# ---------------------------------------------------------------- API tokens
def test_a_token_is_shown_once_stored_as_a_hash_and_told_when_it_was_used(web: Web, name: str) -> None:
    mine = log_in(web, name)
    made = msgspec.json.decode(
        send(web, "POST", TOKENS, mine, {"name": "ci", "scopes": ["look", "order"]}).data, type=ApiTokenCreated
    )
    bearer = {"Authorization": f"Bearer {made.token}"}
    me = msgspec.json.decode(web.request("GET", "/api/v1/whoami", headers=bearer).data, type=WhoAmI)
    assert (me.user, me.by, me.permissions) == (name, f"token:{made.id}", (Permission.LOOK, Permission.ORDER))
    answer = web.request("GET", TOKENS, headers=mine)
    (view,) = msgspec.json.decode(answer.data, type=tuple[ApiTokenView, ...])
    secret = made.token.rpartition("_")[2]
    assert (view.id, view.last_used_at is not None, secret in answer.data.decode()) == (made.id, True, False)
    with web.engine.connect() as connection:
        stored = [str(row) for row in connection.execute(sa.select(tables.api_token))]
    assert secret not in "".join(stored)


def test_a_token_ends_by_time_and_by_being_revoked(web: Web, name: str) -> None:
    before, mine = web.clock.ahead, log_in(web, name)
    token = add_token(web, name, Permission.LOOK, days=2)
    (view,) = msgspec.json.decode(web.request("GET", TOKENS, headers=mine).data, type=tuple[ApiTokenView, ...])
    web.clock.ahead += 2 * DAY
    assert who(web, token) == 401
    web.clock.ahead = before
    assert who(web, token) == 200
    assert send(web, "DELETE", f"{TOKENS}/{view.id}", mine).status == 204
    assert who(web, token) == 401


def test_others_tokens_are_for_who_manages_users(web: Web, name: str, admin: dict[str, str]) -> None:
    add_token(web, name, Permission.LOOK)
    add_user(web, f"{name}.2", Role.OPERATOR)
    other = log_in(web, f"{name}.2")
    seen = msgspec.json.decode(web.request("GET", f"{TOKENS}?everybody=true", headers=admin).data)
    (token,) = [token["id"] for token in seen if token["user"] == name]
    assert web.request("GET", f"{TOKENS}?everybody=true", headers=other).data == b"[]"
    assert send(web, "DELETE", f"{TOKENS}/{token}", other).status == 404
    assert send(web, "DELETE", f"{TOKENS}/{token}", admin).status == 204


WRONG_TOKENS = ("", "ew_", "ew_x_y", "ew_000000000000_" + "0" * 64, "Basic YTpi", "ew_" + "9" * 5000, "e\u00e9w_1_2")


@pytest.mark.parametrize("text", WRONG_TOKENS)
def test_a_wrong_token_is_not_made_good_by_a_cookie(web: Web, admin: dict[str, str], text: str) -> None:
    given = text if text.startswith("Basic") else f"Bearer {text}"
    answer = web.request("GET", "/api/v1/whoami", headers=admin | {"Authorization": given.encode().decode("latin1")})
    assert (answer.status, "Bearer" in answer.headers["WWW-Authenticate"]) == (401, True)


def test_a_program_with_a_token_needs_no_proof_that_it_is_no_browser(web: Web) -> None:
    token = add_token(web, "admin", Permission.USERS)
    body = {"name": f"made{uuid.uuid4().hex[:6]}", "password": GOOD, "role": "viewer"}
    assert send(web, "POST", USERS, token, body).status == 201
    evil = token | {"Origin": "https://evil.example"}
    assert send(web, "POST", USERS, evil, body).status == 403


# ---------------------------------------------------------------- repeats
def test_a_repeat_with_the_same_key_gets_the_same_answer_and_makes_nothing_new(web: Web, name: str) -> None:
    mine, key = log_in(web, name), {"Idempotency-Key": str(uuid.uuid4())}
    body = {"name": "ci", "scopes": ["look"]}
    first, again = (send(web, "POST", TOKENS, mine, body, **key) for _ in range(2))
    assert (first.status, again.status, first.data == again.data) == (201, 201, True)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert len(msgspec.json.decode(web.request("GET", TOKENS, headers=mine).data)) == 1
    with web.engine.connect() as connection:
        sealed = b"".join(connection.scalars(sa.select(tables.kept_answer.c.sealed)))
    assert first.data[10:40] not in sealed


def test_a_key_is_for_one_request_of_one_user(web: Web, name: str, admin: dict[str, str]) -> None:
    mine, key = log_in(web, name), {"Idempotency-Key": str(uuid.uuid4())}
    assert send(web, "POST", TOKENS, mine, {"name": "a", "scopes": ["look"]}, **key).status == 201
    assert send(web, "POST", TOKENS, mine, {"name": "b", "scopes": ["look"]}, **key).status == 422
    other = send(web, "POST", TOKENS, admin, {"name": "a", "scopes": ["look"]}, **key)
    assert (other.status, "Idempotency-Replayed" in other.headers) == (201, False)


def test_a_key_whose_request_failed_may_be_used_again(web: Web, admin: dict[str, str]) -> None:
    key, made = {"Idempotency-Key": str(uuid.uuid4())}, f"v{uuid.uuid4().hex[:8]}"
    assert send(web, "POST", USERS, admin, {"name": made, "password": "x", "role": "viewer"}, **key).status == 400
    assert send(web, "POST", USERS, admin, {"name": made, "password": GOOD, "role": "viewer"}, **key).status == 201


def test_a_request_that_is_under_way_is_not_done_twice(web: Web, name: str) -> None:
    mine, key = log_in(web, name), str(uuid.uuid4())
    body = {"name": "a", "scopes": ["look"]}
    assert send(web, "POST", TOKENS, mine, body, **{"Idempotency-Key": key}).status == 201
    with web.engine.begin() as connection:  # as if the server had ended before it could keep the answer
        connection.execute(sa.update(tables.kept_answer).values(sealed=None))
    answer = send(web, "POST", TOKENS, mine, body, **{"Idempotency-Key": key})
    assert (answer.status, "look" in problem(answer).detail) == (409, True)


@pytest.mark.parametrize("key", ["short", "x" * 129])
def test_a_key_that_could_be_guessed_or_is_endless_is_refused(web: Web, admin: dict[str, str], key: str) -> None:
    answer = send(web, "POST", TOKENS, admin, {"name": "a", "scopes": ["look"]}, **{"Idempotency-Key": key})
    assert (answer.status, "Idempotency-Key" in problem(answer).detail) == (400, True)


# ---------------------------------------------------------------- the audit log
def test_a_change_is_logged_with_who_what_where_and_result(web: Web, name: str, admin: dict[str, str]) -> None:
    send(web, "PATCH", f"{USERS}/{name}", admin, {"role": "viewer"})
    newest = log_of(web, admin)[0]
    said = (newest.who, newest.by, newest.address, newest.action, newest.about, newest.result.value)
    assert said == ("admin", "session", "127.0.0.1", "change-user", f"{name}: role viewer", "done")


def test_what_was_refused_or_failed_is_logged_with_why(web: Web, name: str, admin: dict[str, str]) -> None:
    web.clock.ahead += 20 * 60_000
    mine = log_in(web, name)
    web.request("GET", USERS, headers=mine)
    login(web, name, "wrong password")
    send(web, "POST", "/api/v1/deployments", mine, {"model": "nothing", "version": 1, "all": True})
    failed, wrong, refused = log_of(web, admin)[:3]
    assert (refused.who, refused.action, refused.result.value) == (name, "users", "refused")
    assert "users" in refused.detail
    assert (wrong.who, wrong.action, wrong.result.value, GOOD in wrong.detail) == (name, "login", "refused", False)
    assert (failed.action, failed.about, failed.result.value) == (
        "deploy",
        "nothing version 1, all devices",
        "failed",
    )


def test_pages_follow_each_other_without_gap_or_repeat(web: Web, admin: dict[str, str]) -> None:
    whole = [entry.sequence for entry in log_of(web, admin)]
    seen: list[int] = []
    query = "limit=7"
    while query:
        page = msgspec.json.decode(web.request("GET", f"/api/v1/audit?{query}", headers=admin).data)
        seen += [entry["sequence"] for entry in page["entries"]]
        query = f"limit=7&before={page['next']}" if page["next"] is not None else ""
    assert seen == whole
    assert web.request("GET", "/api/v1/audit?after=0&who=admin", headers=admin).status == 400


def test_a_change_that_cannot_be_logged_is_not_reported_as_done(
    web: Web, admin: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_act: Act) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(web.access, "note", fail)
    answer = send(web, "POST", "/api/v1/trust/online-keys", admin)
    assert (answer.status, "full" in problem(answer).detail) == (503, True)


def test_a_mistyped_user_name_that_holds_a_password_is_cut_and_cannot_steer(web: Web, admin: dict[str, str]) -> None:
    web.clock.ahead += 20 * 60_000
    login(web, "x\x1b[31m" + "y" * 100, PASSWORD)
    assert re.fullmatch(r"x\ufffd\[31my{58}", log_of(web, admin)[0].who)
