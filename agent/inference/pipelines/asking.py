"""Asks a model about one frame, as a client would, and writes down what it answered.

Knows the engine and the shape of a result; it stops there: where frames come from and results go is not its business.
A frame's request counts in the model's statistics like any client's.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from agent.core.pipelines import Preprocess
from agent.inference.engine import Engine
from agent.inference.generation import NORMAL, Generation, Retired, Urgency
from agent.inference.pipelines.flow import Data
from agent.inference.pipelines.preparing import prepare
from agent.inference.prediction import Predictor
from agent.inference.tensors import BadTensor, Signature, count
from runtime.interpreter import DTYPES

MAX_ELEMENTS = 65536  # of all outputs in one result; more would be a file, not a line


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a sink."""

    pipeline: str
    frame: str  # the file, topic or number
    at: int  # UTC ms, when the answer was there
    id: str  # of the request; its truth may be told by it
    model: str
    version: int
    took_us: int
    label: int | None = msgspec.field(default=None, name="class")
    name: str | None = None  # of the class
    confidence: float | None = None
    outputs: dict[str, list[Any]] | None = None


class Asker:
    """Asks one model for one pipeline. Used by one thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        pipeline: str,
        model: str,
        how: Preprocess,
        outputs: bool,
        now_ms: Callable[[], int],
        urgency: Urgency = NORMAL,
    ) -> None:
        """``outputs``: results carry the outputs' numbers also for models with classes."""
        self._engine = engine
        self._pipeline = pipeline
        self._model = model
        self._how = how
        self._outputs = outputs
        self._urgency = urgency
        self._now_ms = now_ms
        self._prefix = f"{pipeline}-{secrets.token_hex(4)}"
        self._numbers = itertools.count(1)
        self._generation: Generation | None = None
        self._predictor: Predictor | None = None

    def find(self) -> None:
        """Raise `UnknownModel` when the model is not served just now."""
        self._engine.find(self._model)

    def ask(self, frame: str, data: Data) -> bytes:
        """Return the result as JSON; raise `BadFrame`, `BadTensor`, `UnknownModel`, `TurnedAway` or `ModelFailed`."""
        started = time.perf_counter_ns()
        while True:
            found = self._engine.find(self._model)
            try:
                inputs = prepare(data, self._how, found.signature)
            except BadTensor:
                found.misfit()
                raise
            request_id = f"{self._prefix}-{next(self._numbers):x}"
            try:
                outputs = found.run(request_id, inputs, self._urgency)
            except Retired:
                continue  # a swap came between: ask the new one, against its own tensors
            return msgspec.json.encode(self._result(found, frame, request_id, outputs, started))

    def _result(
        self, found: Generation, frame: str, request_id: str, outputs: Sequence[bytes], started: int
    ) -> Result:
        label, name, confidence = self._predict(found, outputs)
        with_outputs = self._outputs or not found.servable.classes
        return Result(
            pipeline=self._pipeline,
            frame=frame,
            at=self._now_ms(),
            id=request_id,
            model=found.servable.model,
            version=found.servable.version,
            took_us=(time.perf_counter_ns() - started) // 1000,
            label=label,
            name=name,
            confidence=confidence,
            outputs=_numbers(found.signature, outputs) if with_outputs else None,
        )

    def _predict(self, found: Generation, outputs: Sequence[bytes]) -> tuple[int | None, str | None, float | None]:
        if found is not self._generation:
            classes = found.servable.classes
            self._predictor = Predictor(found.signature.outputs[0], found.servable.calibrator) if classes else None
            self._generation = found
        if self._predictor is None:
            return None, None, None
        label, confidence = self._predictor.predict(outputs[0])
        return label, found.servable.classes[label], round(confidence, 6)

    def forget(self) -> None:
        """Hold on to no generation: one that was swapped out must be freed."""
        self._generation = self._predictor = None


def _numbers(signature: Signature, outputs: Sequence[bytes]) -> dict[str, list[Any]] | None:
    if sum(count(spec) for spec in signature.outputs) > MAX_ELEMENTS:
        return None
    return {
        spec.name: np.frombuffer(data, DTYPES[spec.dtype]).tolist()
        for spec, data in zip(signature.outputs, outputs, strict=True)
    }
