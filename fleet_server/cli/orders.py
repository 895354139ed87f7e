"""``edgewarden deploy`` and ``rollback``: gives an order, and with ``--watch`` follows it to its end."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from fleet_server.api_types import (
    DeploymentView,
    DeployRequest,
    DeviceView,
    EventView,
    ModelOnDevice,
    RollbackRequest,
)
from fleet_server.cli import output, terms
from fleet_server.cli.release_desk import AsJson, Server
from fleet_server.cli.session import Session
from protocol.states import DeploymentState, EventKind

POLL = 1.0  # seconds
SUCCEEDED = frozenset({DeploymentState.COMMITTED})
ENDED_BADLY = frozenset(
    {
        DeploymentState.FAILED,
        DeploymentState.REJECTED,
        DeploymentState.ROLLED_BACK,
        DeploymentState.SUPERSEDED,
    }
)
Model = Annotated[str, typer.Argument(help="The model's name.")]
Everybody = Annotated[bool, typer.Option("--all", help="All devices.")]
Devices = Annotated[list[str] | None, typer.Option("--device", "-d", help="A device; may be repeated.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow it until it has ended on every device.")]
Timeout = Annotated[int, typer.Option(help="Seconds to watch at most; then the exit code is 1.")]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How an order stands on one device."""

    device: str
    target: int
    state: DeploymentState
    running: int | None
    reason: str
    online: str

    @property
    def done(self) -> bool:
        """Whether the device serves the target for good."""
        return self.state in SUCCEEDED and self.running == self.target

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.done or self.state in ENDED_BADLY


def deploy(
    model: Model,
    version: Annotated[int, typer.Argument(min=1, help="The version that devices shall run.")],
    *,
    everybody: Everybody = False,
    device: Devices = None,
    variant: Annotated[str | None, typer.Option(help="This variant; otherwise the first that fits.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Do not wait for a hold or the maintenance hours of a device.")
    ] = False,
    shadow: terms.Share = None,
    shadow_requests: terms.Requests = None,
    shadow_for: terms.Span = None,
    agreement: terms.Agreement = None,
    watch: Watch = False,
    timeout: Timeout = 3600,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Order devices to run a version of a model."""
    _check_choice(everybody, device)
    request = DeployRequest(
        model=model,
        version=version,
        variant=variant,
        devices=tuple(device or ()),
        all=everybody,
        force=force,
        shadow=terms.shadow_terms(shadow, requests=shadow_requests, seconds=shadow_for, agreement=agreement),
    )
    with output.talking_to(server) as session:
        _give(session, lambda: session.post("/deployments", request, DeploymentView), _Wish(watch, timeout, as_json))


def rollback(
    model: Model,
    *,
    everybody: Everybody = False,
    device: Devices = None,
    to: Annotated[int | None, typer.Option(min=1, help="This version; otherwise the one committed before.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Let a hold and the maintenance hours of a device bind it.")
    ] = False,
    watch: Watch = False,
    timeout: Timeout = 3600,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Order devices back to an earlier version of a model."""
    _check_choice(everybody, device)
    request = RollbackRequest(model=model, to=to, devices=tuple(device or ()), all=everybody, force=not wait)
    with output.talking_to(server) as session:
        _give(session, lambda: session.post("/rollbacks", request, DeploymentView), _Wish(watch, timeout, as_json))


def _check_choice(everybody: bool, devices: Sequence[str] | None) -> None:
    if everybody == bool(devices):
        raise typer.BadParameter("say --all, or --device once or more; not both, not neither")


@dataclass(frozen=True)
class _Wish:
    watch: bool
    timeout: int
    as_json: bool


def _give(session: Session, order: Callable[[], DeploymentView], wish: _Wish) -> None:
    """Give the order, follow it if wished, say what came of it, and end with the right exit code."""
    newest = session.get("/events?limit=1", tuple[EventView, ...])
    given = order()
    if not wish.as_json:
        _print_order(given)
    progress: Sequence[Progress] = ()
    if wish.watch and given.targets:
        watcher = Watcher(session=session, order=given, after=newest[0].row if newest else 0)
        progress = _watch(watcher, wish.timeout, quiet=wish.as_json)
    if wish.as_json:
        output.print_json({"order": given, "progress": progress} if wish.watch else given)
    failed = [one for one in progress if not one.done]
    for one in failed:
        output.say_error(
            f"{one.device}: {one.state.value if one.over else 'not finished in time'} {one.reason}".rstrip()
        )
    if failed or not given.targets:
        raise typer.Exit(output.FAILED)


def _print_order(given: DeploymentView) -> None:
    versions = sorted(set(given.targets.values()))
    what = ", ".join(f"version {version}" for version in versions) or "nothing"
    output.out.print(f"{given.kind} {given.model}: {what} on {len(given.targets)} devices (order {given.id})")
    for device, reason in sorted(given.skipped.items()):
        output.out.print(f"  skipped {device}: {reason}", markup=False, highlight=False)


def _watch(watcher: "Watcher", timeout: int, *, quiet: bool) -> Sequence[Progress]:
    """Show progress until every device is through, or the time is over; return how it stands then."""
    until = time.monotonic() + timeout
    with _live(shown=not quiet) as live:
        while True:
            progress = watcher.look()
            if not quiet:
                live.update(_table(progress), refresh=True)
            if all(one.over for one in progress) or time.monotonic() > until:
                return progress
            time.sleep(POLL)


@contextmanager
def _live(*, shown: bool) -> Iterator[Live]:
    """Give a place that is drawn over on a terminal; elsewhere its last state is written, as whole lines."""
    with Live(console=output.out, auto_refresh=False) as live:
        yield live
    if shown and not output.out.is_terminal:
        output.out.line()


@dataclass(kw_only=True)
class Watcher:
    """Follows one order by the events that come after row ``after``, and by what devices run."""

    session: Session
    order: DeploymentView
    after: int
    steps: dict[str, EventView] = field(default_factory=dict)

    def look(self) -> Sequence[Progress]:
        """Return how the order stands on each device."""
        newer = self.session.get(f"/events?after={self.after}&limit=1000", tuple[EventView, ...])
        for event in reversed(newer):  # they come newest first
            self.after = max(self.after, event.row)
            if self._is_about_us(event):
                self.steps[event.device] = event
        views = {view.id: view for view in self.session.get("/devices", tuple[DeviceView, ...])}
        return [
            _progress(views[device], self.order.model, target, self.steps.get(device))
            for device, target in sorted(self.order.targets.items())
            if device in views
        ]

    def _is_about_us(self, event: EventView) -> bool:
        """Leave out the end of what this order replaces."""
        is_step = event.kind is EventKind.DEPLOYMENT and event.state is not None and event.model == self.order.model
        return is_step and event.version in (None, self.order.targets.get(event.device))


def _progress(view: DeviceView, model: str, target: int, step: EventView | None) -> Progress:
    """Judge by the newest step; without one the device may have been there already, or has not heard of it."""
    now = next((m for m in view.models if m.model == model), None)
    state = _state_without_step(now, target) if step is None or step.state is None else step.state
    if state is DeploymentState.SUPERSEDED and now is not None and now.wanted_version == target:
        state = DeploymentState.IDLE  # by the same on other terms: it starts over
    return Progress(
        device=view.id,
        target=target,
        state=state,
        running=now.running_version if now else None,
        reason=step.reason.value if step and step.reason else "",
        online=view.presence.value,
    )


def _state_without_step(now: ModelOnDevice | None, target: int) -> DeploymentState:
    if now is not None and now.running_version == target and now.state in SUCCEEDED:
        return DeploymentState.COMMITTED
    return DeploymentState.IDLE


def _table(progress: Sequence[Progress]) -> Table:
    table = output.table("device", "presence", "wanted", "running", "state", "reason")
    for one in progress:
        running = f"v{one.running}" if one.running is not None else None
        output.row(table, [one.device, one.online, f"v{one.target}", running, output.state(one.state), one.reason])
    return table
