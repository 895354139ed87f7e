"""How commands speak: tables for people, JSON for programs, errors on stderr with the right exit code."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime, timezone

import msgspec
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fleet_server.cli.session import ApiError, NotLoggedIn, Session
from protocol.metrics import Proportion
from protocol.states import DeploymentState, PresenceState

out, err = Console(), Console(stderr=True)
FAILED, NOT_FOUND = 1, 1
_NO_LIMIT = 100_000  # columns
_TONES = {
    PresenceState.ONLINE: "green",
    PresenceState.STALE: "yellow",
    PresenceState.LOST: "red",
    PresenceState.REVOKED: "red",
    DeploymentState.COMMITTED: "green",
    DeploymentState.FAILED: "red",
    DeploymentState.REJECTED: "red",
    DeploymentState.ROLLED_BACK: "red",
    DeploymentState.ROLLING_BACK: "yellow",
    DeploymentState.PROBATION: "cyan",
}


@contextmanager
def talking_to(server: str | None) -> Iterator[Session]:
    """Give a session, say what goes wrong on stderr, and end with the error's exit code."""
    try:
        with closing(Session(server)) as session:
            yield session
    except ApiError as error:
        say_error(str(error))
        if isinstance(error, NotLoggedIn):
            err.print("Log in with: edgewarden login", markup=False)
        raise typer.Exit(error.exit_code) from error


def say_error(text: str) -> None:
    """Write an error for people, as it is."""
    err.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Write a value as one line of JSON."""
    typer.echo(msgspec.json.encode(value).decode())


def table(*columns: str) -> Table:
    """Return an empty table in the house style."""
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def row(table_: Table, cells: Sequence[str | Text | None]) -> None:
    """Add a row; text from devices is never read as markup."""
    table_.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell or "–")) for cell in cells))


def print_table(table_: Table, *, wide: bool = False) -> None:
    """Write a table; a wide one in full, whatever the width of the terminal."""
    console = out
    if wide:
        unlimited = out.options.update(max_width=_NO_LIMIT)
        console = Console(width=Measurement.get(out, unlimited, table_).maximum)
    console.print(table_)


def clean(text: str) -> str:
    r"""Return text without control characters: what a device says must not steer the terminal.

    >>> clean("a\x1b[31mb")
    'a\ufffd[31mb'
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def state(value: PresenceState | DeploymentState) -> Text:
    """Return a state in words and colour."""
    return Text(value.value, style=_TONES.get(value, ""))


def accuracy(proportion: Proportion | None) -> str:
    """Return a share with what it rests on."""
    if proportion is None or proportion.value is None or proportion.low is None or proportion.high is None:
        return "n/a"
    low, high = 100 * proportion.low, 100 * proportion.high
    return f"{100 * proportion.value:.1f} % ({low:.1f} to {high:.1f}, n={proportion.n})"


def milliseconds(microseconds: float | None) -> str:
    """Return a latency in ms."""
    return "n/a" if microseconds is None else f"{microseconds / 1000:.2f}"


def when(at: int | None) -> str:
    """Return a time in UTC."""
    if at is None:
        return "never"
    return datetime.fromtimestamp(min(at, 253_402_300_799_000) / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
