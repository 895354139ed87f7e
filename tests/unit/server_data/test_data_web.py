"""The console's port, spoken to over real HTTP: who gets in, what bad requests come to, what pages escape."""

import re
from collections.abc import Iterator

import msgspec
import pytest
from data_world import birth, bundle, enrol, event, report
from hypothesis import given, settings
from hypothesis import strategies as st
from litestar.routes import HTTPRoute
from web_world import PASSWORD, Web, running_web

from fleet_server.adapters.database.registry import DatabaseReleases
from fleet_server.api_types import DeviceView, EventView, Overview, Problem
from fleet_server.ports import Batch
from protocol.messages import RunningModel
from protocol.states import DeploymentState, PresenceState

HOSTILE = "<script>alert(1)</script>"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("web")) as running:
        enrol(running.engine, "cam-1", "cam-2", labels={"site": "oslo"})
        DatabaseReleases(running.engine).add_bundles([bundle(1, sha256="a" * 64), bundle(2, title=HOSTILE)])
        seed(running)
        yield running


def seed(running: Web) -> None:
    now = running.clock()
    model = RunningModel(model="digits", state=DeploymentState.COMMITTED, version=1, digest="a" * 64)
    born = birth(at=now - 1000, models=(model,), agent=HOSTILE, facts={HOSTILE: HOSTILE})
    running.telemetry.store(
        Batch(
            states=[("cam-1", born)],
            reports=[
                ("cam-1", report(1, start=now - 30_000, span=2000, truth=((0, 0, 9), (1, 0, 1)))),
                ("cam-1", report(2, start=now - 28_000, span=2000, digest="a" * 16, turned_away=(9, 4, 3))),
            ],
            events=[("cam-1", event(1, at=now, detail=HOSTILE)), ("cam-1", event(2, model=HOSTILE[:60], at=now))],
            received_at=now,
        )
    )


@pytest.fixture(scope="module")
def me(web: Web) -> dict[str, str]:
    return web.login()


def problem(answer: object) -> Problem:
    assert answer.headers["Content-Type"] == "application/problem+json"  # type: ignore[attr-defined]  # urllib3's
    return msgspec.json.decode(answer.data, type=Problem)  # type: ignore[attr-defined]  # urllib3's


# ---------------------------------------------------------------- figures, while the reports are recent
def test_a_device_page_says_how_many_requests_were_turned_away_and_why(web: Web, me: dict[str, str]) -> None:
    page = web.request("GET", "/devices/cam-1", headers=me).data.decode()
    assert "9 turned away, 4 of them late, 3 of them in distress" in page
    data = web.request("GET", "/api/v1/devices/cam-1", headers=me).data
    model = next(one for one in msgspec.json.decode(data, type=DeviceView).models if one.model == "digits")
    assert (model.dropped, model.late, model.shed) == (9, 4, 3)


# ---------------------------------------------------------------- who gets in
def routes_of(web: Web) -> list[tuple[str, str]]:
    return [
        (method, re.sub(r"\{[^}]*\}", "x", route.path))
        for route in web.app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if method != "OPTIONS"
    ]


def test_no_page_or_resource_fails(web: Web, me: dict[str, str]) -> None:
    answers = {p: web.request("GET", p, headers=me).status for m, p in routes_of(web) if m == "GET"}
    assert {path: status for path, status in answers.items() if status >= 500} == {}
    assert answers["/login"] == 200


def test_a_person_who_is_not_logged_in_is_shown_the_way(web: Web) -> None:
    answer = web.request("GET", "/devices/cam-1", headers={"Accept": "text/html"})
    assert (answer.status, answer.headers["Location"]) == (303, "/login")


def test_every_answer_carries_the_security_headers(web: Web, me: dict[str, str]) -> None:
    for path in ("/health", "/login", "/", "/api/v1/overview", "/nowhere", "/static/console.css", "/static/none"):
        headers = web.request("GET", path, headers=me).headers
        assert "script-src 'self'" in headers["Content-Security-Policy"], path
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"], path
        assert headers["X-Content-Type-Options"] == "nosniff", path


def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_sites(web: Web) -> None:
    body = msgspec.json.encode({"user": "admin", "password": PASSWORD})
    headers = JSON | {"X-Requested-With": "edgewarden"}
    cookie = web.request("POST", "/api/v1/login", headers=headers, body=body).headers["Set-Cookie"]
    assert ("HttpOnly" in cookie, "SameSite=strict" in cookie) == (True, True)
    web.clock.ahead += 120_000


def test_a_session_ends_by_logging_out_and_by_time(web: Web) -> None:
    web.clock.ahead += 120_000
    mine = web.login()
    assert web.request("POST", "/api/v1/logout", headers=mine, body=b"{}").status == 200
    assert web.request("GET", "/api/v1/overview", headers=mine).status == 401
    mine = web.login()
    before = web.clock.ahead
    web.clock.ahead += 13 * 3600 * 1000
    assert web.request("GET", "/api/v1/overview", headers=mine).status == 401
    web.clock.ahead = before


def test_guessing_passwords_is_slowed_down_even_for_the_right_one(web: Web) -> None:
    web.clock.ahead += 120_000
    headers = JSON | {"X-Requested-With": "edgewarden"}
    bodies = [msgspec.json.encode({"user": "admin", "password": p}) for p in [*"abcde", PASSWORD]]
    answers = [web.request("POST", "/api/v1/login", headers=headers, body=body) for body in bodies]
    assert [a.status for a in answers] == [401, 401, 401, 401, 401, 429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 61
    web.clock.ahead += 61_000
    assert web.request("POST", "/api/v1/login", headers=headers, body=bodies[-1]).status == 200
    web.clock.ahead += 120_000


CROSS_SITE = {
    "a form of another site": {"Content-Type": "application/x-www-form-urlencoded"},
    "a text body": {"Content-Type": "text/plain", "X-Requested-With": "edgewarden"},
    "JSON without our header": JSON,
    "another site's origin": JSON | {"X-Requested-With": "edgewarden", "Origin": "https://evil.example"},
}


@pytest.mark.parametrize("headers", CROSS_SITE.values(), ids=CROSS_SITE.keys())
def test_a_change_that_another_site_could_send_is_refused(
    web: Web, me: dict[str, str], headers: dict[str, str]
) -> None:
    answer = web.request("POST", "/api/v1/tokens", headers={"Cookie": me["Cookie"]} | headers, body=b"{}")
    assert answer.status == 403


def test_a_form_needs_the_sessions_token(web: Web, me: dict[str, str]) -> None:
    headers = {"Cookie": me["Cookie"], "Content-Type": "application/x-www-form-urlencoded"}
    assert web.request("POST", "/logout", headers=headers, body=b"csrf=wrong").status == 403
    assert web.request("GET", "/api/v1/overview", headers=me).status == 200


def test_a_wrong_password_in_the_form_shows_the_form_again(web: Web) -> None:
    web.clock.ahead += 120_000
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = web.request("POST", "/login", headers=headers, body=b"user=admin&password=no")
    assert (answer.status, b'role="alert"' in answer.data) == (401, True)
    web.clock.ahead += 120_000


# ---------------------------------------------------------------- bad requests
BAD = {
    "bad JSON": ("POST", "/api/v1/deployments", b"{", 400, ""),
    "not UTF-8": ("POST", "/api/v1/deployments", b'{"model": "\xff\xfe", "version": 1}', 400, ""),
    "an empty body": ("POST", "/api/v1/deployments", b"", 400, ""),
    "a list": ("POST", "/api/v1/deployments", b"[]", 400, ""),
    "a missing field": ("POST", "/api/v1/deployments", b"{}", 400, "model"),
    "a wrong type": ("POST", "/api/v1/deployments", b'{"model": "m", "version": "x"}', 400, "version"),
    "a wrong type deep inside": ("POST", "/api/v1/tokens", b'{"labels": {"a": 1}}', 400, "labels"),
    "a number without end": (
        "POST", "/api/v1/deployments", b'{"model": "digits", "all": true, "version": ' + b"9" * 400 + b"}", 409, "",
    ),
    "brackets without end": ("POST", "/api/v1/tokens", b"[" * 100_000, 400, ""),
    "ten megabytes": ("POST", "/api/v1/tokens", b" " * 10_000_001, 413, ""),
    "an unknown device": ("GET", "/api/v1/devices/nobody", None, 404, "nobody"),
    "the series of an unknown device": ("GET", "/api/v1/devices/nobody/series?model=m", None, 404, "nobody"),
    "a series without model": ("GET", "/api/v1/devices/cam-1/series", None, 400, "model"),
    "a span that is no number": ("GET", "/api/v1/devices/cam-1/series?model=m&span=x", None, 400, "span"),
    "a span of a year": ("GET", "/api/v1/devices/cam-1/series?model=m&span=99999999", None, 400, "span"),
    "a negative limit": ("GET", "/api/v1/events?limit=-1", None, 400, "limit"),
    "a row beyond 64 bits": ("GET", "/api/v1/events?after=99999999999999999999999", None, 400, "after"),
    "a NUL in a query": ("GET", "/api/v1/events?device=%00", None, 400, "NUL"),
    "a NUL in a path": ("GET", "/api/v1/devices/a%00b", None, 400, "NUL"),
    "a NUL in a body": ("POST", "/api/v1/deployments", b'{"model": "a\\u0000b", "version": 1}', 400, "NUL"),
    "an unknown path": ("GET", "/api/v1/nothing", None, 404, ""),
    "a wrong method": ("DELETE", "/api/v1/devices", None, 405, ""),
    "an order to nobody": ("POST", "/api/v1/deployments", b'{"model": "digits", "version": 1}', 409, ""),
    "a token before the roots": ("POST", "/api/v1/tokens", b"{}", 409, "keys init"),
    "roots that are none": (
        "POST", "/api/v1/trust/roots",
        b'{"image_root": "e30=", "image_targets": "e30=", "director_root": "e30="}', 409, "",
    ),
    "roots that are not base64": (
        "POST", "/api/v1/trust/roots",
        b'{"image_root": "%%%", "image_targets": "e30=", "director_root": "e30="}', 400, "image_root",
    ),
    "metadata outside of the folder": ("GET", "/api/v1/trust/image/metadata/..%2F..%2Fadmin-password", None, 404, ""),
    "a static file outside of the folder": ("GET", "/static/..%2Fauth.py", None, 404, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_a_problem_that_names_what_is_wrong(
    web: Web, me: dict[str, str], case: tuple[str, str, bytes | None, int, str]
) -> None:
    method, path, body, status, names = case
    answer = web.request(method, path, headers=me, body=body)
    assert answer.status == status, answer.data
    if status != 200 and path.startswith("/api"):
        assert names in problem(answer).detail


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["/api/v1/tokens", "/api/v1/deployments", "/api/v1/rollbacks", "/api/v1/models/publish"]),
    st.binary(max_size=200),
)
def test_no_body_makes_the_server_fail(web: Web, me: dict[str, str], path: str, body: bytes) -> None:
    assert web.request("POST", path, headers=me, body=body).status < 500


def test_an_upload_whose_bytes_are_not_the_digest_is_refused(web: Web, me: dict[str, str]) -> None:
    headers = me | {"Content-Type": "application/octet-stream"}
    answer = web.request("POST", "/api/v1/models/bundles/" + "0" * 64, headers=headers, body=b"x" * 1_000_000)
    assert answer.status == 409


# ---------------------------------------------------------------- what it says
def test_the_fleet_is_told_with_figures(web: Web, me: dict[str, str]) -> None:
    overview = msgspec.json.decode(web.request("GET", "/api/v1/overview", headers=me).data, type=Overview)
    assert (overview.devices["new"], overview.reports, overview.trust_ready) == (1, 2, False)
    data = web.request("GET", "/api/v1/devices", headers=me).data
    first, second = msgspec.json.decode(data, type=tuple[DeviceView, ...])
    assert (first.id, second.presence, first.labels) == ("cam-1", PresenceState.NEW, {"site": "oslo"})
    models = {model.model: model for model in first.models}
    assert models["digits"].running_version == 1


def test_events_come_newest_first_and_after_a_row(web: Web, me: dict[str, str]) -> None:
    data = web.request("GET", "/api/v1/events", headers=me).data
    found = msgspec.json.decode(data, type=tuple[EventView, ...])
    assert [e.row for e in found] == [2, 1]
    data = web.request("GET", "/api/v1/events?after=1&device=cam-1", headers=me).data
    assert [e.row for e in msgspec.json.decode(data, type=tuple[EventView, ...])] == [2]


def test_the_schema_lists_the_api(web: Web, me: dict[str, str]) -> None:
    schema = msgspec.json.decode(web.request("GET", "/api/v1/schema/openapi.json", headers=me).data)
    assert {"/api/v1/devices", "/api/v1/deployments", "/api/v1/tokens"} <= set(schema["paths"])


@pytest.mark.parametrize("path", ["/", "/devices/cam-1", "/devices/cam-2", "/models"])
@pytest.mark.parametrize("fragment", ["", "?fragment=1"])
def test_pages_escape_whatever_devices_say(web: Web, me: dict[str, str], path: str, fragment: str) -> None:
    answer = web.request("GET", path + fragment, headers=me)
    page = answer.data.decode()
    assert (answer.status, HOSTILE in page, " style=" in page, "<script>" in page) == (200, False, False, False)
    if path != "/devices/cam-2":
        assert "&lt;script&gt;" in page


def test_a_page_of_an_unknown_device_is_an_error_page(web: Web, me: dict[str, str]) -> None:
    answer = web.request("GET", "/devices/nobody", headers=me | {"Accept": "text/html"})
    assert (answer.status, b"there is no device" in answer.data) == (404, True)
