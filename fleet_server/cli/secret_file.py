"""Writes a secret that is shown once to a file that only its owner may read."""

import os
from pathlib import Path

import typer

from fleet_server.cli import output


def write_secret(file: Path, secret: str) -> None:
    """Write it (mode 0600); when that fails, say why and end."""
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            os.fchmod(opened.fileno(), 0o600)
            opened.write(secret + "\n")
    except OSError as error:
        output.say_error(f"cannot write {file}: {error.strerror}")
        raise typer.Exit(output.FAILED) from error
