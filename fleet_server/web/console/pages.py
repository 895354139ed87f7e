"""The console's pages: log-in, fleet, device, models. Server-rendered; each page's data is also in the REST API.

Pages hold a part that ``live.js`` fetches again with ``?fragment=1`` and swaps in; without scripts a reload does the
same. What devices say of themselves (names, facts, details) is hostile text: the templates escape everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from litestar import MediaType, Request, Response, get, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException, NotAuthorizedException, TooManyRequestsException
from litestar.params import FromPath, QueryParameter, URLEncodedBody
from litestar.response import Redirect

from fleet_server.access import ADMIN
from fleet_server.api_types import DeviceView, ModelVersion, SeriesPoint
from fleet_server.core.access import Permission, Standing
from fleet_server.core.series import MINUTE
from fleet_server.web.api.routes import device_or_404
from fleet_server.web.auth import GivenDoorkeeper, caller_of, needs
from fleet_server.web.console import words
from fleet_server.web.console.charts import Chart, Sample, draw, nice_top
from fleet_server.web.overview import overview_of, trust_of, versions_of
from fleet_server.web.services import GivenParts
from protocol.metrics import Proportion
from protocol.states import PresenceState

EVENTS_ON_OVERVIEW = 50
EVENTS_ON_DEVICE = 100
CHART_SPAN = 30 * 60_000  # ms shown on a device's page
MAX_POINTS = 90
TEMPLATES = Path(__file__).parent.parent / "templates"
AnyRequest = Request[object, object, State]
Fragment = Annotated[int, QueryParameter(ge=0, le=1)]
Form = URLEncodedBody[dict[str, str]]


def make_environment() -> Environment:
    """Return the template environment: escapes everything, and an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({name: getattr(words, name) for name in _WORDS})
    return environment


_WORDS = (
    "presence", "deployment", "kind", "reason", "sentences", "percent", "evidence", "latency", "size", "count",
    "turned_away", "cpu", "memory", "readings", "ago", "iso", "clock",
)  # fmt: skip
_environment = make_environment()


@dataclass(frozen=True, kw_only=True)
class ModelCharts:
    """One model on a device over time."""

    model: str
    points: tuple[SeriesPoint, ...]
    accuracy: Chart
    latency: Chart
    since: int
    until: int


# ---------------------------------------------------------------- log-in
# Not in a thread: it reads nothing, and Litestar 2.25 wraps the first of two handlers of one path twice.
@get("/login", opt=needs(Standing.ANYBODY), sync_to_thread=False)
def login_page() -> Response[str]:
    """Show the log-in form."""
    return _page("login.html", message=None)


@post("/login", opt=needs(Standing.ANYBODY, form=True), sync_to_thread=True)
def login(data: Form, request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Response[Any]:
    """Log in and go to the fleet."""
    try:
        cookies = doorkeeper.log_in(request, data.get("user", ADMIN), data.get("password", ""))
    except (NotAuthorizedException, TooManyRequestsException) as error:
        return _page("login.html", status=error.status_code, message=error.detail)
    return Redirect("/", status_code=303, cookies=cookies)


@post("/logout", opt=needs(Standing.PERSON, form=True), sync_to_thread=True)
def logout(request: AnyRequest, doorkeeper: GivenDoorkeeper) -> Redirect:
    """End the session."""
    return Redirect("/login", status_code=303, cookies=[doorkeeper.log_out(request)])


# ---------------------------------------------------------------- pages
@get("/", opt=needs(Permission.LOOK), sync_to_thread=True)
def fleet_page(request: AnyRequest, parts: GivenParts, fragment: Fragment = 0) -> Response[str]:
    """Show the fleet."""
    devices = parts.queries.devices()
    return _live(
        "fleet.html",
        request,
        fragment,
        active="fleet",
        now=parts.clock(),
        overview=overview_of(parts, devices),
        hindered=[v for v in versions_of(parts) if v.hindrance and v.running_on],
        states=tuple(PresenceState),
        devices=devices,
        events=parts.queries.events(limit=EVENTS_ON_OVERVIEW),
    )


@get("/devices/{device_id:str}", opt=needs(Permission.LOOK), sync_to_thread=True)
def device_page(
    device_id: FromPath[str], request: AnyRequest, parts: GivenParts, fragment: Fragment = 0
) -> Response[str]:
    """Show one device."""
    device = device_or_404(parts, device_id)
    now = parts.clock()
    return _live(
        "device.html",
        request,
        fragment,
        active="fleet",
        now=now,
        device=device,
        charts=[_charts(parts, device, model.model, now) for model in device.models],
        events=parts.queries.events(device=device_id, limit=EVENTS_ON_DEVICE),
    )


@get("/models", opt=needs(Permission.LOOK), sync_to_thread=True)
def models_page(request: AnyRequest, parts: GivenParts, fragment: Fragment = 0) -> Response[str]:
    """Show published versions and how well they do."""
    versions = versions_of(parts)
    return _live(
        "models.html",
        request,
        fragment,
        active="models",
        now=parts.clock(),
        models=_by_model(versions),
        trust=trust_of(parts),
    )


def error_page(error: HTTPException) -> Response[str]:
    """Return an error as a page."""
    return _page("error.html", status=error.status_code, message=error.detail)


def _live(template: str, request: AnyRequest, fragment: int, **facts: object) -> Response[str]:
    """Return a page, or only the part of it that changes."""
    name = f"_{template}" if fragment else template
    return _render(name, 200, {**facts, "csrf": caller_of(request).csrf, "path": request.url.path})


def _page(template: str, *, status: int = 200, message: str | None) -> Response[str]:
    return _render(template, status, {"message": message})


def _render(template: str, status: int, facts: Mapping[str, object]) -> Response[str]:
    content = _environment.get_template(template).render(facts)
    return Response(content, status_code=status, media_type=MediaType.HTML)


def _by_model(versions: Sequence[ModelVersion]) -> dict[str, list[ModelVersion]]:
    models: dict[str, list[ModelVersion]] = {}
    for version in versions:
        models.setdefault(version.model, []).append(version)
    return models


# ---------------------------------------------------------------- charts
def _charts(parts: GivenParts, device: DeviceView, model: str, now: int) -> ModelCharts:
    points = parts.queries.series(device.id, model, span=CHART_SPAN, most=MAX_POINTS)
    since = now - CHART_SPAN
    changes = _version_changes(points)
    step = points[0].span if points else MINUTE
    accuracy = [_accuracy_sample(point.start, point.accuracy) for point in points if point.accuracy]
    latency = [Sample(at=point.start, value=point.p95_us / 1000) for point in points if point.p95_us is not None]
    top = nice_top([sample.value for sample in latency])
    return ModelCharts(
        model=model,
        points=points,
        since=since,
        until=now,
        accuracy=draw(accuracy, since=since, until=now, step=max(step, MINUTE), top=100.0, versions=changes),
        latency=draw(latency, since=since, until=now, step=step, top=top, versions=changes),
    )


def _accuracy_sample(at: int, accuracy: Proportion) -> Sample:
    """Return an accuracy in per cent; a point has one only if it has an n."""
    low, high = accuracy.low or 0.0, accuracy.high or 0.0
    return Sample(at=at, value=100 * (accuracy.value or 0.0), low=100 * low, high=100 * high)


def _version_changes(points: Sequence[SeriesPoint]) -> list[tuple[int, int]]:
    """Return when each version began to answer, the first one left out."""
    changes: list[tuple[int, int]] = []
    before: int | None = None
    for point in points:
        if point.version is not None and point.requests and point.version != before:
            if before is not None:
                changes.append((point.start, point.version))
            before = point.version
    return changes
