"""What keeps a server safe, beside running it: ``backup``, ``restore``, ``user reset-password``.

Wires the adapters for one errand each. Each raises what the operator is told in one sentence.
"""

import secrets
import time
from pathlib import Path

from fleet_server.adapters.backup import Manifest, make_backup, restore_backup
from fleet_server.adapters.data_lock import DataLock
from fleet_server.adapters.database.accounts import DatabaseAccounts
from fleet_server.adapters.database.opening import open_database
from fleet_server.adapters.durable import make_private_folder
from fleet_server.adapters.passwords import Argon2Passwords
from fleet_server.config import ServerConfig
from fleet_server.core.access import fault_of_password
from fleet_server.core.audit import SERVER, Act

MAX_PASSWORD_FILE = 4096  # bytes


class BadPassword(Exception):
    """A password cannot be used; the text says why."""


def backup(config: ServerConfig, file: Path) -> Manifest:
    """Write a backup; the server may run meanwhile."""
    return make_backup(config.data, config.database, file.absolute(), now=_now())


def restore(config: ServerConfig, file: Path, *, force: bool) -> Manifest:
    """Put a backup back; no server may run on the folder."""
    lock = DataLock(make_private_folder(config.data))
    try:
        return restore_backup(file, config.data, config.database, force=force, now=_now())
    finally:
        lock.release()


def reset_password(config: ServerConfig, name: str, password: str | None) -> str:
    """Give a user another password, made here when none is given, and return it; the user's sessions end."""
    chosen = password if password is not None else secrets.token_urlsafe(15)
    fault = fault_of_password(chosen, name)
    if fault is not None:
        raise BadPassword(fault)
    engine = open_database(config.database)
    try:
        act = Act(at=_now(), who=SERVER, by=SERVER, address="", action="reset-password", about=name)
        hashed = Argon2Passwords().hash(chosen)
        DatabaseAccounts(engine).change_account(name, None, act, password_hash=hashed)
    finally:
        engine.dispose()
    return chosen


def read_password(file: Path) -> str:
    """Return the password in a file, without the end of its line."""
    with file.open(encoding="utf-8") as opened:
        return opened.read(MAX_PASSWORD_FILE).rstrip("\r\n")


def _now() -> int:
    return time.time_ns() // 1_000_000
