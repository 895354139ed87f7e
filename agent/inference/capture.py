"""Keeps samples of what a model was asked: chosen by the policy, redacted, encrypted, inside the day's budget.

A client's thread only decides and copies; redacting, encrypting and writing happen on one thread of their own, with
a bounded queue before it. What is kept lies in ``captures/``, one file per sample, and is read with the device's key
by `samples.SampleFolder`. Which requests are chosen is decided in ``core/capturing``; nothing leaves the device here.
"""

import logging
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from agent.core.capturing import CapturePolicy, Day, Seen, State, Trigger, charge, choose, refuse, state_of, today
from agent.inference.redaction import Redact, Refused, redactor
from agent.inference.samples import OVERHEAD, Head, NoSuchSample, Sample, SampleFolder, Tensor, Unreadable
from agent.inference.tensors import Buffer
from protocol.manifest import Calibrator, TensorSpec
from runtime.calibrator import Floats, probabilities, score_floor
from runtime.interpreter import DTYPES
from runtime.preprocess import dequantise

if TYPE_CHECKING:
    from agent.inference.generation import Generation

log = logging.getLogger(__name__)

SWEEP_SECONDS = 600.0  # between two looks for samples that have expired
TICK = 0.25
STOP_SECONDS = 3.0
MAX_LISTED = 1000
MAX_SCORERS = 32


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """A request on its way to the disk."""

    seen: Seen
    trigger: Trigger
    sample: Sample


class Capture:
    """Implements what a generation offers its requests to. Safe to use from several threads."""

    def __init__(
        self,
        policy: CapturePolicy,
        folder: SampleFolder,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Keep nothing before `start`."""
        self.policy = policy
        self.kept: Counter[str] = Counter()  # by trigger
        self.refused: Counter[str] = Counter()  # by reason
        self.dropped = 0  # chosen, and the queue was full
        self.failed = 0  # chosen, and could not be written
        self.error = ""  # the last one
        self._folder = folder
        self._now_ms = now_ms
        self._chance = chance
        self._day = Day()
        self._scorers: dict[str, _Scorer] = {}  # by digest
        self._redact: Redact | None = None
        self._queue: Queue[_Chosen] = Queue(policy.queue)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ life
    def start(self) -> None:
        """Write in the background. A redaction that cannot be had is an error: nothing is kept without it."""
        self._redact = redactor(self.policy)
        self._day = self._folder.day()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Write what was chosen, and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    # ------------------------------------------------------------ on a client's thread
    def offer(
        self,
        found: "Generation",
        request_id: str,
        inputs: Sequence[Buffer],
        outputs: Sequence[bytes],
    ) -> bool:
        """Decide about a request that was answered, and copy it if it is chosen. Never raises, never waits.

        Returns whether a trigger chose it, also if it cannot be kept.
        """
        try:
            return self._offer(found, request_id, inputs, outputs, disagrees=False)
        except Exception as error:  # noqa: BLE001 - a client must not feel it
            self._fail(error)
        return False

    def disagreed(
        self,
        found: "Generation",
        request_id: str,
        inputs: Sequence[Buffer],
        outputs: Sequence[bytes],
    ) -> None:
        """Decide again about a request that nothing chose: the candidate answered it otherwise. Never raises."""
        if not self.policy.disagreement:
            return
        try:
            self._offer(found, request_id, inputs, outputs, disagrees=True)
        except Exception as error:  # noqa: BLE001 - the shadow goes on
            self._fail(error)

    def _offer(
        self,
        found: "Generation",
        request_id: str,
        inputs: Sequence[Buffer],
        outputs: Sequence[bytes],
        *,
        disagrees: bool,
    ) -> bool:
        now = self._now_ms()
        seen = self._seen(found, outputs, disagrees=disagrees)
        day = today(self._day, now)
        trigger = choose(self.policy, seen, day)
        if trigger is None:
            return False
        size = sum(map(len, inputs)) + sum(map(len, outputs)) + OVERHEAD
        if reason := refuse(self.policy, day, seen, trigger, size):
            self.refused[reason.value] += 1
            return True
        sample = _copy(found, request_id, inputs, outputs, at=now, trigger=trigger, label=seen.label)
        try:
            self._queue.put_nowait(_Chosen(seen=seen, trigger=trigger, sample=sample))
        except Full:
            self.dropped += 1
        return True

    def _seen(self, found: "Generation", outputs: Sequence[bytes], *, disagrees: bool) -> Seen:
        servable, chance = found.servable, self._chance()
        if not servable.classes:
            return Seen(model=servable.model, disagrees=disagrees, chance=chance)
        scores = self._scorer(found).scores(outputs[0])
        return Seen(
            model=servable.model,
            label=int(scores.argmax()),
            margin=_margin(scores) if self.policy.margin_below else None,
            entropy=_entropy(scores) if self.policy.entropy_above < 1 else None,
            disagrees=disagrees,
            chance=chance,
        )

    def _scorer(self, found: "Generation") -> "_Scorer":
        scorer = self._scorers.get(found.servable.digest)
        if scorer is None:
            if len(self._scorers) >= MAX_SCORERS:
                self._scorers.clear()
            scorer = _Scorer(found.signature.outputs[0], found.servable.calibrator)
            self._scorers[found.servable.digest] = scorer
        return scorer

    # ------------------------------------------------------------ on its own thread
    def _run(self) -> None:
        swept = -SWEEP_SECONDS
        while not self._stop.is_set() or not self._queue.empty():
            if time.monotonic() - swept >= SWEEP_SECONDS:
                swept = time.monotonic()
                self._guarded(self._sweep)
            try:
                chosen = self._queue.get(timeout=TICK)
            except Empty:
                continue
            self._guarded(lambda chosen=chosen: self._keep(chosen))  # type: ignore[misc]  # a bound default

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a full disk, a hook that fails: the next sample may do better
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        said = f"{type(error).__name__}: {error}"[:500]
        if said != self.error:
            log.warning("a sample was not kept: %s", said)
        self.error = said

    def _keep(self, chosen: _Chosen) -> None:
        try:
            sample = self._redact(chosen.sample) if self._redact else chosen.sample
        except Refused:
            self.refused["redaction"] += 1
            return
        data = self._folder.seal(sample)
        with self._folder.locked():  # another data plane may live beside this one, and the budget is one
            day = today(self._folder.day(), self._now_ms())
            reason = refuse(self.policy, day, chosen.seen, chosen.trigger, len(data))
            if reason is None:
                self._day = charge(day, chosen.seen, len(data))
                self._folder.keep_day(self._day)  # before the sample: a crash between costs budget, never breaks it
            else:
                self._day = day
        if reason:
            self.refused[reason.value] += 1
            return
        self._folder.write(sample.head.id, data)
        self.kept[chosen.trigger.value] += 1

    def _sweep(self) -> None:
        now = self._now_ms()
        for sample_id, at in self._folder.ids():
            if state_of(self.policy, at, now) == "expired":
                self._folder.expire(sample_id)
        self._folder.bury()

    # ------------------------------------------------------------ for local programs
    def status(self, sample_id: str) -> dict[str, Any]:
        """Return what is known of a sample; raise `NoSuchSample`."""
        at = self._folder.taken_at(sample_id)
        state = state_of(self.policy, at, self._now_ms())
        if state == "expired" or self._folder.is_expired(sample_id):
            return {"id": sample_id, "state": "expired", "at": at}
        try:
            head, size = self._folder.head(sample_id)
        except Unreadable as error:
            return {"id": sample_id, "state": state, "at": at, "error": str(error)}
        return {
            "id": sample_id,
            "state": state,
            "at": at,
            "bytes": size,
            "request": head.request,
            "model": head.model,
            "version": head.version,
            "trigger": head.trigger,
            "class": head.label,
        }

    def listed(self, state: State | None) -> dict[str, Any]:
        """Return the newest samples, of one state if one is asked for, and what was not kept."""
        found: list[dict[str, Any]] = []
        for sample_id, _ in sorted(self._folder.ids(expired=True), key=lambda one: one[1], reverse=True):
            try:
                status = self.status(sample_id)
            except NoSuchSample:
                continue  # it went away just now
            if state is None or status["state"] == state:
                found.append(status)
            if len(found) == MAX_LISTED:
                break
        day = today(self._day, self._now_ms())
        return {
            "captures": found,
            "today": {"samples": day.samples, "bytes": day.bytes},
            "dropped": self.dropped,
            "refused": dict(self.refused),
            "failed": self.failed,
            "error": self.error,
        }

    def metrics(self) -> Iterator[str]:
        """Return Prometheus lines."""
        yield from _family("edgewarden_capture_kept", "Samples kept, by trigger")
        yield from (f'edgewarden_capture_kept{{trigger="{one.value}"}} {self.kept[one.value]}' for one in Trigger)
        yield from _family("edgewarden_capture_refused", "Chosen samples that were not kept, by reason")
        for reason, count in sorted(self.refused.items()):
            yield f'edgewarden_capture_refused{{reason="{reason}"}} {count}'
        yield from _family("edgewarden_capture_dropped", "Chosen samples that found the queue full")
        yield f"edgewarden_capture_dropped {self.dropped}"
        yield from _family("edgewarden_capture_failed", "Chosen samples that could not be written")
        yield f"edgewarden_capture_failed {self.failed}"


def _family(name: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} counter"


class _Scorer:
    """Reads the scores of a classifier; for an 8-bit output from a table, since it is done for every request."""

    def __init__(self, spec: TensorSpec, calibrator: Calibrator | None) -> None:
        """``spec``: the output with the scores."""
        self._spec = spec
        self._calibrator = calibrator
        self._dtype = DTYPES[spec.dtype]
        self._weights = _weights(spec, calibrator) if self._dtype.itemsize == 1 else None

    def scores(self, data: bytes) -> Floats:
        """Return the (calibrated) scores as `probabilities` does."""
        if self._weights is None:
            return probabilities(np.frombuffer(data, self._dtype), self._spec, self._calibrator).ravel()
        weights = self._weights[np.frombuffer(data, np.uint8)]
        return weights if self._calibrator is None else weights / weights.sum()


def _weights(spec: TensorSpec, calibrator: Calibrator | None) -> Floats:
    """Return what each byte is worth: its score, or with a calibrator its share before it is divided by the sum."""
    values = dequantise(np.arange(256, dtype=np.uint8).view(DTYPES[spec.dtype]), spec).astype(np.float64)
    if calibrator is None:
        return values
    logits = np.log(np.maximum(values, score_floor(spec))) / calibrator.temperature
    weights: Floats = np.exp(logits - logits.max())
    return weights


def _margin(scores: Floats) -> float:
    if scores.size < 2:  # noqa: PLR2004 - a margin is between two
        return 1.0
    second, best = np.partition(scores, -2)[-2:]
    return float(best - second)


def _entropy(scores: Floats) -> float:
    """Return the entropy of the scores, 1 being the most there can be."""
    if scores.size < 2:  # noqa: PLR2004 - one class is never in doubt
        return 0.0
    positive = scores[scores > 0]
    total = float(positive.sum())
    if total <= 0:
        return 1.0
    shares = positive / total
    return float(-(shares * np.log(shares)).sum() / np.log(scores.size))


def _copy(
    found: "Generation",
    request_id: str,
    inputs: Sequence[Buffer],
    outputs: Sequence[bytes],
    *,
    at: int,
    trigger: Trigger,
    label: int | None,
) -> Sample:
    signature = found.signature
    return Sample(
        head=Head(
            id=f"{at:013x}-{secrets.token_hex(8)}",
            at=at,
            request=request_id,
            model=signature.model,
            version=signature.version,
            digest=found.servable.digest,
            trigger=trigger.value,
            label=label,
        ),
        inputs=tuple(map(_tensor, signature.inputs, inputs)),
        outputs=tuple(map(_tensor, signature.outputs, outputs)),
    )


def _tensor(spec: TensorSpec, data: Buffer) -> Tensor:
    return Tensor(name=spec.name, datatype=spec.dtype, shape=spec.shape, data=bytes(data))


__all__ = ["Capture", "NoSuchSample", "Unreadable"]
