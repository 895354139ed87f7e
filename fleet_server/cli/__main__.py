"""``edgewarden``: the operators' command line, a client of the REST API."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import protocol
from fleet_server.api_types import DeviceView, EventView, ModelVersion, Overview, TokenCreated, TokenRequest
from fleet_server.cli import api_tokens, audit, commands, devices, keys, listing, orders, output, people, publish
from fleet_server.cli.listing import Wide
from fleet_server.cli.release_desk import AsJson, Server
from fleet_server.cli.secret_file import write_secret
from protocol.states import PresenceState

FOLLOW_EVERY = 1.0  # seconds
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not logged in, 4 the server cannot be reached."
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Looks after a fleet of edge devices.",
    epilog=EXIT_CODES,
)
ADevice = Annotated[str, typer.Argument(help="The device's id.")]
devices_app = typer.Typer(no_args_is_help=True, help="Devices.")
models_app = typer.Typer(no_args_is_help=True, help="Published models.")
tokens_app = typer.Typer(no_args_is_help=True, help="Enrolment tokens.")
app.add_typer(devices_app, name="devices")
app.add_typer(models_app, name="models")
app.add_typer(tokens_app, name="tokens")
app.add_typer(keys.app, name="keys")
app.add_typer(people.users_app, name="users")
app.add_typer(api_tokens.app, name="api-tokens")
app.add_typer(audit.app, name="audit")
for own in (people.login, people.logout, people.whoami, people.password):
    app.command()(own)
devices_app.command()(devices.revoke)
devices_app.command()(devices.reopen)
app.command()(orders.deploy)
app.command()(orders.rollback)
app.command()(commands.command)
app.command()(commands.commands)
models_app.command()(publish.publish)
models_app.command()(publish.yank)
models_app.command()(publish.floor)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"edgewarden {protocol.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Look after a fleet of edge devices."""


# ---------------------------------------------------------------- the fleet
@app.command()
def status(server: Server = None, as_json: AsJson = False) -> None:
    """Say how the server and the fleet are doing."""
    with output.talking_to(server) as session:
        overview = session.get("/overview", Overview)
    if as_json:
        output.print_json(overview)
        return
    table = output.table("", "")
    devices = ", ".join(f"{n} {state}" for state, n in sorted(overview.devices.items())) or "none enrolled"
    output.row(table, ["server", f"Edgewarden {overview.version}"])
    output.row(table, ["trust", "ready" if overview.trust_ready else "missing: run edgewarden keys init"])
    for warning in overview.trust_warnings:
        output.row(table, ["", warning])
    output.row(table, ["broker", "up" if overview.broker_up else "down"])
    output.row(table, ["devices", devices])
    output.row(table, ["reports stored", str(overview.reports)])
    output.row(table, ["unreadable messages", str(overview.dead_letters)])
    table.show_header = False
    output.out.print(table)


@devices_app.command("list")
def list_devices(
    presence: Annotated[PresenceState | None, typer.Option(help="Only devices in this state.")] = None,
    wide: Wide = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List devices with what they run."""
    with output.talking_to(server) as session:
        views = session.get("/devices", tuple[DeviceView, ...])
    views = tuple(view for view in views if presence in (None, view.presence))
    if as_json:
        output.print_json(views)
    elif views:
        listing.print_devices(views, wide=wide)
    else:
        output.out.print("no devices")


@devices_app.command("show")
def show_device(device: ADevice, server: Server = None, as_json: AsJson = False) -> None:
    """Show one device."""
    with output.talking_to(server) as session:
        view = session.get(f"/devices/{device}", DeviceView)
    if as_json:
        output.print_json(view)
        return
    table = output.table("", "")
    table.show_header = False
    labels = ", ".join(f"{name}={value}" for name, value in sorted(view.labels.items()))
    for name, value in (
        ("device", view.id),
        ("presence", view.presence.value),
        ("last seen", output.when(view.last_seen)),
        ("labels", labels),
        ("agent", view.agent),
        ("class", view.device_class),
        ("desired state", f"{view.director_version_wanted} (accepted at birth: {view.director_version_accepted})"),
        ("certificate until", output.when(view.certificate_expires) if view.certificate_expires else None),
        ("open for enrolment until", output.when(view.open_until) if view.open_until else None),
        ("reports", f"{view.reports} stored, {view.missing} missing"),
        *sorted(view.facts.items()),
    ):
        output.row(table, [name, value])
    output.out.print(table)
    if view.models:
        listing.print_models_of(view)
        listing.print_sentences_of(view)


@app.command()
def events(
    device: Annotated[str | None, typer.Option("--device", "-d", help="Only of this device.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many of the newest.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what happens.")] = False,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """List what happened on devices, oldest first."""
    which = f"&device={device}" if device else ""
    with output.talking_to(server) as session:
        newest = session.get(f"/events?limit={limit}{which}", tuple[EventView, ...])
        _print_events(newest, as_json)
        last = max((event.row for event in newest), default=0)
        while follow:
            time.sleep(FOLLOW_EVERY)
            newer = session.get(f"/events?limit=1000&after={last}{which}", tuple[EventView, ...])
            _print_events(newer, as_json)
            last = max((event.row for event in newer), default=last)


@models_app.command("list")
def list_models(wide: Wide = False, server: Server = None, as_json: AsJson = False) -> None:
    """List published versions and how well they do."""
    with output.talking_to(server) as session:
        versions = session.get("/models", tuple[ModelVersion, ...])
    if as_json:
        output.print_json(versions)
    elif versions:
        listing.print_versions(versions, wide=wide)
    else:
        output.out.print("no models are published")


@tokens_app.command("create")
def create_token(
    *,
    uses: Annotated[int, typer.Option(min=1, help="How many devices may enrol with it.")] = 1,
    life: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = 3600,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the devices; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file (mode 0600).")] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Make an enrolment token. It is shown only now."""
    request = TokenRequest(uses=uses, life_seconds=life, labels=_labels(label or ()))
    with output.talking_to(server) as session:
        created = session.create("/tokens", request, TokenCreated)
    if file is not None:
        write_secret(file, created.token)
    if as_json:
        output.print_json(created)
    elif file is None:
        typer.echo(created.token)
    else:
        output.out.print(f"wrote {file}; it is valid until {output.when(created.expires_at)}")


def main() -> None:
    """Run the command line."""
    app()


# ---------------------------------------------------------------- small parts
def _print_events(newest_first: Sequence[EventView], as_json: bool) -> None:
    for event in reversed(newest_first):
        if as_json:
            output.print_json(event)
            continue
        model = f"{event.model} v{event.version}" if event.version is not None else event.model or ""
        state = " ".join(word.value for word in (event.state, event.reason) if word)
        parts = (output.when(event.received_at), event.device, event.kind.value, model, state, event.detail)
        output.out.print(
            "  ".join(output.clean(part) for part in parts if part), markup=False, highlight=False, soft_wrap=True
        )


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--label")
        labels[name] = value
    return labels


if __name__ == "__main__":
    main()
