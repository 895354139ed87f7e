"""The REST API under ``/api/v1``: what `fleet_server.api_types` describes, one handler each.

Handlers translate and delegate; they run in threads, since everything behind them is synchronous. Beyond the types'
own docstrings there are: POST ``/models/bundles/{sha256}`` (a bundle's bytes), GET ``/trust/image/metadata/{file}``
and ``/trust/director/metadata/{n}.root.json`` (signed metadata as stored, for the offline signer), POST ``/logout``.
"""

from typing import Annotated

import msgspec
from anyio import to_thread
from litestar import Request, Response, Router, get, post
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from fleet_server.api_types import (
    API,
    DeploymentView,
    DeployRequest,
    DeviceView,
    EventView,
    LoginRequest,
    ModelVersion,
    OnlineKeysView,
    Overview,
    Publication,
    RollbackRequest,
    Roots,
    SeriesPoint,
    TokenCreated,
    TokenRequest,
    TrustStatus,
)
from fleet_server.web.auth import GivenDoorkeeper, address_of, session_of
from fleet_server.web.bodies import chunks_in_thread
from fleet_server.web.metadata import director_file
from fleet_server.web.overview import overview_of, trust_of
from fleet_server.web.services import GivenParts, Parts
from protocol.names import MAX_METADATA_FILE

AnyRequest = Request[object, object, State]
METADATA_BODY = 6 * MAX_METADATA_FILE  # two roots, targets and those of families, as base64 in JSON
Span = Annotated[int, QueryParameter(ge=60, le=7 * 24 * 3600, description="seconds back from now")]
EventCount = Annotated[int, QueryParameter(ge=1, le=1000)]


# ---------------------------------------------------------------- people
@post("/login", opt={"open": True}, status_code=200, sync_to_thread=True)
def login(data: JSONBody[LoginRequest], request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[dict[str, str]]:
    """Log in; the answer sets the session cookie."""
    cookie = doorkeeper.log_in(address_of(request), data.user, data.password)
    return Response({"user": data.user}, cookies=[cookie])


@post("/logout", status_code=200, sync_to_thread=True)
def logout(request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[dict[str, str]]:
    """End the session."""
    return Response({}, cookies=[doorkeeper.log_out(session_of(request))])


# ---------------------------------------------------------------- the fleet
@get("/overview", sync_to_thread=True)
def overview(parts: GivenParts) -> Overview:
    """Say how the server and the fleet are doing."""
    return overview_of(parts, parts.queries.devices())


@get("/devices", sync_to_thread=True)
def devices(parts: GivenParts) -> tuple[DeviceView, ...]:
    """List all devices."""
    return parts.queries.devices()


@get("/devices/{device_id:str}", sync_to_thread=True)
def device(device_id: FromPath[str], parts: GivenParts) -> DeviceView:
    """Show one device."""
    return device_or_404(parts, device_id)


@get("/devices/{device_id:str}/series", sync_to_thread=True)
def series(
    device_id: FromPath[str], model: FromQuery[str], parts: GivenParts, span: Span = 3600
) -> tuple[SeriesPoint, ...]:
    """Show one model of a device over time."""
    device_or_404(parts, device_id)
    return parts.queries.series(device_id, model, span=span * 1000)


@get("/events", sync_to_thread=True)
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


@get("/models", sync_to_thread=True)
def models(parts: GivenParts) -> tuple[ModelVersion, ...]:
    """List published versions."""
    return tuple(_with_hindrance(version, parts) for version in parts.queries.model_versions())


# ---------------------------------------------------------------- orders
@post("/deployments", sync_to_thread=True)
def deploy(data: JSONBody[DeployRequest], request: AnyRequest, parts: GivenParts) -> DeploymentView:
    """Order devices to run a version."""
    return parts.rollouts.deploy(data, session_of(request).account, parts.clock())


@post("/rollbacks", sync_to_thread=True)
def rollback(data: JSONBody[RollbackRequest], request: AnyRequest, parts: GivenParts) -> DeploymentView:
    """Order devices back to an earlier version."""
    return parts.rollouts.rollback(data, session_of(request).account, parts.clock())


@post("/tokens", sync_to_thread=True)
def create_token(data: JSONBody[TokenRequest], parts: GivenParts) -> TokenCreated:
    """Make an enrolment token; it is shown only here."""
    return parts.enrolment.create_token(data, parts.clock())


# ---------------------------------------------------------------- trust and publishing
@get("/trust", sync_to_thread=True)
def trust(parts: GivenParts) -> TrustStatus:
    """Say which signed metadata is in force."""
    return trust_of(parts)


@get("/trust/online-keys", sync_to_thread=True)
def online_keys(parts: GivenParts) -> OnlineKeysView:
    """Show the public halves of the server's keys, for signing the roots offline."""
    return _online_keys(parts)


@post("/trust/online-keys", status_code=200, sync_to_thread=True)
def make_online_keys(parts: GivenParts) -> OnlineKeysView:
    """Make the server's next keys; they are used from the roots on that name them."""
    parts.publishing.make_next_keys()
    return _online_keys(parts)


@post("/trust/roots", sync_to_thread=True, request_max_body_size=METADATA_BODY)
def accept_roots(data: JSONBody[Roots], parts: GivenParts) -> TrustStatus:
    """Take the trust roots that were signed offline."""
    parts.publishing.accept_roots(data, parts.clock())
    return trust_of(parts)


@get("/trust/image/metadata/{name:str}", sync_to_thread=True)
def image_metadata(name: FromPath[str], parts: GivenParts) -> Response[bytes]:
    """Return signed metadata exactly as stored."""
    content = parts.image.metadata(name)
    if content is None:
        raise NotFoundException(f"there is no metadata {name[:80]!r}")
    return Response(content, media_type="application/json")


@get("/trust/director/metadata/{name:str}", sync_to_thread=True)
def director_metadata(name: FromPath[str], parts: GivenParts) -> Response[bytes]:
    """Return a Director root exactly as stored; the rest of that repository is per device."""
    content = director_file(name, parts.director.roots(), None)
    if content is None:
        raise NotFoundException(f"there is no metadata {name[:80]!r}")
    return Response(content, media_type="application/json")


@post("/models/publish", sync_to_thread=True, request_max_body_size=METADATA_BODY)
def publish(data: JSONBody[Publication], parts: GivenParts) -> tuple[ModelVersion, ...]:
    """Take metadata that was signed offline; return the versions that are new."""
    new = {bundle.sha256 for bundle in parts.publishing.publish(data, parts.clock())}
    return tuple(version for version in parts.queries.model_versions() if version.sha256 in new)


@post(
    "/models/bundles/{sha256:str}",
    request_max_body_size=None,  # the artifact store counts, and stops at MAX_BUNDLE
)
async def upload(sha256: FromPath[str], request: AnyRequest, parts: GivenParts) -> dict[str, int]:
    """Take a bundle's bytes; what they are is said by the metadata published later."""
    length = await to_thread.run_sync(parts.publishing.upload, chunks_in_thread(request.stream()), sha256)
    return {"length": length}


def _with_hindrance(version: ModelVersion, parts: Parts) -> ModelVersion:
    """Add what the Image repository says against a version."""
    return msgspec.structs.replace(version, hindrance=parts.image.hindrance(version.sha256))


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
        login,
        logout,
        overview,
        devices,
        device,
        series,
        events,
        models,
        deploy,
        rollback,
        create_token,
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
