"""Who may do what: roles, permissions, and the one table that puts them together.

Pure: a caller and a rule in, yes or no out. Which route has which rule stands beside the route (`web/auth.py`).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

MIN_PASSWORD, MAX_PASSWORD = 12, 1024  # characters; argon2 reads all of them
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Role(str, Enum):
    """What a user is."""

    VIEWER = "viewer"  # looks
    OPERATOR = "operator"  # decides which device runs what
    RELEASER = "releaser"  # brings what was signed offline
    ADMIN = "admin"  # everything, users among it


class Permission(str, Enum):
    """What a route may ask for; also the scopes of API tokens."""

    LOOK = "look"  # see devices, models, events, figures and signed metadata
    ORDER = "order"  # deploy and roll back
    COMMAND = "command"  # have a device do something once
    DEVICES = "devices"  # make enrolment tokens, revoke devices, let an id enrol again
    PUBLISH = "publish"  # upload bundles, publish metadata that was signed offline
    TRUST = "trust"  # bring trust roots, have the server make new online keys
    AUDIT = "audit"  # read the audit log
    USERS = "users"  # make, change and remove users; see and revoke everybody's API tokens


V, O, R, A = Role.VIEWER, Role.OPERATOR, Role.RELEASER, Role.ADMIN  # noqa: E741 - columns of the table
_ROLES = {
    Permission.LOOK:    (V, O, R, A),
    Permission.ORDER:   (   O,    A),
    Permission.COMMAND: (   O,    A),
    Permission.DEVICES: (   O,    A),
    Permission.PUBLISH: (      R, A),
    Permission.TRUST:   (      R, A),
    Permission.AUDIT:   (         A,),
    Permission.USERS:   (         A,),
}  # fmt: skip


class Standing(str, Enum):
    """Rules of routes that ask who one is, and for no permission."""

    ANYBODY = "anybody"  # without a log-in
    KNOWN = "known"  # any user, also by an API token
    PERSON = "person"  # a user with a log-in: an API token must not make another, or change a password


Rule = Permission | Standing


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks. ``by`` says with what: ``session``, or ``token:`` and the API token's id."""

    account: str
    role: Role
    permissions: frozenset[Permission]
    by: str = "session"
    csrf: str = ""  # what forms of this session must carry
    session_sha256: str = ""  # empty for an API token

    @property
    def is_person(self) -> bool:
        """Whether a log-in stands behind this, and not an API token."""
        return bool(self.session_sha256)


def permissions_of(role: Role) -> frozenset[Permission]:
    """Return a role's column of the table.

    >>> sorted(permission.value for permission in permissions_of(Role.RELEASER))
    ['look', 'publish', 'trust']
    """
    return frozenset(permission for permission, roles in _ROLES.items() if role in roles)


def permissions_of_token(role: Role, scopes: Collection[Permission]) -> frozenset[Permission]:
    """Return what an API token may: never more than its owner may by now."""
    return permissions_of(role) & frozenset(scopes)


def may(caller: Caller | None, rule: Rule) -> bool:
    """Tell whether a rule lets somebody through; None is who is not logged in."""
    if rule is Standing.ANYBODY:
        return True
    if caller is None:
        return False
    if rule is Standing.KNOWN:
        return True
    if rule is Standing.PERSON:
        return caller.is_person
    return rule in caller.permissions


def fault_of_name(name: str) -> str | None:
    """Return what is wrong with a user's name, or None."""
    if _NAME.fullmatch(name):
        return None
    return "a user name has 1 to 63 characters from a-z, 0-9, '.', '_' and '-', and begins with a letter or digit"


def fault_of_password(password: str, name: str) -> str | None:
    """Return what is wrong with a new password, or None. Length is what helps; no rules on its characters."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        return f"a password has {MIN_PASSWORD} to {MAX_PASSWORD} characters"
    if password.strip().lower() == name.lower():
        return "the password must not be the user name"
    if len(set(password)) == 1:
        return "the password must not be one character repeated"
    return None
