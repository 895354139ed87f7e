"""Every error as RFC 9457 problem+json: which exception is which status, and what a person reads.

Nothing of a traceback or of the request's content leaves the server; what went wrong inside is logged.
"""

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException, SerializationException, ValidationException
from litestar.types import ExceptionHandlersMap

from fleet_server.access import LastAdmin, NotAccepted, Stale, UnknownToken, UnknownUser, UserExists
from fleet_server.api_types import Problem
from fleet_server.commands import CannotCommand
from fleet_server.enrolment import BadRequest, DeviceExists, NotReady, TokenRefused
from fleet_server.ingest import StoreUnavailable
from fleet_server.membership import UnknownDevice
from fleet_server.publishing import Refused
from fleet_server.rollouts import BadOrder

PROBLEM_JSON = "application/problem+json"
STATUS_OF: Mapping[type[Exception], HTTPStatus] = {
    BadRequest: HTTPStatus.BAD_REQUEST,
    TokenRefused: HTTPStatus.FORBIDDEN,
    DeviceExists: HTTPStatus.CONFLICT,
    NotReady: HTTPStatus.CONFLICT,
    UnknownDevice: HTTPStatus.NOT_FOUND,
    BadOrder: HTTPStatus.CONFLICT,
    CannotCommand: HTTPStatus.CONFLICT,
    Refused: HTTPStatus.CONFLICT,
    UnknownUser: HTTPStatus.NOT_FOUND,
    UnknownToken: HTTPStatus.NOT_FOUND,
    UserExists: HTTPStatus.CONFLICT,
    LastAdmin: HTTPStatus.CONFLICT,
    Stale: HTTPStatus.PRECONDITION_FAILED,
    NotAccepted: HTTPStatus.BAD_REQUEST,
    StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
}
_NUL_IN_JSON, _NUL_IN_QUERY = b"\\u0000", b"%00"
MAX_DETAIL = 2000  # characters
AnyRequest = Request[object, object, State]
_log = logging.getLogger(__name__)


def problem_of(error: Exception) -> tuple[Problem, Mapping[str, str]]:
    """Return the problem an exception stands for, and headers that go with it."""
    if isinstance(error, HTTPException):
        return _problem(error.status_code, _sentence_of(error)), dict(error.headers or {})
    for kind, status in STATUS_OF.items():
        if isinstance(error, kind):
            return _problem(status, str(error)), {}
    _log.error("a request went wrong", exc_info=error)
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the server's log says what went wrong"), {}


def answer(error: Exception) -> Response[bytes]:
    """Return an exception as a problem+json response."""
    problem, headers = problem_of(error)
    return Response(
        msgspec.json.encode(problem), status_code=problem.status, media_type=PROBLEM_JSON, headers=dict(headers)
    )


def handlers(answer_: Callable[[AnyRequest, Exception], Response[bytes]]) -> ExceptionHandlersMap:
    """Return the exception handlers of an app: everything ends in ``answer_``."""
    kinds: tuple[type[Exception], ...] = (HTTPException, Exception, *STATUS_OF)
    return dict.fromkeys(kinds, answer_)


def _problem(status: int, detail: str) -> Problem:
    return Problem(status=status, title=HTTPStatus(status).phrase, detail=detail[:MAX_DETAIL])


def _sentence_of(error: HTTPException) -> str:
    """Return what is wrong, naming the fields of a request that did not fit."""
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        return "; ".join(_field(entry) for entry in error.extra) or error.detail
    return error.detail


def _field(entry: object) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)
    key, message = entry.get("key"), entry.get("message", "")
    return f"{key}: {message}" if key else str(message)


class CarefulRequest(AnyRequest):
    """A request whose unreadable JSON is the sender's fault: Litestar lets two kinds of it through as our own.

    NUL is refused too: it has a place in no field, and PostgreSQL holds no text with it.
    """

    async def json(self) -> Any:
        """Return the body; raise SerializationException when it is not UTF-8, nested without end, or holds a NUL."""
        if _NUL_IN_JSON in await self.body():
            raise SerializationException("the body holds a NUL character")
        try:
            return await super().json()
        except (UnicodeDecodeError, RecursionError) as error:
            raise SerializationException(f"the body is not JSON: {type(error).__name__}") from error


def refuse_nul(connection: ASGIConnection[Any, Any, Any, Any]) -> None:
    """Raise ClientException when the path or the query of a request holds a NUL; for guards."""
    if "\x00" in connection.url.path or _NUL_IN_QUERY in connection.scope["query_string"]:
        raise ClientException("the address holds a NUL character")
