"""What people are shown of the roles: versions, days left, who must sign, and what to run."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from tuf.api.metadata import Root, Targets

from fleet_server.api_types import TrustStatus
from fleet_server.cli.key_folder import (
    DIRECTOR_ROOT,
    IMAGE_ROOT,
    IMAGE_TARGETS,
    TARGETS,
    KeyFolder,
    fingerprint,
    owner_of,
)
from fleet_server.cli.signing import read
from fleet_server.core.expiry import remind

_out = Console(emoji=False)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One role. ``holders`` are known from a key folder only."""

    name: str
    version: int
    expires: str
    days_left: int
    threshold: int
    keys: int
    holders: tuple[str, ...] = ()
    warning: str = ""
    command: str = ""


def rows_of_server(status: TrustStatus) -> Sequence[Row]:
    """Return what the server says of each role."""
    return [msgspec.convert(msgspec.to_builtins(role), Row) for role in status.roles]


def rows_of_folder(folder: KeyFolder, now: datetime) -> Sequence[Row]:
    """Return what a key folder saw last."""
    image = read(Root, folder.roots("image")[-1], "image root").signed
    director = read(Root, folder.roots("director")[-1], "director root").signed
    targets = read(Targets, folder.targets(), "image targets").signed
    families = {f: read(Targets, data, f).signed for f, data in folder.families().items()}
    return [
        _row(IMAGE_ROOT, image, image, Root.type, now),
        _row(DIRECTOR_ROOT, director, director, Root.type, now),
        _row(IMAGE_TARGETS, targets, image, TARGETS, now),
        *(_row(family, signed, targets, family, now) for family, signed in families.items()),
    ]


def show(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print roles as a table or as JSON."""
    if as_json:
        typer.echo(msgspec.json.encode(rows).decode())
        return
    table = Table("signed", "version", "expires", "days left", "signatures", box=None, header_style="bold")
    for row in rows:
        cells = (row.name, str(row.version), row.expires, str(row.days_left), _signatures(row))
        table.add_row(*cells, style="bold red" if row.warning else None)
    _out.print(table if rows else "there are no trust roots yet; make them with: edgewarden keys init --dir KEYS")
    for row in rows:
        if row.warning:
            _out.print(row.warning, markup=False, highlight=False, soft_wrap=True)


def say_signed(signed: Sequence[str], missing: Sequence[str], file: Path) -> None:
    """Tell what was signed in a file, and who is next."""
    for line in signed:
        _out.print(f"signed {line}", markup=False, highlight=False, soft_wrap=True)
    for line in missing:
        _out.print(f"missing {line}", markup=False, highlight=False, soft_wrap=True)
    follow = f"edgewarden keys sign {file} --keys KEYS" if missing else f"edgewarden keys upload {file}"
    _out.print(f"{file}: {'next, whoever is missing' if missing else 'complete; next'}: {follow}", soft_wrap=True)


def fingerprint_of(folder: KeyFolder) -> str:
    """Return what two people compare."""
    return fingerprint(folder.roots("image")[0], folder.roots("director")[0])


def _row(name: str, signed: Root | Targets, by: Root | Targets, role: str, now: datetime) -> Row:
    delegation = by.get_delegated_role(role)
    reminder = remind(name, int(signed.expires.timestamp() * 1000), int(now.timestamp() * 1000))
    return Row(
        name=name,
        version=signed.version,
        expires=signed.expires.isoformat(),
        days_left=reminder.days_left,
        threshold=delegation.threshold,
        keys=len(delegation.keyids),
        holders=tuple(owner_of(by.get_key(keyid)) for keyid in delegation.keyids),
        warning=reminder.warning,
        command=reminder.command,
    )


def _signatures(row: Row) -> str:
    return f"{row.threshold} of {', '.join(row.holders) or row.keys}"
