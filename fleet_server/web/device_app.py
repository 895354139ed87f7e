"""The HTTPS port for devices (`protocol.device_api`): enrolment, renewal, signed metadata, bundles.

Every request but ``ca`` and ``enroll`` carries a short-lived token signed with the device's key; it is checked
against the certificates that the registry holds, so a revoked or replaced certificate ends here. The first request
that the key of the next certificate has signed puts that one in force; a certificate that has expired opens renewal
and nothing else.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

import jwt
import msgspec
from cryptography import x509
from litestar import Litestar, Request, Response, get, post
from litestar.concurrency import sync_to_thread
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import NotAuthorizedException, NotFoundException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, JSONBody
from litestar.response import Stream
from litestar.types import ControllerRouterHandler

from fleet_server.membership import Membership
from fleet_server.ports import Device
from fleet_server.web.bodies import send_file
from fleet_server.web.headers import with_security_headers
from fleet_server.web.metadata import director_file
from fleet_server.web.problems import CarefulRequest, handlers, problem_of, refuse_nul
from fleet_server.web.services import GivenParts, Parts
from protocol.device_api import (
    AUDIENCE,
    BUNDLES_PATH,
    CA_PATH,
    DIRECTOR_METADATA_PATH,
    ENROL_PATH,
    IMAGE_METADATA_PATH,
    JWT_ALGORITHM,
    MAX_TOKEN_LIFE,
    RENEW_PATH,
    DeviceApiError,
    EnrolRequest,
    EnrolResponse,
    RenewRequest,
    RenewResponse,
    Standing,
)
from protocol.names import DEVICE_ID, MAX_DEVICE_REQUEST

MAX_TOKEN = 4096  # characters of an Authorization header
CLOCK_SLACK = 60  # seconds a device's clock may be off
_NOT_THE_KEY = "it is not signed with the key of the certificate that this server holds"
_REMEDY = {
    HTTPStatus.UNAUTHORIZED: "check the device's clock and that it is enrolled with this server; if the server was "
    "restored from a backup, an operator may have to open the id (edgewarden devices reopen) and enrol the device "
    "again (edgewarden-agent enroll --force)",
    HTTPStatus.FORBIDDEN: "ask the operator of the fleet server",
    HTTPStatus.CONFLICT: "ask the operator of the fleet server",
}
AnyRequest = Request[object, object, State]


@get(CA_PATH, opt={"open": True}, sync_to_thread=True)
def ca(parts: GivenParts) -> Response[bytes]:
    """Return the CA's certificate; a token's pin says whether to believe it."""
    return Response(parts.authority.ca_certificate(), media_type="application/x-pem-file")


@post(ENROL_PATH, opt={"open": True}, status_code=200, sync_to_thread=True)
def enroll(data: JSONBody[EnrolRequest], parts: GivenParts) -> EnrolResponse:
    """Take a new device in."""
    return parts.enrolment.enrol(data, parts.clock())


@get(RENEW_PATH, opt={"expired": True}, sync_to_thread=True)
def standing(request: AnyRequest, parts: GivenParts) -> Standing:
    """Tell a device that it is known here."""
    return parts.membership.standing(request.state.device)


@post(RENEW_PATH, opt={"expired": True}, status_code=200, sync_to_thread=True)
def renew(data: JSONBody[RenewRequest], request: AnyRequest, parts: GivenParts) -> RenewResponse:
    """Give a device its next certificate."""
    return parts.membership.renew(request.state.device, data, parts.clock())


@get(DIRECTOR_METADATA_PATH + "/{name:str}", sync_to_thread=True)
def director_metadata(name: FromPath[str], request: AnyRequest, parts: GivenParts) -> Response[bytes]:
    """Return a file of the Director repository as this device is to see it."""
    desire = parts.desired.desired(request.state.device)
    return _metadata(director_file(name, parts.director.roots(), desire), name)


@get(IMAGE_METADATA_PATH + "/{name:str}", sync_to_thread=True)
def image_metadata(name: FromPath[str], parts: GivenParts) -> Response[bytes]:
    """Return a file of the Image repository."""
    return _metadata(parts.image.metadata(name), name)


@get(BUNDLES_PATH + "/{sha256:str}", sync_to_thread=True)
def bundle(sha256: FromPath[str], request: AnyRequest, parts: GivenParts) -> Response[bytes] | Stream:
    """Return a bundle, or a delta of it, or the range of either that was asked for."""
    if "from" in request.query_params:
        return _delta(sha256, request, parts)
    length = parts.artifacts.length(sha256)
    if length is None:
        raise NotFoundException("there is no such bundle")
    return send_file(
        parts.artifacts.open(sha256),
        length,
        etag=sha256,
        range_=request.headers.get("range"),
        if_range=request.headers.get("if-range"),
    )


def _delta(sha256: str, request: AnyRequest, parts: Parts) -> Response[bytes] | Stream:
    """Answer with a delta; one that is not here yet is made for those who ask later."""
    base, method = request.query_params["from"], request.query_params.get("method", "")
    try:
        file, delta = parts.deltas.open(base, sha256, method)
    except KeyError:
        parts.deltas.prepare([(base, sha256)])
        raise NotFoundException("there is no such delta; fetch the bundle itself") from None
    return send_file(
        file,
        delta.length,
        etag=delta.sha256,
        range_=request.headers.get("range"),
        if_range=request.headers.get("if-range"),
    )


def device_app(parts: Parts) -> Any:
    """Return the ASGI app of the device port."""
    routes: Sequence[ControllerRouterHandler] = [
        ca,
        enroll,
        standing,
        renew,
        director_metadata,
        image_metadata,
        bundle,
    ]
    app = Litestar(
        route_handlers=routes,
        dependencies={"parts": Provide(lambda: parts, sync_to_thread=False, use_cache=True)},
        guards=[_guard(parts)],
        exception_handlers=handlers(_answer),
        logging_config=None,
        request_class=CarefulRequest,
        openapi_config=None,
        request_max_body_size=MAX_DEVICE_REQUEST,
    )
    return with_security_headers(app)


def device_of_token(parts: Parts, header: str, *, may_be_expired: bool = False) -> str:
    """Return the device that signed a request; raise NotAuthorizedException or PermissionDeniedException."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or len(token) > MAX_TOKEN:
        raise NotAuthorizedException("a request needs Authorization: Bearer and a token signed by the device")
    known = _claimed(parts, token)
    try:
        certificate = _certificate_of(token, known)
    except jwt.InvalidSignatureError as error:
        raise NotAuthorizedException(f"the token does not hold: {error}; {_NOT_THE_KEY}") from error
    except jwt.PyJWTError as error:
        raise NotAuthorizedException(f"the token does not hold: {error}") from error
    if known.revoked:
        raise PermissionDeniedException("this device was revoked")
    if certificate == known.next_certificate:
        parts.membership.has_used_next(known, parts.clock())
    _refuse_expired(parts.membership, certificate, parts.clock(), may_be_expired=may_be_expired)
    return known.id


def _claimed(parts: Parts, token: str) -> Device:
    """Return the device that a token says it is of."""
    try:
        claimed = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except jwt.PyJWTError as error:
        raise NotAuthorizedException(f"the token does not hold: {error}") from error
    if not isinstance(claimed, str) or not DEVICE_ID.fullmatch(claimed):
        raise NotAuthorizedException("the token does not name a device")
    known = parts.registry.device(claimed)
    if known is None:
        raise NotAuthorizedException("the token is of a device that is not enrolled here")
    return known


def _certificate_of(token: str, device: Device) -> str:
    """Return the device's certificate whose key signed a token: the one in force, or the next one."""
    if device.next_certificate:
        try:
            _verify(token, device.id, device.next_certificate)
        except jwt.InvalidSignatureError:
            pass  # then it is of the key in force, or of nobody's
        else:
            return device.next_certificate
    _verify(token, device.id, device.certificate)
    return device.certificate


def _refuse_expired(membership: Membership, certificate: str, now: int, *, may_be_expired: bool) -> None:
    if not may_be_expired and membership.has_expired(certificate, now):
        raise NotAuthorizedException("the device's certificate has expired; it opens nothing but its renewal")


def _verify(token: str, device: str, certificate: str) -> None:
    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    claims = jwt.decode(
        token,
        key,  # type: ignore[arg-type]  # the CA signs EC keys only; PyJWT refuses any other for ES256
        algorithms=[JWT_ALGORITHM],
        audience=AUDIENCE,
        issuer=device,
        leeway=CLOCK_SLACK,
        options={"require": ["iss", "aud", "iat", "exp"]},
    )
    if claims["exp"] - claims["iat"] > MAX_TOKEN_LIFE:
        raise jwt.InvalidTokenError(f"it lives longer than {MAX_TOKEN_LIFE} s")


def _guard(parts: Parts) -> Callable[[Any, BaseRouteHandler], Awaitable[None]]:
    async def require(connection: ASGIConnection[Any, Any, Any, State], handler: BaseRouteHandler) -> None:
        refuse_nul(connection)
        if not handler.opt.get("open"):
            header = connection.headers.get("authorization", "")
            look = partial(device_of_token, parts, header, may_be_expired=bool(handler.opt.get("expired")))
            connection.state.device = await sync_to_thread(look)

    return require


def _metadata(content: bytes | None, name: str) -> Response[bytes]:
    if content is None:
        raise NotFoundException(f"there is no metadata {name[:80]!r}")
    return Response(content, media_type="application/json")


def _answer(_request: AnyRequest, error: Exception) -> Response[bytes]:
    """Answer an error in the words of the device contract."""
    problem, headers = problem_of(error)
    remedy = _REMEDY.get(HTTPStatus(problem.status), "")
    body = DeviceApiError(error=problem.detail or problem.title, remedy=remedy)
    return Response(
        msgspec.json.encode(body), status_code=problem.status, media_type="application/json", headers=dict(headers)
    )
