"""The app for people and their programs: REST API, console pages, static files, health; one guard before it all."""

from pathlib import Path
from typing import Any

from litestar import Litestar, Response, Router, get
from litestar.di import Provide
from litestar.exceptions import HTTPException, NotAuthorizedException, NotFoundException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.params import FromPath
from litestar.response import Redirect

import protocol
from fleet_server.api_types import API
from fleet_server.core.access import Standing
from fleet_server.web.api.people import router as people
from fleet_server.web.api.routes import router
from fleet_server.web.auth import Doorkeeper, Visit, guard, needs
from fleet_server.web.console import pages
from fleet_server.web.headers import with_security_headers
from fleet_server.web.metrics import metrics
from fleet_server.web.problems import AnyRequest, CarefulRequest, answer, handlers, problem_of
from fleet_server.web.recording import recorder
from fleet_server.web.repeats import AnsweredBefore
from fleet_server.web.services import Parts

# The few files of the console, read once: no request can name a path.
_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FILES = {
    path.name: path.read_bytes() for path in (Path(__file__).parent / "static").iterdir() if path.suffix in _TYPES
}
MAX_BODY = 1024 * 1024  # bytes of a JSON or form body, where a route does not say otherwise


@get("/health", opt=needs(Standing.ANYBODY), sync_to_thread=False)
def health() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok"}


@get("/static/{name:str}", opt=needs(Standing.ANYBODY), sync_to_thread=False, include_in_schema=False)
def static(name: FromPath[str]) -> Response[bytes]:
    """Return a style sheet, script or picture of the console."""
    if name not in _FILES:
        raise NotFoundException("there is no such file")
    return Response(_FILES[name], media_type=_TYPES[Path(name).suffix], headers={"Cache-Control": "max-age=60"})


def console_litestar(parts: Parts, doorkeeper: Doorkeeper) -> Litestar:
    """Return the app itself; tests walk its routes."""
    return Litestar(
        route_handlers=[
            health,
            metrics,
            router,
            people,
            pages.login_page,
            pages.login,
            pages.logout,
            pages.fleet_page,
            pages.device_page,
            pages.models_page,
            static,
        ],
        dependencies={
            "parts": Provide(lambda: parts, sync_to_thread=False, use_cache=True),
            "doorkeeper": Provide(lambda: doorkeeper, sync_to_thread=False, use_cache=True),
        },
        guards=[guard(doorkeeper)],
        before_send=[recorder(doorkeeper)],
        exception_handlers={**handlers(_answer), AnsweredBefore: _answer_again},
        logging_config=None,
        request_class=CarefulRequest,
        request_max_body_size=MAX_BODY,
        openapi_config=OpenAPIConfig(
            title="Edgewarden",
            version=protocol.__version__,
            openapi_router=Router(f"{API}/schema", route_handlers=[], opt=needs(Standing.KNOWN)),
            render_plugins=[JsonRenderPlugin(path="/openapi.json")],
        ),
    )


def console_app(parts: Parts, doorkeeper: Doorkeeper) -> Any:
    """Return the ASGI app of the console port."""
    return with_security_headers(console_litestar(parts, doorkeeper))


def _answer(request: AnyRequest, error: Exception) -> Response[Any]:
    """Answer programs with problem+json and people with a page; who is not logged in is shown the way."""
    response = answer(error)
    if isinstance(getattr(request.state, "visit", None), Visit):
        request.state.visit.detail = problem_of(error)[0].detail
    if not _is_for_a_person(request):
        return response
    if isinstance(error, NotAuthorizedException):
        return Redirect("/login", status_code=303)
    if isinstance(error, HTTPException):
        return pages.error_page(error)
    return response


def _answer_again(_request: AnyRequest, error: AnsweredBefore) -> Response[bytes]:
    """Answer a repeat with what was answered before."""
    return error.answer.response()


def _is_for_a_person(request: AnyRequest) -> bool:
    path = request.url.path
    is_page = not path.startswith((API, "/static", "/health", "/metrics")) and "fragment" not in request.query_params
    return is_page and "text/html" in request.headers.get("accept", "")
