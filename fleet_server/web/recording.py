"""What is recorded of each request on its way out: the audit log, answers to be repeated, a session's new cookie.

A change that is logged in its own transaction (users, tokens, sessions) is not logged again. Every other change is
logged here, before its answer leaves: who is told that something was done can rely on its being logged. When the log
cannot be written, the answer is an error (503), though the change itself stands.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from litestar.concurrency import sync_to_thread
from litestar.datastructures import MutableScopeHeaders
from litestar.types import Message, Scope

from fleet_server.core.audit import Result
from fleet_server.ingest import StoreUnavailable
from fleet_server.web.auth import COOKIE, Doorkeeper, Visit
from fleet_server.web.problems import PROBLEM_JSON, answer

_REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.TOO_MANY_REQUESTS)
_KEPT_HEADERS = ("content-type", "etag", "location")
_log = logging.getLogger(__name__)
Answer = tuple[int, dict[str, str], bytearray]  # status, headers, body so far
Hook = Callable[[Message, Scope], Awaitable[None]]


def recorder(doorkeeper: Doorkeeper) -> Hook:
    """Return a hook that sees each message of each answer before it leaves."""

    async def record(message: Message, scope: Scope) -> None:
        visit = scope["state"].get("visit")
        if not isinstance(visit, Visit):
            return  # no route was found
        if message["type"] == "http.response.start":
            scope["state"]["instead"] = await _record_outcome(doorkeeper, visit, message)
            _carry_cookie(visit, message)
            scope["state"]["answer"] = (message["status"], _kept_headers(message), bytearray())
        elif message["type"] == "http.response.body":
            message["body"] = scope["state"]["instead"] or message["body"]
            if visit.repeat is not None:
                await _keep(doorkeeper, visit, scope["state"]["answer"], message)

    return record


async def _record_outcome(doorkeeper: Doorkeeper, visit: Visit, start: Any) -> bytes | None:
    """Log what came of a request. When that fails, make the answer an error and return the error's body."""
    result = _result(visit, start["status"])
    if not _is_worth_it(visit, result) or (visit.logged and result is Result.DONE):
        return None
    try:
        await sync_to_thread(_write, doorkeeper, visit, result)
    except StoreUnavailable as error:
        _log.error("%s by %r could not be logged: %s", visit.action, visit.act(0).who, error)
        problem = answer(StoreUnavailable(f"this could not be logged, though it may be done; look again ({error})"))
        start["status"] = problem.status_code
        start["headers"] = [
            (b"content-type", PROBLEM_JSON.encode()),
            (b"content-length", b"%d" % len(problem.content)),
        ]
        return problem.content
    return None


def _write(doorkeeper: Doorkeeper, visit: Visit, result: Result) -> None:
    act = visit.act(doorkeeper.clock())
    doorkeeper.access.note(replace(act, result=result, detail=visit.detail))


def _result(visit: Visit, status: int) -> Result:
    if visit.refused or status in _REFUSALS:
        return Result.REFUSED
    return Result.FAILED if status >= HTTPStatus.BAD_REQUEST else Result.DONE


def _is_worth_it(visit: Visit, result: Result) -> bool:
    """Every change and every try at one; of looking only what was refused to somebody who gave a name."""
    return visit.changes or (result is Result.REFUSED and (visit.caller is not None or visit.offered))


def _carry_cookie(visit: Visit, message: Any) -> None:
    """Give the browser its session's new token, unless the answer itself says something about the session."""
    headers = MutableScopeHeaders.from_message(message)
    said = any(value.startswith(f"{COOKIE}=") for value in headers.getall("set-cookie", []))
    if visit.fresh is not None and not said:
        headers.add("Set-Cookie", visit.fresh.to_header(header=""))


def _kept_headers(message: Any) -> dict[str, str]:
    headers = MutableScopeHeaders.from_message(message)
    return {name: headers[name] for name in _KEPT_HEADERS if name in headers}


async def _keep(doorkeeper: Doorkeeper, visit: Visit, begun: Answer, part: Any) -> None:
    status, headers, body = begun
    body += part.get("body", b"")
    if visit.repeat is not None and not part.get("more_body", False):
        key, visit.repeat = visit.repeat, None
        await doorkeeper.repeats.end(key, status, headers, bytes(body))
