"""What every command of the release team does: open the key folder, ask the server or a file, sign, bring it away.

Knows prompts, sessions and progress. What a change says is in `fleet_server.cli.changes`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from securesystemslib.signer import Key

from fleet_server.api_types import Publication
from fleet_server.cli import change_file, trust_table
from fleet_server.cli.changes import ROOT_OF, Change
from fleet_server.cli.errors import CannotSign, TooFewSignatures
from fleet_server.cli.key_folder import IMAGE_TARGETS, OWNER, TARGETS, HeldKey, KeyFolder
from fleet_server.cli.session import ApiError, Session
from fleet_server.cli.signers import FILE, Passphrase, file_signer, scheme_of
from fleet_server.cli.signing import Client, fetch_verified, now_utc

out, err = Console(emoji=False), Console(stderr=True, emoji=False)
_MAX_SECRET_FILE = 4096
T = TypeVar("T")
Folder = Annotated[Path, typer.Option("--dir", "--keys", help="The key folder; keep it off the server.")]
Server = Annotated[str | None, typer.Option("--server", help="Address of the fleet server's API.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="Read the passphrase (or PIN) from this file instead of asking."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prepare = Annotated[
    Path | None,
    typer.Option(
        "--prepare", metavar="OUT", help="Write what is signed so far here, for others to sign; upload nothing."
    ),
]
Offline = Annotated[
    Path | None,
    typer.Option("--offline", metavar="FILE", help="Work from a file of `keys fetch` instead of the server."),
]
Opened = Callable[[Path], IO[bytes]]


class Desk:
    """One release person at work: the key folder, and the server or what was fetched from it."""

    def __init__(self, folder: Path, client: Client, passphrase: Passphrase) -> None:
        self.folder = KeyFolder(folder)
        self.client = client
        self.passphrase = passphrase

    def change(self) -> Change:
        """Begin a change on top of what is in force."""
        return Change(base=fetch_verified(self.client, self.folder), now=now_utc())

    def finish(self, change: Change, prepare: Path | None) -> None:
        """Sign, then upload; or write it for others, when asked to."""
        change.settle()
        signed = change.sign(self.folder, self.passphrase)
        if prepare is not None:
            change_file.write_change(prepare, change, change_file.fetch(self.client))
            trust_table.say_signed(signed, change.missing(), prepare)
            return
        self.client.post("/models/publish", complete(change), object)
        fetch_verified(self.client, self.folder)
        for line in signed:
            out.print(f"signed {line}", markup=False, highlight=False, soft_wrap=True)
        out.print("The server has it.")

    def make_successor(self, role: str, replaced: Key) -> Key:
        """Make a key in this folder, protected as the one it replaces, whose file stays for its last signature."""
        for held in self.folder.held():
            if scheme_of(held.uri) == FILE and self._public(held).keyid == replaced.keyid:
                return self.folder.make_key(self.folder.free_name(role), self._protection(held), _owner(replaced))
        raise CannotSign(f"the key that is replaced is no file of {self.folder.path}; say the new one with --new")

    def _protection(self, held: HeldKey) -> bytes | None:
        """Return the passphrase of a key's file, None when it has none."""
        asked: list[bytes] = []

        def note() -> bytes:
            asked.append(self.passphrase())
            return asked[0]

        file_signer(Path(held.uri.partition(":")[2]), note)
        return asked[0] if asked else None

    def own_key_of(self, change: Change, role: str) -> str:
        """Return the id of the one key of a role that this folder holds."""
        ids = {key.keyid for key in change.keys_of(role)}
        own = [key for held in self.folder.held() if (key := self._public(held)).keyid in ids]
        if len(own) != 1:
            raise CannotSign(f"this folder holds {len(own)} keys of {role}, not one; say which to replace with --old")
        return own[0].keyid

    def roles_held(self, change: Change) -> Sequence[str]:
        """Return the roles that this folder has a key for."""
        held = {self._public(key).keyid for key in self.folder.held()}
        roles = [*ROOT_OF, IMAGE_TARGETS, *sorted(set(change.base.signed) - {TARGETS})]
        found = [role for role in roles if held & {key.keyid for key in change.keys_of(role)}]
        if not found:
            raise CannotSign(f"{self.folder.path} holds no key of any role")
        return found

    def _public(self, held: HeldKey) -> Key:
        return held.public or self.folder.open(held, self.passphrase).public


@contextmanager
def desk_at(folder: Path, server: str | None, offline: Path | None, passphrase_file: Path | None) -> Iterator[Desk]:
    """Give a desk that asks the server, or the file that was fetched from it."""
    passphrase = passphrase_from(passphrase_file)
    if offline is not None:
        yield Desk(folder, change_file.read_fetched(offline), passphrase)
        return
    with closing(Session(server)) as session:
        yield Desk(folder, session, passphrase)


def _owner(key: Key) -> str:
    owner = key.unrecognized_fields.get(OWNER)
    return owner if isinstance(owner, str) else ""


def complete(change: Change) -> Publication:
    """Return what the server takes; when others must sign too, say who and how."""
    try:
        return change.complete()
    except TooFewSignatures as error:
        raise TooFewSignatures(f"{error}\nWrite it to a file for them with --prepare OUT") from error


def upload_prepared(client: Client, path: Path, folder: KeyFolder | None) -> None:
    """Bring a change to the server, and the bundles beside it first."""
    publication = _signed_by_all(change_file.change_path(path))
    bundles = sorted(path.glob("*.ewb")) if path.is_dir() else []
    with progress(hidden=False) as bars:
        for bundle in bundles:
            with shown_on(bars)(bundle) as opened:
                client.upload(f"/models/bundles/{bundle.stem}", opened, bundle.stat().st_size)
    client.post("/models/publish", publication, object)
    if folder is not None:
        fetch_verified(client, folder)


def _signed_by_all(path: Path) -> Publication:
    """Return what a file brings, or say who must sign it still. The server is who verifies it."""
    with TemporaryDirectory(prefix="edgewarden-upload-") as scratch:
        folder = KeyFolder(Path(scratch))
        change_file.adopt_roots(folder, change_file.read_publication(path).base)
        missing = change_file.read_change(path, folder)[0].missing()
    if missing:
        raise TooFewSignatures(f"{path} has too few signatures\n" + "\n".join(f"  {line}" for line in missing))
    return change_file.read_publication(path).publication


@contextmanager
def errors_said() -> Iterator[None]:
    """Say what went wrong on stderr and end with the error's exit code."""
    try:
        yield
    except (ApiError, CannotSign) as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error


def ask(server: str | None, question: Callable[[Session], T]) -> T:
    """Ask the server one thing."""
    session = Session(server)
    try:
        return question(session)
    finally:
        session.close()


# ---------------------------------------------------------------- secrets
def passphrase_from(file: Path | None) -> Passphrase:
    """Return what opens keys: the file's content, or a prompt (asked once)."""
    known: list[bytes] = []

    def ask_once() -> bytes:
        if not known:
            known.append(_secret_in(file) if file else str(typer.prompt("Passphrase", hide_input=True)).encode())
        return known[0]

    return ask_once


def new_passphrase(file: Path | None) -> bytes:
    """Return what shall protect new keys."""
    prompt = partial(typer.prompt, "New passphrase", hide_input=True, confirmation_prompt=True)
    secret = _secret_in(file) if file else str(prompt()).encode()
    if not secret:
        raise CannotSign("the passphrase is empty; use --no-passphrase if that is meant")
    return secret


def _secret_in(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_SECRET_FILE).rstrip(b"\r\n")
    except OSError as error:
        raise CannotSign(f"cannot read the passphrase file: {error}") from error


# ---------------------------------------------------------------- progress
def progress(*, hidden: bool) -> Progress:
    """Return bars for uploads; they show on a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=hidden or not console.is_terminal, transient=True)


def shown_on(bars: Progress) -> Opened:
    """Return an `open` whose reading moves a bar."""

    def opened(path: Path) -> IO[bytes]:
        return cast("IO[bytes]", bars.open(path, "rb", description=path.name))

    return opened
