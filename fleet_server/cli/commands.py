"""``edgewarden command`` and ``commands``: has a device do something once, and shows what became of it."""

import time
from enum import Enum
from typing import Annotated

import typer

from fleet_server.api_types import CommandRequest, CommandView
from fleet_server.cli import output
from fleet_server.cli.release_desk import AsJson, Server
from fleet_server.cli.session import Session
from protocol.commands import Deed, RenewCertificateCommand, RestartDataPlaneCommand, SelfTestCommand
from protocol.names import MODEL_NAME
from protocol.states import CommandState

POLL = 0.5  # seconds
ADevice = Annotated[str, typer.Argument(help="The device's id.")]


class What(str, Enum):
    """What a device can be asked to do."""

    SELF_TEST = "self-test"
    RESTART_DATA_PLANE = "restart-data-plane"
    RENEW_CERTIFICATE = "renew-certificate"


def command(
    device: ADevice,
    what: Annotated[
        What,
        typer.Argument(
            help="`self-test`: run a model's golden samples where it serves. "
            "`restart-data-plane`: replace the inference process; no request is lost. "
            "`renew-certificate`: a new key and certificate, now."
        ),
    ],
    model: Annotated[str | None, typer.Argument(help="The model's name, for `self-test`.")] = None,
    *,
    life: Annotated[
        int, typer.Option(min=5, max=86400, help="Seconds after which it is not to be done any more.")
    ] = 600,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the device's answer.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Have a device do something once. The command is signed, and carried out at most once."""
    request = CommandRequest(command=_deed(what, model), life_seconds=life)
    with output.talking_to(server) as session:
        given = session.post(f"/devices/{device}/commands", request, CommandView)
        if wait:
            given = _wait(session, given)
    if as_json:
        output.print_json(given)
    else:
        _say(given)
    if given.state not in (CommandState.WAITING, CommandState.DONE):
        raise typer.Exit(output.FAILED)


def commands(
    device: ADevice,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many of the newest.")] = 20,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List what a device was asked to do, newest first, and what became of it."""
    with output.talking_to(server) as session:
        given = session.get(f"/devices/{device}/commands?limit={limit}", tuple[CommandView, ...])
    if as_json:
        output.print_json(given)
        return
    if not given:
        output.out.print("nothing was asked of this device", markup=False, highlight=False)
        return
    for one in given:
        reason = one.reason.value if one.reason else ""
        state = f"{one.state.value} {reason}".rstrip()
        parts = (output.when(one.issued_at), one.command, state, one.detail, f"(by {one.by}, {one.id})")
        text = "  ".join(output.clean(part) for part in parts if part)
        output.out.print(text, markup=False, highlight=False, soft_wrap=True)


def _deed(what: What, model: str | None) -> Deed:
    if what is not What.SELF_TEST:
        if model is not None:
            raise typer.BadParameter(f"{what.value} takes no model", param_hint="MODEL")
        return RestartDataPlaneCommand() if what is What.RESTART_DATA_PLANE else RenewCertificateCommand()
    if model is None or not MODEL_NAME.fullmatch(model):
        raise typer.BadParameter("name the model to be tested", param_hint="MODEL")
    return SelfTestCommand(model=model)


def _wait(session: Session, given: CommandView) -> CommandView:
    """Look until it is answered or its time is over, by the server's clock."""
    while given.state is CommandState.WAITING:
        time.sleep(POLL)
        listed = session.get(f"/devices/{given.device}/commands?limit=200", tuple[CommandView, ...])
        given = next((one for one in listed if one.id == given.id), given)
    return given


def _say(given: CommandView) -> None:
    reason = f" ({given.reason.value})" if given.reason else ""
    text = f"{given.command} on {given.device}: {given.state.value}{reason}"
    said = given.detail or ("" if given.state is not CommandState.WAITING else f"sent as {given.id}")
    output.out.print(output.clean(f"{text}: {said}" if said else text), markup=False, highlight=False, soft_wrap=True)
