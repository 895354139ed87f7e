"""What the data plane does for a client, whatever the transport: HTTP and gRPC stand in front of this one.

Finds the model, has the request decoded against its tensors, runs it, and sorts what goes wrong into kinds that each
transport has words for. It knows no request line and no message.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import NamedTuple

from agent.inference.describe import Json, metadata, model_statistics, server_metadata
from agent.inference.engine import Engine, UnknownModel
from agent.inference.generation import Generation, ModelFailed
from agent.inference.loading import CannotServe
from agent.inference.pool import DEFAULT_PRIORITY, LOWEST, NORMAL, Retired, TurnedAway, Urgency
from agent.inference.repository import Listed, ModelState, NotAllowed, Repository
from agent.inference.tensors import BadTensor, Call, NotARequest, Signature

IGNORED_PARAMETERS = frozenset({"unload_dependents"})  # of loading and unloading: no model depends on another


class Kind(Enum):
    """Who must act on a failure, and how."""

    UNKNOWN = auto()  # no such model or version
    WRONG = auto()  # the request must be changed
    FORBIDDEN = auto()  # this server is set up otherwise
    BUSY = auto()  # try again later
    FAILED = auto()  # the model or the server failed


class Failure(Exception):
    """A request is not answered. ``retry_after``: seconds until it may be."""

    def __init__(self, kind: Kind, message: str, *, retry_after: int | None = None) -> None:
        """Carry what the client is told."""
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.retry_after = retry_after


class Answered(NamedTuple):
    """An inference that was performed."""

    signature: Signature
    id: str
    call: Call
    outputs: list[bytes]


class Service:
    """One engine, as clients see it. Safe to use from several threads; every failure is a `Failure`."""

    def __init__(self, engine: Engine, repository: Repository) -> None:
        """Speak for an engine and its repository."""
        self._engine = engine
        self._repository = repository
        self._ready: Callable[[], bool] = lambda: True
        # Ids only need to be told apart within what is remembered; the prefix keeps processes apart.
        self._id_prefix = secrets.token_hex(6)
        self._id_numbers = itertools.count(1)

    def when_ready(self, ready: Callable[[], bool]) -> None:
        """Ask ``ready`` for the server's health from now on."""
        self._ready = ready

    @property
    def is_ready(self) -> bool:
        """Tell whether requests are taken."""
        return self._ready()

    # ------------------------------------------------------------ descriptions
    def find(self, model: str, version: str | None = None) -> Generation:
        """Return what serves under a name."""
        try:
            return self._engine.find(model, version or None)
        except UnknownModel as error:
            raise Failure(Kind.UNKNOWN, str(error)) from error

    def is_model_ready(self, model: str, version: str | None = None) -> bool:
        """Tell whether a model serves, in a version if one is given."""
        try:
            self._engine.find(model, version or None)
        except UnknownModel:
            return False
        return True

    def describe(self) -> Json:
        """Return the server's metadata."""
        return server_metadata(repository_is_open=self._repository.is_open)

    def metadata(self, model: str, version: str | None = None) -> Json:
        """Return a model's metadata, with every version that serves unless one is asked for."""
        found = self.find(model, version)
        return metadata(found, [found] if version else self._engine.versions(model))

    def statistics(self, model: str | None = None, version: str | None = None) -> Json:
        """Return the statistics of one model, or of all that serve."""
        if model is None:
            return model_statistics(self._engine.all())
        found = self.find(model, version)
        return model_statistics([found] if version else self._engine.versions(model))

    # ------------------------------------------------------------ repository
    def index(self, *, ready_only: bool) -> tuple[Listed, ...]:
        """Return the models that are known."""
        listed = self._repository.index()
        return tuple(one for one in listed if one.state is ModelState.READY) if ready_only else listed

    def load(self, model: str, parameters: Iterable[str] | Mapping[str, object]) -> None:
        """Have a model loaded anew; parameters that would change it are refused."""
        self._change(self._repository.load, model, parameters)

    def unload(self, model: str, parameters: Iterable[str] | Mapping[str, object]) -> None:
        """Have a model stop serving."""
        self._change(self._repository.unload, model, parameters)

    def _change(self, change: Callable[[str], None], model: str, parameters: Iterable[str]) -> None:
        try:
            if self._repository.is_open:
                _check_no_override(parameters)
            change(model)
        except NotAllowed as error:
            raise Failure(Kind.FORBIDDEN, str(error)) from error
        except UnknownModel as error:
            raise Failure(Kind.UNKNOWN, str(error)) from error
        except CannotServe as error:
            raise Failure(Kind.WRONG, str(error)) from error

    # ------------------------------------------------------------ inference
    def infer(self, model: str, version: str | None, decode: Callable[[Signature], Call]) -> Answered:
        """Decode a request against the model that serves, and run it."""
        arrived = time.perf_counter_ns()
        while True:
            found = self.find(model, version)
            try:
                return self._infer_on(found, decode, arrived)
            except Retired:
                continue  # a swap came between: ask the new one, against its own tensors
            except NotARequest as error:
                raise Failure(Kind.WRONG, str(error)) from error
            except BadTensor as error:
                found.misfit()
                raise Failure(Kind.WRONG, str(error)) from error
            except TurnedAway as error:
                message = f"{model_name(found)}: {error}"
                raise Failure(Kind.BUSY, message, retry_after=error.retry_after) from error
            except ModelFailed as error:
                raise Failure(Kind.FAILED, f"{model_name(found)} failed: {error}") from error

    def _infer_on(self, found: Generation, decode: Callable[[Signature], Call], arrived: int) -> Answered:
        call = decode(found.signature)
        request_id = call.id or f"{self._id_prefix}-{next(self._id_numbers):x}"
        outputs = found.run(request_id, call.inputs, _urgency(call, arrived))
        return Answered(signature=found.signature, id=request_id, call=call, outputs=outputs)


def model_name(found: Generation) -> str:
    """Return a model and its version, for messages."""
    return f"{found.servable.model} {found.servable.version}"


def _urgency(call: Call, arrived: int) -> Urgency:
    """Return what the request's priority and timeout (µs from its arrival) ask for."""
    if not call.priority and not call.timeout_us:
        return NORMAL
    deadline = arrived + call.timeout_us * 1000 if call.timeout_us else None
    return Urgency(min(call.priority or DEFAULT_PRIORITY, LOWEST), deadline)


def _check_no_override(parameters: Iterable[str]) -> None:
    for name in parameters:
        if name not in IGNORED_PARAMETERS:
            raise Failure(
                Kind.WRONG,
                f"parameter {name[:80]!r} is not offered: a model is loaded as its bundle has it, "
                "without another configuration or other files",
            )
