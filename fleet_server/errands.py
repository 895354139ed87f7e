"""The commands of ``edgewarden-server`` that look after a server and then end: their words, and what they print."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from fleet_server.config import ServerConfig
from fleet_server.core.findings import Level, is_in_trouble

EXIT_CODES = (
    "Exit codes: 0 done, 1 could not be done (doctor: something is in trouble), 2 wrong command line or settings."
)
_LEVELS = ("debug", "info", "warning", "error")
_log = logging.getLogger(__name__)


def add_to(commands: Any) -> None:
    """Add the commands (`argparse` does not name the type of what it adds to)."""
    backup = _add(commands, "backup", "Write everything that lasts into one file; the server may run meanwhile.")
    backup.add_argument(
        "file", type=Path, metavar="FILE", help="must not exist; holds keys, so only its owner reads it"
    )
    restore = _add(commands, "restore", "Put a backup back; no server may run on the folder.")
    restore.add_argument("file", type=Path, metavar="FILE", help="what backup wrote")
    restore.add_argument("--force", action="store_true", help="put aside what is in the data folder and the database")
    doctor = _add(commands, "doctor", "Look for what is wrong, and say what helps.")
    doctor.add_argument("--json", action="store_true", help="print one JSON array")
    user = _add(commands, "user", "Let a user in again, without logging in.")
    user.add_argument(
        "step", choices=("reset-password",), metavar="STEP", help="reset-password: set another password"
    )
    user.add_argument("name", metavar="NAME", help="name of the user")
    user.add_argument(
        "--password-file", type=Path, metavar="FILE", help="the new password (default: made and printed)"
    )


def run(parsed: argparse.Namespace, config: ServerConfig) -> int:
    """Run one of the commands; return the exit code."""
    errands: dict[str, Callable[[argparse.Namespace, ServerConfig], int]] = {
        "backup": _backup,
        "restore": _restore,
        "doctor": _doctor,
        "user": _reset_password,
    }
    try:
        return errands[parsed.command](parsed, config)
    except Exception as error:  # noqa: BLE001 - whatever hinders it, the operator is told in one sentence
        _log.debug("it could not be done", exc_info=True)
        sys.stderr.write(f"error: {error}\n")
        return 1


def is_one(command: str) -> bool:
    """Tell whether a command is one of these."""
    return command in {"backup", "restore", "doctor", "user"}


def _add(commands: Any, name: str, does: str) -> argparse.ArgumentParser:
    said = does[0].lower() + does[1:].rstrip(".")
    parser: argparse.ArgumentParser = commands.add_parser(name, description=does, help=said, epilog=EXIT_CODES)
    parser.add_argument("--data", metavar="DIR", help="folder of everything that lasts")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML; flags override them")
    parser.add_argument("--log-level", default="warning", choices=_LEVELS, help="as for serve")
    return parser


def _backup(parsed: argparse.Namespace, config: ServerConfig) -> int:
    from fleet_server.safekeeping import backup

    manifest = backup(config, parsed.file)
    size = sum(member.length for member in manifest.members)
    sys.stdout.write(
        f"{parsed.file}: {len(manifest.members)} files, {size} bytes, database schema {manifest.schema}\n"
    )
    return 0


def _restore(parsed: argparse.Namespace, config: ServerConfig) -> int:
    from fleet_server.safekeeping import restore

    manifest = restore(config, parsed.file, force=parsed.force)
    sys.stdout.write(f"{config.data}: {len(manifest.members)} files are back. Start the server\n")
    return 0


def _doctor(parsed: argparse.Namespace, config: ServerConfig) -> int:
    from fleet_server.doctor import examine

    findings = examine(config)
    if parsed.json:
        sys.stdout.write(msgspec.json.encode(findings).decode() + "\n")
    for finding in () if parsed.json else findings:
        sys.stdout.write(f"{finding.level.value:8} {finding.about}: {finding.sentence}\n")
        if finding.level is not Level.FINE:
            sys.stdout.write(f"{'':8} -> {finding.remedy}\n")
    return 1 if is_in_trouble(findings) else 0


def _reset_password(parsed: argparse.Namespace, config: ServerConfig) -> int:
    from fleet_server.safekeeping import read_password, reset_password

    given = read_password(parsed.password_file) if parsed.password_file else None
    password = reset_password(config, parsed.name, given)
    said = "the password in the file" if given is not None else password
    sys.stdout.write(f"{parsed.name} logs in with: {said}\n")
    return 0
