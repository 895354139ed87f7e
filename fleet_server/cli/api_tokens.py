"""``edgewarden api-tokens``: keys for programs, which act in one's own name (enrolment tokens are ``tokens``)."""

import time
from pathlib import Path
from typing import Annotated

import typer

from fleet_server.api_types import ApiTokenCreated, ApiTokenRequest, ApiTokenView
from fleet_server.cli import output
from fleet_server.cli.release_desk import AsJson, Server
from fleet_server.cli.secret_file import write_secret
from fleet_server.core.access import Permission

app = typer.Typer(no_args_is_help=True, help="API tokens: keys for programs. See tokens for devices.")


@app.command("list")
def list_tokens(
    everybody: Annotated[bool, typer.Option("--everybody", help="Those of all users, if you may see them.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List API tokens, your own unless said."""
    with output.talking_to(server) as session:
        views = session.get(f"/api-tokens?everybody={str(everybody).lower()}", tuple[ApiTokenView, ...])
    if as_json:
        output.print_json(views)
    elif views:
        _print(views)
    else:
        output.out.print("no API tokens")


@app.command("create")
def create_token(
    *,
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[
        list[Permission], typer.Option("--scope", "-s", help="What it may do, of what you may; may be repeated.")
    ],
    days: Annotated[int, typer.Option(min=1, max=366, help="Days until it expires.")] = 90,
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file (mode 0600).")] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Make an API token. It is shown only now; programs find it in EDGEWARDEN_TOKEN."""
    request = ApiTokenRequest(name=name, scopes=tuple(scope), life_days=days)
    with output.talking_to(server) as session:
        created = session.create("/api-tokens", request, ApiTokenCreated)
    if file is not None:
        write_secret(file, created.token)
    if as_json:
        output.print_json(created)
    elif file is None:
        typer.echo(created.token)
    else:
        output.out.print(f"wrote {file}; it is valid until {output.when(created.expires_at)}")


@app.command("revoke")
def revoke_token(
    token: Annotated[str, typer.Argument(help="Its id, as `api-tokens list` shows it.")], server: Server = None
) -> None:
    """Revoke an API token, at once and for good."""
    if not token.isascii() or not token.isalnum():
        raise typer.BadParameter(f"{token!r} is not the id of an API token", param_hint="TOKEN")
    with output.talking_to(server) as session:
        session.delete(f"/api-tokens/{token}")
    output.out.print(f"revoked {token}", markup=False, highlight=False)


def _print(views: tuple[ApiTokenView, ...]) -> None:
    now = time.time_ns() // 1_000_000
    table = output.table("id", "user", "name", "scopes", "state", "last used")
    for view in views:
        scopes = ", ".join(scope.value for scope in view.scopes)
        output.row(table, [view.id, view.user, view.name, scopes, _state(view, now), output.when(view.last_used_at)])
    output.print_table(table)


def _state(view: ApiTokenView, now: int) -> str:
    if view.revoked_at is not None:
        return f"revoked {output.when(view.revoked_at)}"
    return ("until " if view.expires_at > now else "expired ") + output.when(view.expires_at)
