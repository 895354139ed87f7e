"""The fleet server's device API but for bundles: metadata (as `trust.py` asks for them) and enrolment.

Knows paths and bodies; requests are `https.py`'s. What the answers are worth is found out by whoever asked.
"""

import logging
import ssl
from collections.abc import Iterator
from http import HTTPStatus
from typing import NoReturn, TypeVar

import msgspec

from agent.adapters.https import READ_TIMEOUT, HttpsServer, NotYetValid, Response, raise_weather, unverified
from agent.adapters.identity import context_for, without_time
from agent.ports import Refusal, ShutOut, Trouble, Weather
from protocol.device_api import (
    CA_PATH,
    DIRECTOR_METADATA_PATH,
    ENROL_PATH,
    IMAGE_METADATA_PATH,
    RENEW_PATH,
    DeviceApiError,
    EnrolRequest,
    EnrolResponse,
    RenewRequest,
    RenewResponse,
    Standing,
)
from protocol.messages import DesiredState
from protocol.names import MAX_DESIRED_MESSAGE, MAX_DEVICE_REQUEST

T = TypeVar("T", Standing, RenewResponse)
MAX_ROOT_STEPS = 256  # python-tuf's own limit of root rotations
log = logging.getLogger(__name__)
_BUSY = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


class HttpsMetadata:
    """Metadata files of both repositories, each capped by its reader."""

    def __init__(self, server: HttpsServer) -> None:
        """Requests need a bearer token."""
        self._server = server

    def image(self, name: str, cap: int) -> bytes | None:
        """Return a file of the Image repository, or None when the server has none of that name."""
        return self._file(f"{IMAGE_METADATA_PATH}/{name}", cap)

    def desired_state(self, director_root: int) -> DesiredState:
        """Return this device's desired state, as ``down/want`` carries it: for when the broker is out of reach."""
        return DesiredState(
            root=tuple(self._root_steps(director_root)),
            timestamp=self._part("timestamp.json"),
            snapshot=self._part("snapshot.json"),
            targets=self._part("targets.json"),
        )

    def _root_steps(self, held: int) -> Iterator[bytes]:
        for version in range(held + 1, held + 1 + MAX_ROOT_STEPS):
            root = self._file(f"{DIRECTOR_METADATA_PATH}/{version}.root.json", MAX_DESIRED_MESSAGE)
            if root is None:
                return
            yield root

    def _part(self, name: str) -> bytes:
        return self._file(f"{DIRECTOR_METADATA_PATH}/{name}", MAX_DESIRED_MESSAGE) or b""

    def _file(self, path: str, cap: int) -> bytes | None:
        with self._server.open(path) as response:
            if response.status == HTTPStatus.NOT_FOUND:
                return None
            if response.status != HTTPStatus.OK:
                raise_weather(response, path)
            return self._server.read(response, cap, path)


class HttpsMembership:
    """What the server says of this device (port `MembershipServer`)."""

    def __init__(self, server: HttpsServer) -> None:
        """Requests need a bearer token."""
        self._server = server

    def standing(self) -> Standing:
        return self._ask(None, Standing)

    def renew(self, request: RenewRequest) -> RenewResponse:
        return self._ask(msgspec.json.encode(request), RenewResponse)

    def _ask(self, body: bytes | None, kind: type[T]) -> T:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with self._server.open(RENEW_PATH, body=body, headers=headers) as response:
            answer = self._server.read(response, MAX_DEVICE_REQUEST, RENEW_PATH)
            if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise ShutOut(_said(response, answer))
            if response.status == HTTPStatus.BAD_REQUEST:
                raise Trouble(_said(response, answer))
            if response.status != HTTPStatus.OK:
                raise_weather(response, RENEW_PATH)
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Weather(f"the server's answer cannot be read: {error}") from error


def _said(response: Response, answer: bytes) -> str:
    """Return the server's sentence, with its remedy."""
    try:
        said = msgspec.json.decode(answer, type=DeviceApiError)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"status {response.status}"
    return f"{said.error}; {said.remedy}" if said.remedy else said.error


class HttpsEnrolment:
    """The open part of the device API (port `EnrolmentServer`)."""

    def __init__(self, url: str, *, read_timeout: float = READ_TIMEOUT) -> None:
        """``url``: ``https://host:port``."""
        self.url = HttpsServer(url, tls=lambda: context_for("")).url
        self._read_timeout = read_timeout

    def ca(self) -> str:
        with unverified() as context:  # nobody can vouch for the server yet: the caller compares with the token's pin
            return self._ask(context, CA_PATH, None).decode("ascii", "replace")

    def enrol(self, request: EnrolRequest, ca: str) -> EnrolResponse:
        asked = msgspec.json.encode(request)
        try:
            body = self._ask(context_for(ca), ENROL_PATH, asked)
        except NotYetValid as error:
            # The pinned CA never dates anything ahead: that its certificate is of the future proves our clock behind.
            log.warning(
                "this device's clock is behind; the server's certificate is checked without its dates: %s", error
            )
            body = self._ask(without_time(context_for(ca)), ENROL_PATH, asked)
        try:
            return msgspec.json.decode(body, type=EnrolResponse)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Trouble(
                f"{self.url} answered something else than a certificate: {error}",
                remedy="Check that the address is the fleet server's device port",
            ) from error

    def _ask(self, context: ssl.SSLContext, path: str, body: bytes | None) -> bytes:
        server = HttpsServer(self.url, tls=lambda: context, read_timeout=self._read_timeout)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            with server.open(path, body=body, headers=headers) as response:
                answer = server.read(response, MAX_DEVICE_REQUEST, path)
                if not HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
                    self._raise_answer(response, answer)
                return answer
        except Refusal as error:
            raise Trouble(str(error), remedy="Check that the address is the fleet server's device port") from error
        finally:
            server.close()

    def _raise_answer(self, response: Response, answer: bytes) -> NoReturn:
        if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR or response.status in _BUSY:
            raise_weather(response, response.geturl() or self.url)
        try:
            said = msgspec.json.decode(answer, type=DeviceApiError)
        except (msgspec.DecodeError, UnicodeDecodeError):
            said = DeviceApiError(error=f"{self.url} refused with status {response.status}")
        raise Trouble(said.error, remedy=said.remedy or _remedy(response.status))


def _remedy(status: int) -> str:
    if status == HTTPStatus.CONFLICT:
        return (
            "Either the server has no trust roots yet (the operator runs `edgewarden keys init`), "
            "or this id is enrolled already (choose another, or let the operator open it)"
        )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return "Ask the operator for a new token: this one is unknown, used up or expired"
    return "Check that the address is the fleet server's device port"
