"""What local settings add to serving: pipelines and capture, from their start to their end.

Stands between the wiring and the parts, and answers their paths over HTTP: ``/v2/pipelines`` for everybody on this
machine, ``/v2/captures`` on the Unix socket only. A part that cannot be started says so there; serving goes on.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import msgspec

from agent.channel import Configure
from agent.core.capturing import CapturePolicy
from agent.core.pipelines import PipelineSettings
from agent.inference.engine import Engine
from agent.inference.http import Response
from agent.inference.parsing import Head, HttpError
from agent.inference.pipelines.group import NoRoom, NotPushed, Pipelines, UnknownPipeline
from agent.inference.routes import SMALL_BODY, Plan

if TYPE_CHECKING:  # what is not configured is not imported: it costs memory, and time at every start
    from agent.inference.capture import Capture

log = logging.getLogger(__name__)

_STATES = ("held", "released", "expired")


class Configured:
    """The pipelines and the capture of one process."""

    def __init__(self, engine: Engine) -> None:
        """Nothing is configured yet."""
        self._engine = engine
        self._pipelines = Pipelines(())
        self._capture: Capture | None = None
        self._policy = CapturePolicy()
        self._capture_error = ""

    # ------------------------------------------------------------ life
    def configure(self, order: Configure) -> None:
        """Take the settings, once, before anything serves."""
        state = Path(order.state) if order.state else None
        self.adopt(order.pipelines, order.capture, state)

    def adopt(self, pipelines: Sequence[PipelineSettings], policy: CapturePolicy, state: Path | None) -> None:
        """Build pipelines and begin to capture. ``state``: folder of this device's own."""
        if pipelines:
            from agent.inference.pipelines.building import build

            self._pipelines = Pipelines([build(one, self._engine) for one in pipelines], state)
        self._policy = policy
        if state is not None and _needs_capture(policy, state):
            try:
                self._begin_capture(policy, state)
            except Exception as error:  # noqa: BLE001 - without capture, and saying so, serving goes on
                self._capture_error = str(error) or type(error).__name__
                log.error("nothing is captured: %s", self._capture_error)

    def start(self) -> None:
        """Let the pipelines run; the server has opened."""
        self._pipelines.start()

    def stop_soon(self) -> None:
        """Take no more frames; returns at once."""
        self._pipelines.stop_soon()

    def finish(self) -> None:
        """Stop everything, before the engine closes."""
        self._pipelines.finish()
        if self._capture is not None:
            self._engine.tap(None)
            self._capture.finish()

    def _begin_capture(self, policy: CapturePolicy, state: Path) -> None:
        """Begin; where capture is off, what was kept before is still listed, and expires."""
        from agent.inference.capture import Capture
        from agent.inference.samples import SampleFolder

        capture = Capture(policy, SampleFolder(state))
        capture.start()
        self._capture = capture
        if policy.enabled:
            self._engine.tap(capture)

    # ------------------------------------------------------------ HTTP
    def plan(self, head: Head, *, over_tcp: bool) -> Plan | None:
        """Return how to answer a request, or None when the path is not one of these; raise `HttpError`."""
        match head.path:
            case ("v2", "pipelines"):
                return _get(head, lambda: {"pipelines": self._pipelines.describe()})
            case ("v2", "pipelines", name) if head.method == "POST":
                return self._plan_push(name)
            case ("v2", "pipelines", name):
                found = self._found(name, self._pipelines.find)
                return _get(head, found.describe, allowed="GET, POST")
            case ("v2", "captures", *rest) if len(rest) <= 1:
                if over_tcp:
                    raise HttpError(403, "captures are told of on the Unix socket only")
                return self._plan_captures(head, "".join(rest))
        return None

    def _plan_push(self, name: str) -> Plan:
        found = self._found(name, self._pipelines.pushed)
        return Plan(answer=lambda body: self._push(name, body), body_cap=found.settings.max_frame)

    def _found(self, name: str, find: Callable[[str], Any]) -> Any:
        try:
            return find(name)
        except UnknownPipeline as error:
            raise HttpError(404, str(error)) from error
        except NotPushed as error:
            raise HttpError(409, str(error)) from error

    def _push(self, name: str, body: memoryview) -> Response:
        try:
            self._pipelines.push(name, bytes(body))
        except NoRoom as error:
            raise HttpError(503, str(error), headers={"Retry-After": "1"}) from error
        return _json({"taken": True}, status=202)

    def _plan_captures(self, head: Head, sample_id: str) -> Plan:
        if self._capture is None:
            why = self._capture_error or "capture is not enabled in the settings"
            raise HttpError(404 if sample_id else 409, f"nothing is captured here: {why}")
        if sample_id:
            return _get(head, lambda: self._sample(sample_id))
        state = _asked_state(head.query)
        capture = self._capture
        return _get(head, lambda: capture.listed(state))

    def _sample(self, sample_id: str) -> dict[str, Any]:
        from agent.inference.samples import NoSuchSample

        assert self._capture is not None
        try:
            return self._capture.status(sample_id)
        except NoSuchSample as error:
            raise HttpError(404, f"there is no sample {sample_id[:80]!r} here") from error

    # ------------------------------------------------------------ metrics
    def metrics(self) -> Iterator[str]:
        """Return Prometheus lines."""
        yield from self._pipelines.metrics()
        if self._capture is not None:
            yield from self._capture.metrics()


def modules_for(order: Configure) -> Iterator[str]:
    """Return what this process would import for these settings, for whoever wants it imported before."""
    if order.pipelines:
        yield "agent.inference.pipelines.building"
    if order.state and _needs_capture(order.capture, Path(order.state)):
        yield "agent.inference.capture"
        yield "agent.inference.samples"


def _needs_capture(policy: CapturePolicy, state: Path) -> bool:
    return policy.enabled or (state / "captures").is_dir()


def _asked_state(query: str) -> Any:
    asked = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=8)) if query else {}
    if not asked:
        return None
    state = asked.get("status")
    if set(asked) != {"status"} or state not in _STATES:
        raise HttpError(400, f"the query may only be status={'|'.join(_STATES)}")
    return state


def _get(head: Head, answer: Callable[[], Any], *, allowed: str = "GET") -> Plan:
    if head.method != "GET":
        raise HttpError(405, f"{head.method} is not allowed here, {allowed} is", headers={"Allow": allowed})
    return Plan(answer=lambda _: _json(answer()), body_cap=SMALL_BODY)


def _json(value: object, *, status: int = 200) -> Response:
    return Response(status=status, body=(msgspec.json.encode(value),))
