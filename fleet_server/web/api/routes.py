"""The REST API under ``/api/v1``: what `fleet_server.api_types` describes, one handler each.

Handlers translate and delegate; they run in threads, since everything behind them is synchronous. Beyond the types'
own docstrings there are: POST ``/models/bundles/{sha256}`` (a bundle's bytes), GET ``/trust/image/metadata/{file}``
and ``/trust/director/metadata/{n}.root.json`` (signed metadata as stored, for the offline signer).
"""

from typing import Annotated

from anyio import to_thread
from litestar import Request, Response, Router, get, post
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from fleet_server.api_types import (
    API,
    CommandRequest,
    CommandView,
    DeploymentView,
    DeployRequest,
    DeviceView,
    EventView,
    ModelVersion,
    OnlineKeysView,
    Overview,
    Publication,
    Reopened,
    ReopenRequest,
    Revoked,
    RevokeRequest,
    RollbackRequest,
    Roots,
    SeriesPoint,
    TokenCreated,
    TokenRequest,
    TrustStatus,
)
from fleet_server.core.access import Permission
from fleet_server.web.auth import caller_of, needs, note
from fleet_server.web.bodies import chunks_in_thread
from fleet_server.web.metadata import director_file
from fleet_server.web.overview import overview_of, trust_of, versions_of
from fleet_server.web.services import GivenParts, Parts
from protocol.names import MAX_METADATA_FILE

AnyRequest = Request[object, object, State]
METADATA_BODY = 6 * MAX_METADATA_FILE  # two roots, targets and those of families, as base64 in JSON
Span = Annotated[int, QueryParameter(ge=60, le=7 * 24 * 3600, description="seconds back from now")]
EventCount = Annotated[int, QueryParameter(ge=1, le=1000)]
CommandCount = Annotated[int, QueryParameter(ge=1, le=200)]


# ---------------------------------------------------------------- the fleet
@get("/overview", opt=needs(Permission.LOOK), sync_to_thread=True)
def overview(parts: GivenParts) -> Overview:
    """Say how the server and the fleet are doing."""
    return overview_of(parts, parts.queries.devices())


@get("/devices", opt=needs(Permission.LOOK), sync_to_thread=True)
def devices(parts: GivenParts) -> tuple[DeviceView, ...]:
    """List all devices."""
    return parts.queries.devices()


@get("/devices/{device_id:str}", opt=needs(Permission.LOOK), sync_to_thread=True)
def device(device_id: FromPath[str], parts: GivenParts) -> DeviceView:
    """Show one device."""
    return device_or_404(parts, device_id)


@get("/devices/{device_id:str}/series", opt=needs(Permission.LOOK), sync_to_thread=True)
def series(
    device_id: FromPath[str], model: FromQuery[str], parts: GivenParts, span: Span = 3600
) -> tuple[SeriesPoint, ...]:
    """Show one model of a device over time."""
    device_or_404(parts, device_id)
    return parts.queries.series(device_id, model, span=span * 1000)


@get("/events", opt=needs(Permission.LOOK), sync_to_thread=True)
def events(
    parts: GivenParts,
    device: FromQuery[str | None] = None,
    after: Annotated[int | None, QueryParameter(ge=0, le=2**62)] = None,
    limit: EventCount = 50,
) -> tuple[EventView, ...]:
    """List events, newest first; with ``after`` those that came since."""
    if device is not None:
        device_or_404(parts, device)
    return parts.queries.events(device=device, after=after, limit=limit)


@get("/models", opt=needs(Permission.LOOK), sync_to_thread=True)
def models(parts: GivenParts) -> tuple[ModelVersion, ...]:
    """List published versions."""
    return versions_of(parts)


# ---------------------------------------------------------------- orders
@post("/deployments", opt=needs(Permission.ORDER, repeatable=True), sync_to_thread=True)
def deploy(data: JSONBody[DeployRequest], request: AnyRequest, parts: GivenParts) -> DeploymentView:
    """Order devices to run a version."""
    note(request, f"{data.model} version {data.version}, {_whom(data)}")
    return parts.rollouts.deploy(data, caller_of(request).account, parts.clock())


@post("/rollbacks", opt=needs(Permission.ORDER, repeatable=True), sync_to_thread=True)
def rollback(data: JSONBody[RollbackRequest], request: AnyRequest, parts: GivenParts) -> DeploymentView:
    """Order devices back to an earlier version."""
    note(request, f"{data.model} to {data.to or 'the version before'}, {_whom(data)}")
    return parts.rollouts.rollback(data, caller_of(request).account, parts.clock())


@post("/devices/{device_id:str}/revoke", opt=needs(Permission.DEVICES), status_code=200, sync_to_thread=True)
def revoke(
    device_id: FromPath[str], data: JSONBody[RevokeRequest], request: AnyRequest, parts: GivenParts
) -> Revoked:
    """Shut a device out for good, or until its id is opened again."""
    del data  # it has no fields yet
    cut = parts.membership.revoke(device_id, caller_of(request).account, parts.clock())
    return Revoked(device=device_id, cut=cut)


@post("/devices/{device_id:str}/reopen", opt=needs(Permission.DEVICES), status_code=200, sync_to_thread=True)
def reopen(
    device_id: FromPath[str], data: JSONBody[ReopenRequest], request: AnyRequest, parts: GivenParts
) -> Reopened:
    """Let an id that is taken enrol again, once."""
    until = parts.membership.reopen(device_id, data.seconds, caller_of(request).account, parts.clock())
    return Reopened(device=device_id, open_until=until)


@post("/devices/{device_id:str}/commands", opt=needs(Permission.COMMAND, repeatable=True), sync_to_thread=True)
def give_command(
    device_id: FromPath[str], data: JSONBody[CommandRequest], request: AnyRequest, parts: GivenParts
) -> CommandView:
    """Have a device do something once."""
    device_or_404(parts, device_id)
    note(request, f"{device_id}: {type(data.command).__name__}")
    return parts.commands.give(device_id, data, caller_of(request).account, parts.clock())


@get("/devices/{device_id:str}/commands", opt=needs(Permission.LOOK), sync_to_thread=True)
def list_commands(device_id: FromPath[str], parts: GivenParts, limit: CommandCount = 50) -> tuple[CommandView, ...]:
    """List the newest commands to a device, newest first, and what became of them."""
    device_or_404(parts, device_id)
    return parts.commands.of(device_id, limit, parts.clock())


@post("/tokens", opt=needs(Permission.DEVICES, repeatable=True), sync_to_thread=True)
def create_token(data: JSONBody[TokenRequest], request: AnyRequest, parts: GivenParts) -> TokenCreated:
    """Make an enrolment token; it is shown only here."""
    created = parts.enrolment.create_token(data, parts.clock())
    note(request, f"{created.token.partition('.')[0]}, for {data.uses} devices")
    return created


# ---------------------------------------------------------------- trust and publishing
@get("/trust", opt=needs(Permission.LOOK), sync_to_thread=True)
def trust(parts: GivenParts) -> TrustStatus:
    """Say which signed metadata is in force."""
    return trust_of(parts)


@get("/trust/online-keys", opt=needs(Permission.LOOK), sync_to_thread=True)
def online_keys(parts: GivenParts) -> OnlineKeysView:
    """Show the public halves of the server's keys, for signing the roots offline."""
    return _online_keys(parts)


@post("/trust/online-keys", opt=needs(Permission.TRUST), status_code=200, sync_to_thread=True)
def make_online_keys(parts: GivenParts) -> OnlineKeysView:
    """Make the server's next keys; they are used from the roots on that name them."""
    parts.publishing.make_next_keys()
    return _online_keys(parts)


@post("/trust/roots", opt=needs(Permission.TRUST), sync_to_thread=True, request_max_body_size=METADATA_BODY)
def accept_roots(data: JSONBody[Roots], parts: GivenParts) -> TrustStatus:
    """Take the trust roots that were signed offline."""
    parts.publishing.accept_roots(data, parts.clock())
    return trust_of(parts)


@get("/trust/image/metadata/{name:str}", opt=needs(Permission.LOOK), sync_to_thread=True)
def image_metadata(name: FromPath[str], parts: GivenParts) -> Response[bytes]:
    """Return signed metadata exactly as stored."""
    content = parts.image.metadata(name)
    if content is None:
        raise NotFoundException(f"there is no metadata {name[:80]!r}")
    return Response(content, media_type="application/json")


@get("/trust/director/metadata/{name:str}", opt=needs(Permission.LOOK), sync_to_thread=True)
def director_metadata(name: FromPath[str], parts: GivenParts) -> Response[bytes]:
    """Return a Director root exactly as stored; the rest of that repository is per device."""
    content = director_file(name, parts.director.roots(), None)
    if content is None:
        raise NotFoundException(f"there is no metadata {name[:80]!r}")
    return Response(content, media_type="application/json")


@post("/models/publish", opt=needs(Permission.PUBLISH), sync_to_thread=True, request_max_body_size=METADATA_BODY)
def publish(data: JSONBody[Publication], parts: GivenParts) -> tuple[ModelVersion, ...]:
    """Take metadata that was signed offline; return the versions that are new."""
    new = {bundle.sha256 for bundle in parts.publishing.publish(data, parts.clock())}
    return tuple(version for version in parts.queries.model_versions() if version.sha256 in new)


@post(
    "/models/bundles/{sha256:str}",
    opt=needs(Permission.PUBLISH),
    request_max_body_size=None,  # the artifact store counts, and stops at MAX_BUNDLE
)
async def upload(sha256: FromPath[str], request: AnyRequest, parts: GivenParts) -> dict[str, int]:
    """Take a bundle's bytes; what they are is said by the metadata published later."""
    length = await to_thread.run_sync(parts.publishing.upload, chunks_in_thread(request.stream()), sha256)
    return {"length": length}


def _whom(order: DeployRequest | RollbackRequest) -> str:
    return "all devices" if order.all else f"devices {', '.join(order.devices) or 'none'}"


def _online_keys(parts: Parts) -> OnlineKeysView:
    return OnlineKeysView(
        director={role: key.decode() for role, key in parts.director.online_keys().items()},
        image={role: key.decode() for role, key in parts.image.online_keys().items()},
    )


def device_or_404(parts: GivenParts, device_id: str) -> DeviceView:
    """Return a device, or answer that there is none."""
    view = parts.queries.device(device_id)
    if view is None:
        raise NotFoundException(f"there is no device {device_id[:80]!r}")
    return view


router = Router(
    API,
    route_handlers=[
        overview,
        devices,
        device,
        series,
        events,
        models,
        deploy,
        rollback,
        give_command,
        list_commands,
        create_token,
        revoke,
        reopen,
        trust,
        online_keys,
        make_online_keys,
        accept_roots,
        image_metadata,
        director_metadata,
        publish,
        upload,
    ],
)
