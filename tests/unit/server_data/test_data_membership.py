"""Membership over the real database and both web ports: what a key opens when, and the operator's orders."""

import hashlib
from collections.abc import Iterator

import msgspec
import pytest
from typer.testing import CliRunner, Result
from web_world import Key, Web, running_web

from fleet_server.api_types import DeviceView, Reopened, Revoked, TokenCreated, TokenRequest
from fleet_server.cli.__main__ import app as cli
from fleet_server.cli.session import Session
from protocol.device_api import (
    DIRECTOR_METADATA_PATH,
    ENROL_PATH,
    RENEW_PATH,
    DeviceApiError,
    EnrolRequest,
    RenewRequest,
    RenewResponse,
    Standing,
    parse_token,
)

WANT = DIRECTOR_METADATA_PATH + "/timestamp.json"
DAY = 24 * 3600 * 1000


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("membership")
    with running_web(folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEWARDEN_PASSWORD", "correct horse")
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        assert run(running, "keys", "init", "--dir", str(folder / "keys"), "--no-passphrase").exit_code == 0
        yield running


def run(web: Web, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--server", web.url])


def enrol(web: Web, device: str, key: Key) -> int:
    session = Session(web.url)
    token = parse_token(session.post("/tokens", TokenRequest(), TokenCreated).token)
    session.close()
    body = EnrolRequest(token_id=token.id, secret=token.secret, device=device, csr=key.csr(device))
    headers = {"Content-Type": "application/json"}
    return web.device_request("POST", ENROL_PATH, headers=headers, body=msgspec.json.encode(body)).status


@pytest.fixture
def device(web: Web, request: pytest.FixtureRequest) -> tuple[str, Key]:
    """A device of this test's own."""
    name, key = "d" + hashlib.sha256(request.node.name.encode()).hexdigest()[:10], Key()
    assert enrol(web, name, key) == 200
    return name, key


def get(web: Web, path: str, name: str, key: Key) -> tuple[int, bytes]:
    answer = web.device_request("GET", path, headers=key.bearer(name, at=web.clock.ahead // 1000))
    return answer.status, answer.data


def renew(web: Web, name: str, key: Key, fresh: Key) -> tuple[int, bytes]:
    headers = key.bearer(name, at=web.clock.ahead // 1000) | {"Content-Type": "application/json"}
    body = msgspec.json.encode(RenewRequest(csr=fresh.csr(name)))
    answer = web.device_request("POST", RENEW_PATH, headers=headers, body=body)
    return answer.status, answer.data


def test_both_keys_open_until_the_new_one_is_used_and_then_only_that_one(web: Web, device: tuple[str, Key]) -> None:
    name, old = device
    fresh = Key()
    status, body = renew(web, name, old, fresh)
    assert status == 200
    assert "BEGIN CERTIFICATE" in msgspec.json.decode(body, type=RenewResponse).certificate
    assert get(web, WANT, name, old)[0] == 200
    assert get(web, WANT, name, fresh)[0] == 200
    status, body = get(web, WANT, name, old)
    assert status == 401
    said = msgspec.json.decode(body, type=DeviceApiError)
    assert "not signed with the key of the certificate" in said.error
    assert "edgewarden devices reopen" in said.remedy
    assert len(web.parts.membership.retired(web.clock())) == 1


def test_a_standing_names_the_cas_in_force(web: Web, device: tuple[str, Key]) -> None:
    status, body = get(web, RENEW_PATH, *device)
    standing = msgspec.json.decode(body, type=Standing)
    assert (status, standing.ca.encode()) == (200, web.parts.authority.ca_certificate())
    assert standing.expires > web.clock() + 300 * DAY


def test_an_expired_certificate_opens_its_renewal_and_nothing_else(
    web: Web, device: tuple[str, Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, key = device
    # The device has the clock of the server; the people's sessions have long ended.
    monkeypatch.setattr(web.clock, "ahead", 500 * DAY)
    monkeypatch.setattr("jwt.api_jwt.PyJWT._validate_iat", lambda *_: None)
    monkeypatch.setattr("jwt.api_jwt.PyJWT._validate_exp", lambda *_: None)
    status, body = get(web, WANT, name, key)
    assert (status, b"opens nothing but its renewal" in body) == (401, True)
    fresh = Key()
    assert get(web, RENEW_PATH, name, key)[0] == 200
    assert renew(web, name, key, fresh)[0] == 200
    assert get(web, WANT, name, fresh)[0] == 200
    assert get(web, RENEW_PATH, name, key)[0] == 401


def test_nobody_renews_without_the_key(web: Web, device: tuple[str, Key]) -> None:
    name, _ = device
    assert renew(web, name, Key(), Key())[0] == 401
    assert web.device_request("POST", RENEW_PATH, body=b"{}").status == 401
    known = web.parts.registry.device(name)
    assert known is not None
    assert known.next_certificate == ""


def test_a_renewal_for_the_key_in_force_is_a_bad_request(web: Web, device: tuple[str, Key]) -> None:
    name, key = device
    assert renew(web, name, key, key)[0] == 400


def test_an_operator_revokes_and_everything_is_refused_from_then_on(web: Web, device: tuple[str, Key]) -> None:
    name, key = device
    result = run(web, "devices", "revoke", name, "--yes")
    assert (result.exit_code, f"{name} is revoked and cut off" in result.output) == (0, True)
    assert web.uplink.expelled[-1] == name
    for path in (WANT, RENEW_PATH):
        status, body = get(web, path, name, key)
        assert (status, b"was revoked" in body) == (403, True)
    assert renew(web, name, key, Key())[0] == 403
    session = Session(web.url)
    assert session.get(f"/devices/{name}", DeviceView).presence.value == "revoked"
    session.close()
    again = run(web, "devices", "revoke", name, "--yes", "--json")
    assert msgspec.json.decode(again.stdout, type=Revoked) == Revoked(device=name, cut=True)


def test_revoking_asks_first(web: Web, device: tuple[str, Key]) -> None:
    name, key = device
    result = CliRunner().invoke(cli, ["devices", "revoke", name, "--server", web.url], input="n\n")
    assert result.exit_code == 1
    assert get(web, WANT, name, key)[0] == 200


def test_an_operator_opens_an_id_and_it_enrols_once(web: Web, device: tuple[str, Key]) -> None:
    name, old = device
    assert enrol(web, name, Key()) == 409
    opened = run(web, "devices", "reopen", name, "--for", "30m", "--json")
    until = msgspec.json.decode(opened.stdout, type=Reopened).open_until
    assert 0 < until - web.clock() <= 30 * 60_000
    session = Session(web.url)
    assert session.get(f"/devices/{name}", DeviceView).open_until == until
    session.close()
    fresh = Key()
    assert enrol(web, name, fresh) == 200
    assert enrol(web, name, Key()) == 409
    assert (get(web, WANT, name, fresh)[0], get(web, WANT, name, old)[0]) == (200, 401)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["revoke", "nobody", "--yes"], 1, "there is no device"),
        (["reopen", "nobody"], 1, "needs no opening"),
        (["reopen", "nobody", "--for", "soon"], 2, "is not a time"),
        (["reopen", "nobody", "--for", "99d"], 1, "is not in 1"),
    ],
)
def test_an_order_that_cannot_be_carried_out_says_why(web: Web, arguments: list[str], code: int, says: str) -> None:
    result = run(web, "devices", *arguments)
    assert (result.exit_code, says in result.output) == (code, True), result.output
