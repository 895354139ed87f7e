"""``edgewarden audit``: reads the server's audit log, and verifies its chain here, by what the server sends.

Where the chain ended is remembered on this machine. So a later ``verify`` also sees what the chain alone cannot show:
that its end was cut off, or that all of it was made anew.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlencode

import msgspec
import typer

from fleet_server.api_types import AuditEntry, AuditPage
from fleet_server.cli import output
from fleet_server.cli.release_desk import AsJson, Server
from fleet_server.cli.session import Session, default_cookie_file
from fleet_server.core.audit import Act, Broken, Entry, Head, check

PAGE = 1000
MAX_HEADS = 1024 * 1024  # bytes
app = typer.Typer(invoke_without_command=True, help="The audit log: who did what, in a chain that shows changes.")
Count = Annotated[int, typer.Option(min=1, help="How many of the newest.")]
Who = Annotated[str | None, typer.Option(help="Only acts of this user.")]
Action = Annotated[str | None, typer.Option(help="Only this action, such as deploy or login.")]


class KnownHead(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server's chain ended when it was last verified from here."""

    sequence: int
    digest: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What ``verify --json`` prints."""

    holds: bool
    entries: int
    digest: str
    broken_at: int | None = None
    why: str = ""


@app.callback()
def audit(context: typer.Context, server: Server = None) -> None:
    """List the newest entries, unless told otherwise."""
    if context.invoked_subcommand is None:
        list_entries(server=server)


@app.command("list")
def list_entries(
    *,
    limit: Count = 50,
    who: Who = None,
    action: Action = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List entries, oldest first."""
    with output.talking_to(server) as session:
        entries = list(_newest(session, limit, who=who, action=action))
    for entry in reversed(entries):
        if as_json:
            output.print_json(entry)
        else:
            output.out.print(_line(entry), markup=False, highlight=False, soft_wrap=True)


@app.command("verify")
def verify(
    head: Annotated[
        str | None, typer.Option(metavar="N:DIGEST", help="Where the log ended once, as verify printed it then.")
    ] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Verify the whole chain; print the first broken link."""
    with output.talking_to(server) as session:
        heads = HeadFile(default_cookie_file().with_name("audit.json"))
        known = _parse(head) if head is not None else heads.load(session.server)
        try:
            end = check(_all(session), known=known)
        except Broken as error:
            _say_broken(error, as_json)
            raise typer.Exit(output.FAILED) from error
        heads.save(session.server, end)
    if as_json:
        output.print_json(Verdict(holds=True, entries=end.sequence, digest=end.digest))
        return
    since = f", and goes on from entry {known.sequence}, where it ended before" if known else ""
    output.out.print(f"the chain of {end.sequence} entries holds{since}", highlight=False)
    output.out.print(f"it ends with {end.sequence}:{end.digest}", highlight=False, soft_wrap=True)


class HeadFile:
    """Ends of chains by server address, in a file beside the session's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, server: str) -> Head | None:
        """Return where a server's chain ended when it was last verified from here."""
        head = self._all().get(server)
        return None if head is None else Head(sequence=head.sequence, digest=head.digest)

    def save(self, server: str, head: Head) -> None:
        """Store it; the file is replaced in one step."""
        heads = {**self._all(), server: KnownHead(sequence=head.sequence, digest=head.digest)}
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=self._path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(heads))
        Path(name).replace(self._path)

    def _all(self) -> dict[str, KnownHead]:
        """Return what is remembered. A file that cannot be read must not pass for a first time."""
        try:
            with self._path.open("rb") as file:
                return msgspec.json.decode(file.read(MAX_HEADS), type=dict[str, KnownHead])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as error:
            output.say_error(f"cannot read {self._path}, where earlier ends of the chain are kept: {error}")
            raise typer.Exit(output.FAILED) from error


# ---------------------------------------------------------------- pages
def _newest(session: Session, limit: int, *, who: str | None, action: str | None) -> Iterator[AuditEntry]:
    before: int | None = None
    while limit > 0:
        asked = {"limit": min(limit, PAGE), "before": before, "who": who, "action": action}
        page = session.get(f"/audit?{_query(asked)}", AuditPage)
        yield from page.entries
        limit, before = limit - len(page.entries), page.next
        if before is None:
            return


def _all(session: Session) -> Iterator[Entry]:
    """Return the whole chain, page by page."""
    after: int | None = 0
    while after is not None:
        page = session.get(f"/audit?{_query({'after': after, 'limit': PAGE})}", AuditPage)
        yield from (_entry(view) for view in page.entries)
        after = page.next


def _query(asked: Mapping[str, object]) -> str:
    return urlencode({name: value for name, value in asked.items() if value is not None})


def _entry(view: AuditEntry) -> Entry:
    act = Act(
        at=view.at,
        who=view.who,
        by=view.by,
        address=view.address,
        action=view.action,
        about=view.about,
        result=view.result,
        detail=view.detail,
    )
    return Entry(sequence=view.sequence, act=act, previous=view.previous, digest=view.digest)


# ---------------------------------------------------------------- words
def _line(entry: AuditEntry) -> str:
    who = f"{entry.who or 'somebody'} ({entry.by})" if entry.by else entry.who or "somebody"
    said = [str(entry.sequence), output.when(entry.at), who, entry.address, entry.action, entry.about]
    said += [entry.result.value, entry.detail]
    return "  ".join(output.clean(part) for part in said if part)


def _parse(text: str) -> Head:
    sequence, colon, digest = text.partition(":")
    if not colon or not sequence.isascii() or not sequence.isdigit():
        raise typer.BadParameter(f"{text!r} is not N:DIGEST", param_hint="--head")
    return Head(sequence=int(sequence), digest=digest)


def _say_broken(error: Broken, as_json: bool) -> None:
    if as_json:
        output.print_json(Verdict(holds=False, entries=0, digest="", broken_at=error.sequence, why=str(error)))
    else:
        output.say_error(f"the chain is broken at {error}")
