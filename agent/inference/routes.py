"""The Open Inference Protocol v2 over HTTP: which path means what, and which status each failure has.

Translates between `http` and the engine, and decides nothing itself. A request is planned from its head alone, so
that the size of its body is capped by what the endpoint, and the model, can use.
"""

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from agent.inference.describe import metadata, model_config, model_statistics, prometheus, server_metadata
from agent.inference.engine import Engine, UnknownModel
from agent.inference.generation import Generation, ModelFailed, QueueFull, Retired
from agent.inference.http import Response
from agent.inference.parsing import Head, HttpError
from agent.inference.tensors import MAX_ID, BadTensor, NotARequest, decode_call, encode_answer
from agent.inference.truth import AlreadyJudged, UnknownPrediction

SMALL_BODY = 64 * 1024  # bytes; enough for every endpoint but infer
_NOT_OFFERED = frozenset({"systemsharedmemory", "cudasharedmemory", "trace", "logging"})
_VERSIONED = ("", "ready", "config", "stats", "infer")
T = TypeVar("T")
_METHODS = {"": "GET", "ready": "GET", "config": "GET", "stats": "GET", "infer": "POST", "feedback": "POST"}


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The true class of a past prediction: its index or its name."""

    id: str
    truth: int | str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request is going to be answered: the largest body it may have, and what makes the answer."""

    answer: Callable[[memoryview], Response]
    body_cap: int = SMALL_BODY


class Routes:
    """The endpoints over one engine."""

    def __init__(self, engine: Engine, *, managed: bool, feedback_on_tcp: bool = False, body_cap: int) -> None:
        """``managed``: a fleet decides what serves here, so local clients may not."""
        self._engine = engine
        self._managed = managed
        self._feedback_on_tcp = feedback_on_tcp
        self._body_cap = body_cap
        self._ready: Callable[[], bool] = lambda: True
        # Ids only need to be told apart within what is remembered; the prefix keeps processes apart.
        self._id_prefix = secrets.token_hex(6)
        self._id_numbers = itertools.count(1)
        self._fixed: dict[tuple[str, ...], Callable[[Head], Plan]] = {
            ("metrics",): lambda head: _get(head, lambda: _text(prometheus(self._engine))),
            ("v2",): lambda head: _get(head, lambda: _json(server_metadata())),
            ("v2", "health", "live"): lambda head: _get(head, lambda: _json({"live": True})),
            ("v2", "health", "ready"): lambda head: _get(head, self._health),
            ("v2", "models", "stats"): lambda head: _get(head, self._all_statistics),
            ("v2", "repository", "index"): lambda head: _post(head, lambda body: _json(self._index(body))),
        }

    def when_ready(self, ready: Callable[[], bool]) -> None:
        """Ask ``ready`` for the server's health from now on."""
        self._ready = ready

    def plan(self, head: Head, *, over_tcp: bool) -> Plan:
        """Return how to answer a request; raise `HttpError`."""
        try:
            return self._plan(head, over_tcp=over_tcp)
        except UnknownModel as error:
            raise HttpError(404, str(error)) from error

    def _plan(self, head: Head, *, over_tcp: bool) -> Plan:
        if head.path in self._fixed:
            return self._fixed[head.path](head)
        match head.path:
            case ("v2", "models", model, "versions", version, *rest) if len(rest) <= 1:
                return self._plan_model(head, model, version, "".join(rest), over_tcp=over_tcp)
            case ("v2", "models", model, *rest) if len(rest) <= 1:
                return self._plan_model(head, model, None, "".join(rest), over_tcp=over_tcp)
            case ("v2", "repository", "models", _, "load" | "unload"):
                return _post(head, self._refuse_change, cap=self._body_cap)
            case ("v2", extension, *_) if extension in _NOT_OFFERED:
                raise HttpError(501, f"{extension} is not offered; see the extensions at GET /v2")
        raise HttpError(404, f"there is nothing at /{'/'.join(head.path)[:80]}; the protocol starts at /v2")

    def _plan_model(self, head: Head, model: str, version: str | None, what: str, *, over_tcp: bool) -> Plan:
        if what not in _METHODS or (version is not None and what not in _VERSIONED):
            raise HttpError(404, f"a model has no {what[:40]!r}")
        _check_method(head, _METHODS[what])
        found = self._engine.find(model, version)
        match what:
            case "infer":
                cap = min(found.signature.body_cap, self._body_cap)
                return Plan(answer=lambda body: self._infer(head, model, version, body), body_cap=cap)
            case "feedback":
                self._check_feedback_allowed(over_tcp=over_tcp)
                return Plan(answer=lambda body: self._judge(found, body))
            case "ready":
                return Plan(answer=lambda _: _json({"name": model, "ready": True}))
            case "config":
                return Plan(answer=lambda _: _json(model_config(found)))
            case "stats":
                return Plan(answer=lambda _: _json(model_statistics([found])))
        return Plan(answer=lambda _: _json(metadata(found)))

    # ------------------------------------------------------------ health and repository
    def _health(self) -> Response:
        if not self._ready():
            raise HttpError(503, "the server is going away", headers={"Retry-After": "1"})
        return _json({"ready": True})

    def _all_statistics(self) -> Response:
        return _json(model_statistics(self._engine.all()))

    def _index(self, body: memoryview) -> list[dict[str, str]]:
        _decode(body or b"{}", dict[str, bool])  # {"ready": …} changes nothing: what is listed is ready
        return [
            {"name": one.servable.model, "version": str(one.servable.version), "state": "READY", "reason": ""}
            for one in self._engine.all()
        ]

    def _refuse_change(self, _: memoryview) -> Response:
        if self._managed:
            raise HttpError(400, "models are managed by the fleet here; they are loaded and unloaded by its rollouts")
        raise HttpError(501, "loading and unloading is not offered; name the models when the server is started")

    # ------------------------------------------------------------ inference
    def _infer(self, head: Head, model: str, version: str | None, body: memoryview) -> Response:
        while True:
            try:
                return self._infer_on(self._engine.find(model, version), head, body)
            except Retired:
                continue  # a swap came between: ask the new one, against its own tensors
            except UnknownModel as error:
                raise HttpError(404, str(error)) from error

    def _infer_on(self, found: Generation, head: Head, body: memoryview) -> Response:
        signature = found.signature
        try:
            call = decode_call(body, head.json_length, signature)
            request_id = call.id or f"{self._id_prefix}-{next(self._id_numbers):x}"
            parts = encode_answer(call, request_id, found.run(request_id, call.inputs), signature)
        except NotARequest as error:
            raise HttpError(400, str(error)) from error
        except BadTensor as error:
            found.misfit()
            raise HttpError(400, str(error)) from error
        except QueueFull as error:
            raise HttpError(503, f"{model_name(found)}: {error}", headers=_retry_after(error)) from error
        except ModelFailed as error:
            raise HttpError(500, f"{model_name(found)} failed: {error}") from error
        return _infer_response(parts)

    # ------------------------------------------------------------ feedback
    def _check_feedback_allowed(self, *, over_tcp: bool) -> None:
        if over_tcp and not self._feedback_on_tcp:
            raise HttpError(403, "feedback is taken on the Unix socket only, unless --feedback-on-tcp is set")

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


def model_name(found: Generation) -> str:
    """Return a model and its version, for messages."""
    return f"{found.servable.model} {found.servable.version}"


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


def _infer_response(parts: tuple[bytes, ...]) -> Response:
    if len(parts) == 1:
        return Response(body=parts)
    headers = {"Inference-Header-Content-Length": str(len(parts[0]))}
    return Response(body=parts, content_type="application/octet-stream", headers=headers)


def _retry_after(error: QueueFull) -> dict[str, str]:
    return {"Retry-After": str(error.retry_after)}
