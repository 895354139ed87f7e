"""`/metrics` on the console's port, for whoever shows the scrape token; and the count of every answer on both ports.

The token is a secret of its own, made at the first start: it opens this one page and nothing else, so a scraper never
needs an account. What the page says is for `ports.Exposition`.
"""

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.enums import ScopeType
from litestar.exceptions import NotAuthorizedException, NotFoundException
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from fleet_server.core.access import Standing
from fleet_server.web.auth import needs
from fleet_server.web.services import GivenParts

TOKEN_FILE = "metrics-token"  # in the data folder  # noqa: S105 - a name, not a secret
MAX_TOKEN_FILE = 4096  # bytes
NO_ROUTE = "none"  # what no route is for: paths that people make up must not become series
OTHER_METHOD = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CUT_SHORT = 499  # no answer was sent: the caller hung up

Answered = Callable[[str, str, str, int, float], None]  # port, method, route, status, seconds


@get("/metrics", opt=needs(Standing.ANYBODY), sync_to_thread=True, include_in_schema=False)
def metrics(request: Request[object, object, State], parts: GivenParts) -> Response[bytes]:
    """Show the metrics to whoever has the scrape token."""
    if not _is_right(request.headers.get("authorization", ""), parts.scrape_token):
        raise NotAuthorizedException(f"/metrics needs Authorization: Bearer and the text of {TOKEN_FILE}")
    if parts.exposition is None:
        raise NotFoundException("this server shows no metrics")
    body, content_type = parts.exposition.render(request.headers.get("accept", ""))
    return Response(body, media_type=content_type)


def scrape_token(folder: Path) -> str:
    """Return the token in the data folder, made at the first start."""
    path = folder / TOKEN_FILE
    try:
        with path.open(encoding="utf-8") as file:
            token = file.read(MAX_TOKEN_FILE).strip()
    except FileNotFoundError:
        token = ""
    return token or _make_token(path)


def counted(app: ASGIApp, port: str, answered: Answered) -> ASGIApp:
    """Return an app that says of every answer what was asked, by the route's template, and how long it took."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        statuses: list[int] = []

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        began = time.monotonic()
        try:
            await app(scope, receive, send_noting)
        finally:
            status = statuses[0] if statuses else CUT_SHORT
            answered(port, _method(scope), _route(scope), status, time.monotonic() - began)

    return wrapped


def _method(scope: HTTPScope) -> str:
    method = str(scope["method"])
    return method if method in METHODS else OTHER_METHOD


def _route(scope: HTTPScope) -> str:
    return str(scope.get("path_template") or NO_ROUTE)


def _is_right(header: str, token: str) -> bool:
    scheme, _, shown = header.partition(" ")
    same = hmac.compare_digest(_digest(shown.strip()), _digest(token))
    return bool(token) and scheme.lower() == "bearer" and same


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _make_token(path: Path) -> str:
    token = secrets.token_urlsafe(32)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(token + "\n")
    return token
