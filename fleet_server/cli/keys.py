"""``edgewarden keys``: makes the offline keys, signs the trust roots, brings them to the server, shows what expires.

Knows options, prompts and what is printed; signing itself is in `fleet_server.cli.signing`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fleet_server.api_types import OnlineKeysView, TrustStatus
from fleet_server.cli.session import ApiError, Session
from fleet_server.cli.signing import (
    CannotSign,
    Client,
    KeyFolder,
    Passphrase,
    expiries,
    fetch_verified,
    now_utc,
    sign_again,
    sign_first,
)

WARN_DAYS = 21
_MAX_SECRET_FILE = 4096

app = typer.Typer(help="Offline keys and trust roots.", no_args_is_help=True)
_out, _err = Console(), Console(stderr=True)

T = TypeVar("T")
Folder = Annotated[Path, typer.Option("--dir", "--keys", help="The key folder; keep it off the server.")]
Server = Annotated[str | None, typer.Option("--server", help="Address of the fleet server's API.")]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="Read the passphrase from this file instead of asking.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(
    folder: Folder,
    server: Server = None,
    online_keys: Annotated[
        Path | None,
        typer.Option("--online-keys", help="File from `keys online`; signs without any network, uploads nothing."),
    ] = None,
    passphrase_file: PassphraseFile = None,
    no_passphrase: Annotated[
        bool, typer.Option("--no-passphrase", help="Leave the keys unprotected; only for trials.")
    ] = False,
) -> None:
    """Make the offline keys, sign both trust roots, and upload them. Existing keys are never written over."""
    with errors_said():
        keys = KeyFolder(folder)
        keys.refuse_existing()
        offline = _online_keys_in(online_keys) if online_keys else None
        online = offline or _ask(server, _keys_of_new_server)
        secret = None if no_passphrase else _new_passphrase(passphrase_file)
        keys.make_keys(secret)
        sign_first(keys, online, lambda: secret or b"", now_utc())
        _out.print(
            f"Keys and signed roots are in {folder}. Back this folder up; nobody can make it again.", soft_wrap=True
        )
        if offline is None:
            _upload(keys, server)
        else:
            _out.print(
                f"Bring the roots to the server with: edgewarden keys upload --dir {folder} --server URL",
                soft_wrap=True,
            )


@app.command()
def online(out: Annotated[Path, typer.Argument(help="Where to write.")], server: Server = None) -> None:
    """Write the server's public online keys to a file, for `init --online-keys` on a machine without network."""
    with errors_said():
        view = _ask(server, lambda client: client.get("/trust/online-keys", OnlineKeysView))
        out.write_bytes(msgspec.json.format(msgspec.json.encode(view), indent=2))
        _out.print(f"wrote {out}")


@app.command()
def upload(folder: Folder, server: Server = None) -> None:
    """Upload the signed roots (again). Harmless when the server has them."""
    with errors_said():
        _upload(KeyFolder(folder), server)


@app.command()
def renew(folder: Folder, server: Server = None, passphrase_file: PassphraseFile = None) -> None:
    """Sign both roots and the targets again with new expiry dates, and upload them."""
    with errors_said():
        keys = KeyFolder(folder)
        passphrase = passphrase_from(passphrase_file)
        current = _ask(server, lambda client: fetch_verified(client, keys))
        sign_again(keys, current, passphrase, now_utc())
        _upload(keys, server)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show what was signed with these keys, and when it expires."""
    with errors_said():
        now = now_utc()
        rows = [
            {"name": name, "version": version, "expires": when.isoformat(), "days_left": (when - now).days}
            for name, (version, when) in expiries(KeyFolder(folder)).items()
        ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("signed", "version", "expires", "days left")
    for row in rows:
        late = int(str(row["days_left"])) < WARN_DAYS
        table.add_row(*(str(value) for value in row.values()), style="bold red" if late else None)
    _out.print(table)
    if any(int(str(row["days_left"])) < WARN_DAYS for row in rows):
        _out.print("Sign again with: edgewarden keys renew")


@contextmanager
def errors_said() -> Iterator[None]:
    """Say what went wrong on stderr and end with the error's exit code."""
    try:
        yield
    except (ApiError, CannotSign) as error:
        _err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error


def passphrase_from(file: Path | None) -> Passphrase:
    """Return what opens keys: the file's content, or a prompt (asked once)."""
    known: list[bytes] = []

    def ask() -> bytes:
        if not known:
            known.append(_secret_in(file) if file else str(typer.prompt("Passphrase", hide_input=True)).encode())
        return known[0]

    return ask


def _keys_of_new_server(client: Client) -> OnlineKeysView:
    if client.get("/trust", TrustStatus).ready:
        raise CannotSign("the server has trust roots already; roots of other keys would not be taken")
    return client.get("/trust/online-keys", OnlineKeysView)


def _upload(keys: KeyFolder, server: str | None) -> None:
    _ask(server, lambda client: client.post("/trust/roots", keys.signed_roots(), object))
    _out.print("The server has the trust roots.")


def _ask(server: str | None, question: Callable[[Session], T]) -> T:
    session = Session(server)
    try:
        return question(session)
    finally:
        session.close()


def _new_passphrase(file: Path | None) -> bytes:
    ask = partial(typer.prompt, "New passphrase", hide_input=True, confirmation_prompt=True)
    secret = _secret_in(file) if file else str(ask()).encode()
    if not secret:
        raise CannotSign("the passphrase is empty; use --no-passphrase if that is meant")
    return secret


def _secret_in(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_SECRET_FILE).rstrip(b"\r\n")
    except OSError as error:
        raise CannotSign(f"cannot read the passphrase file: {error}") from error


def _online_keys_in(file: Path) -> OnlineKeysView:
    try:
        return msgspec.json.decode(file.read_bytes(), type=OnlineKeysView)
    except (OSError, msgspec.DecodeError) as error:
        raise CannotSign(f"cannot read the online keys: {error}") from error
