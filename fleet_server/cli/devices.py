"""``edgewarden devices revoke`` and ``reopen``: shuts a device out, or lets its id enrol again."""

import re
from typing import Annotated

import typer

from fleet_server.api_types import Reopened, ReopenRequest, Revoked, RevokeRequest
from fleet_server.cli import output
from fleet_server.cli.release_desk import AsJson, Server

_DURATION = re.compile(r"([0-9]{1,7})([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
ADevice = Annotated[str, typer.Argument(help="The device's id.")]


def revoke(
    device: ADevice,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Shut a device out: cut its connection, refuse it everywhere. Its models keep serving on it."""
    if not yes:
        typer.confirm(f"Shut {device} out? It comes back only by a new enrolment.", abort=True, err=True)
    with output.talking_to(server) as session:
        answer = session.post(f"/devices/{device}/revoke", RevokeRequest(), Revoked)
    if as_json:
        output.print_json(answer)
    elif answer.cut:
        output.out.print(f"{device} is revoked and cut off", markup=False, highlight=False)
    else:
        text = f"{device} is revoked; the broker cannot be reached now and cuts it off as soon as it can"
        output.out.print(text, markup=False, highlight=False)


def reopen(
    device: ADevice,
    life: Annotated[str, typer.Option("--for", help="How long, such as 30m, 1h or 2d.")] = "1h",
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Let an id that is taken enrol again, once, with a new key: after a loss, a repair or a revocation."""
    with output.talking_to(server) as session:
        answer = session.post(f"/devices/{device}/reopen", ReopenRequest(seconds=_seconds(life)), Reopened)
    if as_json:
        output.print_json(answer)
    else:
        until = output.when(answer.open_until)
        text = f"{device} may enrol again until {until}, with a token and: edgewarden-agent enroll --force"
        output.out.print(text, markup=False, highlight=False, soft_wrap=True)


def _seconds(text: str) -> int:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time like 30m, 1h or 2d", param_hint="--for")
    return int(match[1]) * _SECONDS[match[2]]
