"""The Open Inference Protocol v2 over HTTP: which path means what, and which status each failure has.

Translates between `http` and the engine, and decides nothing itself. A request is planned from its head alone, so
that the size of its body is capped by what the endpoint, and the model, can use.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

from agent.inference.answering import encode_answer
from agent.inference.describe import model_config, prometheus
from agent.inference.encoding import IDENTITY, WORTHWHILE, accepted_coding, coding_of, deflated, inflated
from agent.inference.engine import Engine
from agent.inference.generation import Generation
from agent.inference.http import JSON, Response
from agent.inference.parsing import Head, HttpError
from agent.inference.reading import decode_call
from agent.inference.repository import FLEET_DECIDES, Repository
from agent.inference.service import Failure, Kind, Service, model_name
from agent.inference.tensors import MAX_ID
from agent.inference.truth import AlreadyJudged, UnknownPrediction

SMALL_BODY = 64 * 1024  # bytes; enough for every endpoint but infer
_NOT_OFFERED = frozenset({"systemsharedmemory", "cudasharedmemory", "trace", "logging"})
_VERSIONED = ("", "ready", "config", "stats", "infer")
T = TypeVar("T")
_METHODS = {"": "GET", "ready": "GET", "config": "GET", "stats": "GET", "infer": "POST", "feedback": "POST"}


_STATUS = {Kind.UNKNOWN: 404, Kind.WRONG: 400, Kind.FORBIDDEN: 400, Kind.BUSY: 503, Kind.FAILED: 500}
Parameters = dict[str, object]


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The true class of a past prediction: its index or its name."""

    id: str
    truth: int | str


class Change(msgspec.Struct, frozen=True):
    """The body of loading and unloading."""

    parameters: Parameters = {}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request is going to be answered: the largest body it may have, and what makes the answer."""

    answer: Callable[[memoryview], Response]
    body_cap: int = SMALL_BODY
    lasting: bool = False  # holds for every request with the same head, whatever serves by then


class Addition(Protocol):
    """A part that answers paths of its own."""

    def plan(self, head: Head, *, over_tcp: bool) -> Plan | None:
        """Return how to answer a request, or None when the path is not one of its own; raise `HttpError`."""

    def metrics(self) -> Iterator[str]:
        """Return its lines of ``/metrics``."""


class Routes:
    """The endpoints over one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        managed: bool,
        feedback_on_tcp: bool = False,
        body_cap: int,
        service: Service | None = None,
    ) -> None:
        """``managed``: a fleet decides what serves here; ``service`` knows whether local clients may too."""
        self._engine = engine
        self.service = service or Service(engine, Repository(engine, forbidden=FLEET_DECIDES if managed else ""))
        self._feedback_on_tcp = feedback_on_tcp
        self._feedback_switch = "[inference] feedback_on_tcp is set" if managed else "--feedback-on-tcp is given"
        self._body_cap = body_cap
        self._additions: list[Addition] = []
        self._fixed: dict[tuple[str, ...], Callable[[Head], Plan]] = {
            ("metrics",): lambda head: _get(head, lambda: _text(self._metrics())),
            ("v2",): lambda head: _get(head, lambda: _json(self.service.describe())),
            ("v2", "health", "live"): lambda head: _get(head, lambda: _json({"live": True})),
            ("v2", "health", "ready"): lambda head: _get(head, self._health),
            ("v2", "models", "stats"): lambda head: _get(head, lambda: _json(self.service.statistics())),
            ("v2", "repository", "index"): lambda head: _post(head, lambda body: _json(self._index(body))),
        }

    def add(self, addition: "Addition") -> None:
        """Answer the paths of a part that local settings brought in, too."""
        self._additions.append(addition)

    def when_ready(self, ready: Callable[[], bool]) -> None:
        """Ask ``ready`` for the server's health from now on."""
        self.service.when_ready(ready)

    def plan(self, head: Head, *, over_tcp: bool) -> Plan:
        """Return how to answer a request; raise `HttpError`."""
        coding = coding_of(head.headers)
        try:
            plan = self._plan(head, over_tcp=over_tcp)
        except Failure as failure:
            raise _as_error(failure) from failure
        return Plan(
            answer=lambda body: _answer(plan, inflated(body, coding, plan.body_cap)),
            body_cap=plan.body_cap,
            lasting=plan.lasting,
        )

    def _plan(self, head: Head, *, over_tcp: bool) -> Plan:
        if head.path in self._fixed:
            return self._fixed[head.path](head)
        match head.path:
            case ("v2", "models", model, "versions", version, *rest) if len(rest) <= 1:
                return self._plan_model(head, model, version, "".join(rest), over_tcp=over_tcp)
            case ("v2", "models", model, *rest) if len(rest) <= 1:
                return self._plan_model(head, model, None, "".join(rest), over_tcp=over_tcp)
            case ("v2", "repository", "models", model, "load"):
                return _post(head, lambda body: self._change(self.service.load, model, body), cap=self._body_cap)
            case ("v2", "repository", "models", model, "unload"):
                return _post(head, lambda body: self._change(self.service.unload, model, body), cap=self._body_cap)
            case ("v2", extension, *_) if extension in _NOT_OFFERED:
                raise HttpError(501, f"{extension} is not offered; see the extensions at GET /v2")
        for addition in self._additions:
            if plan := addition.plan(head, over_tcp=over_tcp):
                return plan
        raise HttpError(404, f"there is nothing at /{'/'.join(head.path)[:80]}; the protocol starts at /v2")

    def _plan_model(self, head: Head, model: str, version: str | None, what: str, *, over_tcp: bool) -> Plan:
        if what not in _METHODS or (version is not None and what not in _VERSIONED):
            raise HttpError(404, f"a model has no {what[:40]!r}")
        _check_method(head, _METHODS[what])
        found = self.service.find(model, version)
        match what:
            case "infer":
                cap = min(found.signature.body_cap, self._body_cap)
                return Plan(answer=lambda body: self._infer(head, model, version, body), body_cap=cap, lasting=True)
            case "feedback":
                self._check_feedback_allowed(over_tcp=over_tcp)
                return Plan(answer=lambda body: self._judge(found, body))
            case "ready":
                return Plan(answer=lambda _: _json({"name": model, "ready": True}))
            case "config":
                return Plan(answer=lambda _: _json(model_config(found)))
            case "stats":
                return Plan(answer=lambda _: _json(self.service.statistics(model, version)))
        return Plan(answer=lambda _: _json(self.service.metadata(model, version)))

    # ------------------------------------------------------------ health and repository
    def _metrics(self) -> str:
        more = [f"{line}\n" for addition in self._additions for line in addition.metrics()]
        return prometheus(self._engine) + "".join(more)

    def _health(self) -> Response:
        if not self.service.is_ready:
            raise HttpError(503, "the server is going away", headers={"Retry-After": "1"})
        return _json({"ready": True})

    def _index(self, body: memoryview) -> list[dict[str, str]]:
        asked = _decode(body or b"{}", dict[str, bool])
        return [
            {"name": one.name, "version": str(one.version), "state": one.state.value, "reason": one.reason}
            for one in self.service.index(ready_only=asked.get("ready", False))
        ]

    def _change(self, change: Callable[[str, Parameters], None], model: str, body: memoryview) -> Response:
        change(model, _decode(body or b"{}", Change).parameters)
        return _json({})

    # ------------------------------------------------------------ inference
    def _infer(self, head: Head, model: str, version: str | None, body: memoryview) -> Response:
        done = self.service.infer(model, version, lambda signature: decode_call(body, head.json_length, signature))
        parts = encode_answer(done.call, done.id, done.outputs, done.signature)
        return _infer_response(parts, accepted_coding(head.headers))

    # ------------------------------------------------------------ feedback
    def _check_feedback_allowed(self, *, over_tcp: bool) -> None:
        if over_tcp and not self._feedback_on_tcp:
            raise HttpError(403, f"feedback is taken on the Unix socket only, unless {self._feedback_switch}")

    def _judge(self, found: Generation, body: memoryview) -> Response:
        feedback = _decode(body, Feedback)
        truth = _class_index(found, feedback.truth)
        model = found.servable.model
        try:
            self._engine.truth.judge(model, feedback.id[: MAX_ID + 1], truth)
        except UnknownPrediction as error:
            raise HttpError(
                404, f"no prediction of {model} with id {feedback.id[:80]!r} is remembered; it may be too old"
            ) from error
        except AlreadyJudged as error:
            raise HttpError(409, f"the truth of {feedback.id[:80]!r} was given before; it counts once") from error
        return _json({"id": feedback.id, "truth": truth})


def _as_error(failure: Failure) -> HttpError:
    headers = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
    return HttpError(_STATUS[failure.kind], failure.message, headers=headers)


def _answer(plan: Plan, body: memoryview) -> Response:
    try:
        return plan.answer(body)
    except Failure as failure:
        raise _as_error(failure) from failure


def _class_index(found: Generation, truth: int | str) -> int:
    classes = found.servable.classes
    if not classes:
        raise HttpError(400, f"{model_name(found)} is not a classifier; it has no classes that could be true")
    if isinstance(truth, str) and truth in classes:
        return classes.index(truth)
    if isinstance(truth, int) and 0 <= truth < len(classes):
        return truth
    raise HttpError(
        400, f"truth {str(truth)[:40]!r} is neither a class index in 0…{len(classes) - 1} nor a class name"
    )


def _check_method(head: Head, method: str) -> None:
    if head.method != method:
        raise HttpError(405, f"{head.method} is not allowed here, {method} is", headers={"Allow": method})


def _get(head: Head, answer: Callable[[], Response]) -> Plan:
    _check_method(head, "GET")
    return Plan(answer=lambda _: answer())


def _post(head: Head, answer: Callable[[memoryview], Response], *, cap: int = SMALL_BODY) -> Plan:
    _check_method(head, "POST")
    return Plan(answer=answer, body_cap=cap)


def _decode(body: memoryview | bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the JSON is not what is expected here: {error}") from error


def _json(value: object) -> Response:
    return Response(body=(msgspec.json.encode(value),))


def _text(text: str) -> Response:
    return Response(body=(text.encode(),), content_type="text/plain; version=0.0.4; charset=utf-8")


def _infer_response(parts: tuple[bytes, ...], coding: str) -> Response:
    """Return the response; only these are compressed, for clients forget to look anywhere else."""
    binary = len(parts) > 1
    headers = {"Inference-Header-Content-Length": str(len(parts[0]))} if binary else {}
    if coding != IDENTITY and sum(map(len, parts)) >= WORTHWHILE:
        headers["Content-Encoding"] = coding
        parts = deflated(parts, coding)
    return Response(body=parts, content_type="application/octet-stream" if binary else JSON, headers=headers)
