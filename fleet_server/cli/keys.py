"""``edgewarden keys``: the offline keys of both trust roots, who may sign for what, and what expires.

Knows options, prompts and what is printed. What a change of keys comes to is in `fleet_server.cli.changes`, the first
signing in `fleet_server.cli.signing`. Each command that changes something signs with the keys of the folder and
brings the result to the server; with ``--prepare`` it writes a file instead, that others sign (`keys sign`) and one
uploads.
"""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fleet_server.api_types import MakeOnlineKeys, OnlineKeysView, TrustStatus
from fleet_server.cli import change_file, trust_table
from fleet_server.cli.change_file import Fetched
from fleet_server.cli.changes import describe
from fleet_server.cli.errors import CannotSign
from fleet_server.cli.key_folder import KeyFolder, owner_of, read_public
from fleet_server.cli.release_desk import (
    AsJson,
    Folder,
    Offline,
    PassphraseFile,
    Prepare,
    Server,
    ask,
    desk_at,
    errors_said,
    new_passphrase,
    out,
    passphrase_from,
    upload_prepared,
)
from fleet_server.cli.signing import Client, now_utc, sign_first

app = typer.Typer(help="Offline keys and trust roots.", no_args_is_help=True)

Role = Annotated[str, typer.Argument(help="image-root, image-targets, director-root, or a delegated family.")]
Publics = Annotated[list[Path], typer.Argument(help="Public keys: the .pub files of whoever is to sign.")]
Threshold = Annotated[int | None, typer.Option(min=1, help="How many of its keys must sign; as before if not said.")]
Owner = Annotated[str, typer.Option(help="Who holds the key; told to those who wait for a signature.")]
NoPassphrase = Annotated[bool, typer.Option("--no-passphrase", help="Leave the keys unprotected; only for trials.")]


# ---------------------------------------------------------------- making keys
@app.command()
def init(
    *,
    folder: Folder,
    server: Server = None,
    online_keys: Annotated[
        Path | None,
        typer.Option("--online-keys", help="File from `keys online`; signs without any network, uploads nothing."),
    ] = None,
    passphrase_file: PassphraseFile = None,
    no_passphrase: NoPassphrase = False,
    owner: Owner = "",
) -> None:
    """Make the offline keys, sign both trust roots, and upload them. Existing keys are never written over."""
    with errors_said():
        keys = KeyFolder(folder)
        keys.refuse_existing()
        offline = _online_keys_in(online_keys) if online_keys else None
        online = offline or ask(server, _keys_of_new_server)
        secret = None if no_passphrase else new_passphrase(passphrase_file)
        keys.make_keys(secret, owner)
        sign_first(keys, online, lambda: secret or b"", now_utc())
        out.print(
            f"Keys and signed roots are in {folder}. Back this folder up; nobody can make it again.", soft_wrap=True
        )
        if offline is None:
            _upload_roots(keys, server)
        else:
            out.print(
                f"Bring the roots to the server with: edgewarden keys upload --dir {folder} --server URL",
                soft_wrap=True,
            )


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="A name for the key, e.g. ann.")],
    folder: Folder,
    passphrase_file: PassphraseFile = None,
    no_passphrase: NoPassphrase = False,
    owner: Owner = "",
) -> None:
    """Make one more key, e.g. for a second person. Give NAME.pub to whoever is to add it."""
    with errors_said():
        secret = None if no_passphrase else new_passphrase(passphrase_file)
        key = KeyFolder(folder).make_key(name, secret, owner or name)
        out.print(f"{folder / name}.pub is the public half of {owner_of(key)}", soft_wrap=True, highlight=False)


@app.command("import")
def bring_in(
    uri: Annotated[
        str, typer.Argument(help="hsm:ID[?label=TOKEN], awskms:ID, gcpkms:NAME, azurekms:VAULT/KEY, file:PATH.")
    ],
    name: Annotated[
        str, typer.Option(help="A name for the key; image-root, image-targets, director-root before init.")
    ],
    folder: Folder,
    passphrase_file: PassphraseFile = None,
    owner: Owner = "",
) -> None:
    """Note a key that is on an HSM, in a key service or in another file, so that this folder signs with it."""
    with errors_said():
        key = KeyFolder(folder).bring_in(name, uri, passphrase_from(passphrase_file), owner or name)
        out.print(f"{folder / name}.pub is the public half of {owner_of(key)}", soft_wrap=True, highlight=False)


# ---------------------------------------------------------------- to and from the server
@app.command()
def online(
    file: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write.")],
    server: Server = None,
    new: Annotated[bool, typer.Option("--new", help="Have the server make new keys first.")] = False,
) -> None:
    """Write the server's public online keys to a file, for `init --online-keys` on a machine without network."""
    with errors_said():
        view = ask(server, _make_online_keys if new else _online_keys)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(view), indent=2))
        out.print(f"wrote {file}")


@app.command()
def fetch(
    file: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write.")], server: Server = None
) -> None:
    """Write the server's signed metadata to a file, for `--offline` on a machine without network."""
    with errors_said():
        fetched = ask(server, change_file.fetch)
        change_file.write_fetched(file, fetched)
        out.print(f"wrote {file}; the first roots have the fingerprint {fetched.fingerprint()}", soft_wrap=True)


@app.command()
def upload(
    file: Annotated[
        Path | None, typer.Argument(help="A signed change, or the folder of one. Without it: the folder's roots.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", "--keys", help="The key folder, to keep what is new.")
    ] = None,
    server: Server = None,
) -> None:
    """Upload a change that everybody signed, or the first roots (again). Harmless when the server has them."""
    with errors_said():
        if file is not None:
            ask(server, lambda client: upload_prepared(client, file, KeyFolder(folder) if folder else None))
            out.print("The server has the change.")
        elif folder is not None:
            _upload_roots(KeyFolder(folder), server)
        else:
            raise CannotSign("say what to upload: a file with a change, or --dir KEYS for the first roots")


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(help="A change made with --prepare, or the folder of one.")],
    folder: Folder,
    passphrase_file: PassphraseFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    fingerprint: Annotated[
        str, typer.Option(help="Of the first roots, for a folder that has none yet (`keys status` shows it).")
    ] = "",
) -> None:
    """Show what a change says, and add the signatures of this folder's keys to it."""
    with errors_said():
        path, keys = change_file.change_path(file), KeyFolder(folder)
        if not keys.has_roots():
            _adopt(keys, change_file.read_publication(path).base, fingerprint)
        change, base = change_file.read_change(path, keys)
        for line in describe(change):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
        if not yes:
            typer.confirm("Sign this?", abort=True)
        signed = change.sign(keys, passphrase_from(passphrase_file))
        if not signed:
            raise CannotSign(f"no key of {folder} is asked for here\n" + "\n".join(change.missing()))
        change_file.write_change(path, change, base)
        trust_table.say_signed(signed, change.missing(), file)


# ---------------------------------------------------------------- changes
@app.command()
def renew(
    *,
    folder: Folder,
    roles: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ROLE]...", help="Those that this folder has keys for, if not said."),
    ] = None,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Sign roles again with new expiry dates and nothing else changed."""
    with errors_said(), desk_at(folder, server, offline, passphrase_file) as desk:
        change = desk.change()
        for role in roles or desk.roles_held(change):
            change.renew(role)
        desk.finish(change, prepare)


@app.command()
def add(
    *,
    role: Role,
    keys: Publics,
    folder: Folder,
    threshold: Threshold = None,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Let more keys sign for a role, and say how many of them must."""
    with errors_said(), desk_at(folder, server, offline, passphrase_file) as desk:
        change = desk.change()
        change.add_keys(role, [read_public(path) for path in keys], threshold)
        desk.finish(change, prepare)


@app.command()
def revoke(
    *,
    role: Role,
    key: Annotated[str, typer.Argument(help="Whose key: its owner, or the beginning of its id.")],
    folder: Folder,
    threshold: Threshold = None,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Have a key sign for a role no longer. What it signed is signed again by those that remain."""
    with errors_said(), desk_at(folder, server, offline, passphrase_file) as desk:
        change = desk.change()
        change.revoke_key(role, key, threshold)
        desk.finish(change, prepare)


@app.command()
def rotate(
    *,
    role: Annotated[
        str, typer.Argument(help="image-root, image-targets, director-root, a delegated family, or online.")
    ],
    folder: Folder,
    new: Annotated[
        Path | None, typer.Option("--new", help="The .pub file of the new key; made here if not said.")
    ] = None,
    old: Annotated[str, typer.Option("--old", help="Whose key it replaces; this folder's, if not said.")] = "",
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Replace a key by a new one. `online`: the server's own keys, signed in by both offline roots."""
    with errors_said(), desk_at(folder, server, offline, passphrase_file) as desk:
        change = desk.change()
        if role == "online":
            change.name_online_keys(_online_keys(desk.client) if offline else _make_online_keys(desk.client))
        else:
            replaced = change.find_key(role, old or desk.own_key_of(change, role))
            key = read_public(new) if new else desk.make_successor(role, replaced)
            change.add_keys(role, [key])
            change.revoke_key(role, replaced.keyid)
        desk.finish(change, prepare)


@app.command()
def delegate(
    *,
    family: Annotated[str, typer.Argument(help="The family, e.g. vision.")],
    keys: Publics,
    folder: Folder,
    threshold: Annotated[int, typer.Option(min=1, help="How many of its keys must sign.")] = 1,
    server: Server = None,
    passphrase_file: PassphraseFile = None,
    prepare: Prepare = None,
    offline: Offline = None,
) -> None:
    """Give a model family keys of its own: they publish models/FAMILY/* and nothing else."""
    with errors_said(), desk_at(folder, server, offline, passphrase_file) as desk:
        change = desk.change()
        change.delegate(family, [read_public(path) for path in keys], threshold)
        desk.finish(change, prepare)


# ---------------------------------------------------------------- status
@app.command()
def status(
    folder: Annotated[
        Path | None, typer.Option("--dir", "--keys", help="Ask this key folder, not the server.")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show for each role how many days remain, and what to run. With --dir: as this folder last saw it, with keys."""
    with errors_said():
        if folder is None:
            rows = trust_table.rows_of_server(ask(server, lambda client: client.get("/trust", TrustStatus)))
        else:
            rows = trust_table.rows_of_folder(KeyFolder(folder), now_utc())
    trust_table.show(rows, as_json=as_json)
    if folder is not None and not as_json:
        out.print(f"fingerprint of the first roots: {trust_table.fingerprint_of(KeyFolder(folder))}", soft_wrap=True)


# ---------------------------------------------------------------- errands
def _adopt(keys: KeyFolder, base: Fetched, compared: str) -> None:
    """Take the first roots from a file when a person says that they are the right ones."""
    shown = base.fingerprint()
    if compared and compared != shown:
        raise CannotSign(f"the file begins from other roots: their fingerprint is {shown}, not {compared}")
    if not compared:
        out.print(f"This key folder knows no roots yet. The file's have the fingerprint\n  {shown}", soft_wrap=True)
        typer.confirm("Did a colleague read out the same from their `keys status`?", abort=True)
    change_file.adopt_roots(keys, base)


def _keys_of_new_server(client: Client) -> OnlineKeysView:
    if client.get("/trust", TrustStatus).ready:
        raise CannotSign("the server has trust roots already; roots of other keys would not be taken")
    return _online_keys(client)


def _online_keys(client: Client) -> OnlineKeysView:
    return client.get("/trust/online-keys", OnlineKeysView)


def _make_online_keys(client: Client) -> OnlineKeysView:
    return client.post("/trust/online-keys", MakeOnlineKeys(), OnlineKeysView)


def _upload_roots(keys: KeyFolder, server: str | None) -> None:
    ask(server, lambda client: client.post("/trust/roots", keys.signed_roots(), object))
    out.print("The server has the trust roots.")


def _online_keys_in(file: Path) -> OnlineKeysView:
    try:
        return msgspec.json.decode(file.read_bytes(), type=OnlineKeysView)
    except (OSError, msgspec.DecodeError) as error:
        raise CannotSign(f"cannot read the online keys: {error}") from error
