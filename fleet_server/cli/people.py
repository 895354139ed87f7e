"""``edgewarden login | logout | whoami | password`` and ``edgewarden users``: who works with the fleet server."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fleet_server.api_types import PasswordRequest, UserChange, UserRequest, UserView, WhoAmI
from fleet_server.cli import output
from fleet_server.cli.release_desk import AsJson, Server
from fleet_server.cli.session import Session
from fleet_server.core.access import Role

MAX_PASSWORD_FILE = 4096  # bytes
users_app = typer.Typer(no_args_is_help=True, help="Users and their roles.")
AUser = Annotated[str, typer.Argument(metavar="NAME", help="The user's name.")]
ARole = Annotated[Role, typer.Argument(help="What the user may do; see the table of roles.")]
PasswordFile = Annotated[Path | None, typer.Option(help="Read the password from this file.")]
NewPasswordFile = Annotated[Path | None, typer.Option(help="Read the new password from this file.")]


# ---------------------------------------------------------------- oneself
def login(
    user: Annotated[
        str | None, typer.Option("--user", "-u", envvar="EDGEWARDEN_USER", help="Who you are; admin unless said.")
    ] = None,
    password_file: PasswordFile = None,
    server: Server = None,
) -> None:
    """Log in; the session is kept for later commands."""
    password = _password("Password", password_file, environment="EDGEWARDEN_PASSWORD")
    with output.talking_to(server) as session:
        session.login(password, user)
        output.out.print(f"logged in to {session.server}", markup=False, highlight=False)


def logout(
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="End all of your sessions, those of browsers among them.")
    ] = False,
    server: Server = None,
) -> None:
    """End the session."""
    with output.talking_to(server) as session:
        session.logout(everywhere=everywhere)


def whoami(server: Server = None, as_json: AsJson = False) -> None:
    """Say who you are to the server, and what you may do."""
    with output.talking_to(server) as session:
        me = session.get("/whoami", WhoAmI)
    if as_json:
        output.print_json(me)
        return
    permissions = ", ".join(permission.value for permission in me.permissions)
    output.out.print(f"{me.user}, {me.role.value}, by {me.by}; may: {permissions}", markup=False, highlight=False)


def password(
    present_file: Annotated[Path | None, typer.Option(help="Read the present password from this file.")] = None,
    new_file: NewPasswordFile = None,
    server: Server = None,
) -> None:
    """Change your own password; your other sessions end."""
    present = _password("Present password", present_file, environment="EDGEWARDEN_PASSWORD")
    new = _new_password(new_file)
    with output.talking_to(server) as session:
        session.post("/password", PasswordRequest(present=present, new=new), dict[str, str])
    output.out.print("the password is changed; your other sessions have ended")


# ---------------------------------------------------------------- users
@users_app.command("list")
def list_users(server: Server = None, as_json: AsJson = False) -> None:
    """List users."""
    with output.talking_to(server) as session:
        views = session.get("/users", tuple[UserView, ...])
    if as_json:
        output.print_json(views)
        return
    table = output.table("user", "role", "state", "since")
    for view in views:
        since = output.when(view.created_at) if view.created_at else None
        output.row(table, [view.name, view.role.value, "disabled" if view.disabled else "active", since])
    output.print_table(table)


@users_app.command("add")
def add_user(
    name: AUser,
    role: ARole,
    password_file: NewPasswordFile = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Make a user."""
    request = UserRequest(name=name, role=role, password=_new_password(password_file))
    with output.talking_to(server) as session:
        view = session.create("/users", request, UserView)
    _print(view, as_json)


@users_app.command("role")
def change_role(name: AUser, role: ARole, server: Server = None, as_json: AsJson = False) -> None:
    """Give a user another role; their sessions end, their API tokens keep what the role still allows."""
    _change(name, UserChange(role=role), server, as_json)


@users_app.command("disable")
def disable(name: AUser, server: Server = None, as_json: AsJson = False) -> None:
    """Shut a user out: sessions end, API tokens stop, until `users enable`."""
    _change(name, UserChange(disabled=True), server, as_json)


@users_app.command("enable")
def enable(name: AUser, server: Server = None, as_json: AsJson = False) -> None:
    """Let a disabled user in again."""
    _change(name, UserChange(disabled=False), server, as_json)


@users_app.command("password")
def set_password(
    name: AUser, password_file: NewPasswordFile = None, server: Server = None, as_json: AsJson = False
) -> None:
    """Give a user another password; their sessions end."""
    _change(name, UserChange(password=_new_password(password_file)), server, as_json)


@users_app.command("remove")
def remove(name: AUser, server: Server = None) -> None:
    """Remove a user with sessions and API tokens; the audit log keeps the name."""
    with output.talking_to(server) as session:
        session.delete(_path(name), revision=_look(session, name).revision)
    output.out.print(f"removed {name}", markup=False, highlight=False)


# ---------------------------------------------------------------- small parts
def _change(name: str, change: UserChange, server: str | None, as_json: bool) -> None:
    """Change a user as it is now; somebody else's change in between is an error."""
    with output.talking_to(server) as session:
        view = session.patch(_path(name), change, UserView, revision=_look(session, name).revision)
    _print(view, as_json)


def _look(session: Session, name: str) -> UserView:
    return session.get(_path(name), UserView)


def _path(name: str) -> str:
    if not name or not name.isascii() or not name.isprintable() or set(name) & set("/?#% "):
        raise typer.BadParameter(f"{name!r} is not a user name", param_hint="NAME")
    return f"/users/{name}"


def _print(view: UserView, as_json: bool) -> None:
    if as_json:
        output.print_json(view)
    else:
        state = ", disabled" if view.disabled else ""
        output.out.print(f"{view.name}: {view.role.value}{state}", markup=False, highlight=False)


def _password(what: str, file: Path | None, *, environment: str) -> str:
    if file is not None:
        return _read(file)
    return os.environ.get(environment) or str(typer.prompt(what, hide_input=True))


def _new_password(file: Path | None) -> str:
    if file is not None:
        return _read(file)
    return str(typer.prompt("New password", hide_input=True, confirmation_prompt=True))


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(MAX_PASSWORD_FILE).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {file}: {error}") from error
