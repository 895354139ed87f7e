"""Who may do what, as a table; what names and passwords must be; how often one may try."""

import pytest

from fleet_server.core import access
from fleet_server.core.access import Caller, Permission, Role, Standing
from fleet_server.core.attempts import ALLOWANCES, MAX_KEYS, Attempts, keys_of

MINUTE = 60_000
EXPECTED = {
    Role.VIEWER: {"look"},
    Role.OPERATOR: {"look", "order", "command", "devices"},
    Role.RELEASER: {"look", "publish", "trust"},
    Role.ADMIN: {"look", "order", "command", "devices", "publish", "trust", "audit", "users"},
}


@pytest.mark.parametrize("role", Role)
def test_a_role_has_the_permissions_of_its_column(role: Role) -> None:
    assert {permission.value for permission in access.permissions_of(role)} == EXPECTED[role]


def person(role: Role) -> Caller:
    return Caller(account="ada", role=role, permissions=access.permissions_of(role), session_sha256="5" * 64)


def token(role: Role, *scopes: Permission) -> Caller:
    return Caller(account="ada", role=role, permissions=access.permissions_of_token(role, scopes), by="token:1")


P, S = Permission, Standing
CASES = {
    "nobody looks at what is open": (None, S.ANYBODY, True),
    "nobody is not known": (None, S.KNOWN, False),
    "nobody has no permission": (None, P.LOOK, False),
    "a viewer looks": (person(Role.VIEWER), P.LOOK, True),
    "a viewer does not order": (person(Role.VIEWER), P.ORDER, False),
    "an operator does not publish": (person(Role.OPERATOR), P.PUBLISH, False),
    "a releaser does not order": (person(Role.RELEASER), P.ORDER, False),
    "a token is known": (token(Role.VIEWER, P.LOOK), S.KNOWN, True),
    "a token is no person, whatever it may": (token(Role.ADMIN, *P), S.PERSON, False),
    "a token has its scopes": (token(Role.ADMIN, P.LOOK), P.LOOK, True),
    "a token has nothing beside its scopes": (token(Role.ADMIN, P.LOOK), P.USERS, False),
    "a token has never more than its user has by now": (token(Role.VIEWER, P.LOOK, P.ORDER), P.ORDER, False),
}


@pytest.mark.parametrize(("caller", "rule", "expected"), CASES.values(), ids=CASES.keys())
def test_a_rule_lets_through(caller: Caller | None, rule: access.Rule, expected: bool) -> None:
    assert access.may(caller, rule) is expected


PASSWORDS = {
    "eleven characters": ("abcdefghijk", True),
    "twelve": ("abcdefghijkl", False),
    "a sentence": ("correct horse battery", False),
    "1024": ("ab" * 512, False),
    "1025": ("ab" * 512 + "c", True),
    "the user name": ("Grace.Hopper1 ", True),
    "one character": ("aaaaaaaaaaaa", True),
}


@pytest.mark.parametrize(("password", "wrong"), PASSWORDS.values(), ids=PASSWORDS.keys())
def test_a_password_is_long_and_not_the_name(password: str, wrong: bool) -> None:
    assert (access.fault_of_password(password, "grace.hopper1") is not None) is wrong


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "a" * 64, "ä", "a\n", ".", "server\x00"])
def test_a_name_that_could_mislead_is_refused(name: str) -> None:
    assert access.fault_of_name(name) is not None


# ---------------------------------------------------------------- tries
def tried(attempts: Attempts, times: int, *, address: str, name: str = "ada", browser: str | None = None) -> None:
    for _ in range(times):
        attempts.count(keys_of(address, name, browser), 0)


def test_an_address_waits_after_its_tries_of_a_minute() -> None:
    attempts = Attempts()
    tried(attempts, 4, address="x")
    assert attempts.wait(keys_of("x", "ada", None), 0) == 0
    tried(attempts, 1, address="x")
    assert attempts.wait(keys_of("x", "bob", None), 10_000) == 50_000
    assert attempts.wait(keys_of("x", "bob", None), MINUTE) == 0


def test_a_name_waits_when_it_is_tried_from_everywhere() -> None:
    attempts = Attempts()
    for number in range(ALLOWANCES["name"].tries):
        tried(attempts, 1, address=f"10.0.0.{number}")
    assert attempts.wait(keys_of("new", "ada", None), 0) == ALLOWANCES["name"].span
    assert attempts.wait(keys_of("new", "bob", None), 0) == 0


def test_nobody_locks_out_a_browser_that_has_logged_in_before() -> None:
    attempts = Attempts()
    for number in range(1000):
        tried(attempts, 1, address=f"10.0.0.{number % 7}")
    assert attempts.wait(keys_of("10.0.0.1", "ada", "b1"), 0) == 0
    tried(attempts, ALLOWANCES["browser"].tries, address="10.0.0.1", browser="b1")
    assert attempts.wait(keys_of("10.0.0.1", "ada", "b1"), 0) == MINUTE


def test_the_right_password_is_no_try() -> None:
    attempts = Attempts()
    for _ in range(100):
        keys = keys_of("x", "ada", None)
        assert attempts.wait(keys, 0) == 0
        attempts.count(keys, 0)
        attempts.take_back(keys)


def test_names_that_are_made_up_do_not_fill_the_memory() -> None:
    attempts = Attempts()
    for number in range(MAX_KEYS):
        tried(attempts, 1, address=f"a{number}", name=f"n{number}")
    assert len(attempts.tries) <= MAX_KEYS + 2
