"""The first user's password: from a file that an operator put into the data folder, else made and written there."""

import os
import secrets
from pathlib import Path

NAME = "admin-password"
MAX_FILE = 4096  # bytes


def first_password(folder: Path) -> str:
    """Return the password in the folder's file; make one and write it (mode 0600) when there is none."""
    path = folder / NAME
    try:
        with path.open(encoding="utf-8") as file:
            password = file.read(MAX_FILE).strip()
    except FileNotFoundError:
        password = ""
    return password or _make(path)


def _make(path: Path) -> str:
    password = secrets.token_urlsafe(15)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(password + "\n")
    return password
