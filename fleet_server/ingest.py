"""Takes messages from the broker, writes them in batches, and acknowledges twice: to the broker and to the device.

The order is everything: first the transaction is committed, then the message is acknowledged to the broker, then
the device is told what is stored. So nothing is lost by a crash in between; it only comes again, and the database
keeps each report once.

- A message that cannot be read, or is of an unknown or revoked device, becomes a dead letter and is acknowledged: it
  would come again for ever otherwise.
- While the database cannot be written, the batch is kept and tried again, and nothing is acknowledged. The queue
  fills, then messages are not taken, and the broker's Receive Maximum stops the flow.
- A batch that the database refuses for what it holds is halved until the one message at fault is found.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from fleet_server.core.plausibility import (
    Implausible,
    blank_event,
    blank_reply,
    blank_report,
    check_event,
    check_reply,
    check_report,
    check_state,
)
from fleet_server.core.retry import backoff
from fleet_server.ports import Batch, DesiredStates, Registry, Telemetry, Uplink
from protocol.codec import BadMessage, decode_device_state, decode_event, decode_reply, decode_report
from protocol.messages import Acknowledgement, Birth, DeviceState, Event, Reply, Report
from protocol.topics import Channel, DeviceTopic, parse

QUEUE_SIZE = 5000  # messages; five times the Receive Maximum
BATCH_SIZE = 500  # messages in one transaction
BATCH_WAIT = 0.2  # seconds that a batch waits for more
ADMISSION_LIFE = 2.0  # seconds until a device's right to send is looked up again: a revocation counts by then
ACK_INTERVAL = 1.0  # seconds between acknowledgements of one device, unless something is missing
MAX_REMEMBERED = 100_000  # spools; forgetting them costs an acknowledgement sent a second early
MAX_KEPT_PAYLOAD = 4096  # bytes of a message that are kept in a dead letter
_log = logging.getLogger(__name__)


class StoreUnavailable(Exception):
    """The database cannot be written now: locked, full, or gone. Nothing was written; try again."""


class DeadCause(str, Enum):
    """Why a message was put aside, in few words for counting; the dead letter has the sentence."""

    TOPIC = "unknown-topic"
    DEVICE = "not-admitted"  # of an unknown or revoked device
    UNREADABLE = "unreadable"
    IMPLAUSIBLE = "implausible"  # readable, but it cannot be true
    DATABASE = "refused-by-database"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message from the broker, not yet acknowledged to it."""

    topic: str
    payload: bytes
    accept: Callable[[], None]  # acknowledges it to the broker; any thread


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """A message as what it turned out to be: exactly one of these, or a dead letter beside a placeholder."""

    report: tuple[str, Report] | None = None
    event: tuple[str, Event] | None = None
    state: tuple[str, DeviceState] | None = None
    reply: tuple[str, Reply] | None = None
    dead: tuple[str, bytes, str] | None = None
    cause: DeadCause = DeadCause.IMPLAUSIBLE  # of the dead letter


Outcome = tuple[Sequence[Sorted], Sequence[tuple[str, Acknowledgement]]]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How ingest is doing, for people."""

    queued: int
    stored: int  # messages since the start
    dead: int
    refused: int  # not taken because the queue was full
    failing_since: float | None  # monotonic seconds; the database cannot be written


@dataclass(kw_only=True)
class Ingest:
    """The driver. ``offer`` may be called by any thread; one batcher thread does the rest.

    ``on_birth`` is called, after the commit, for a device whose trust is not where the server's is;
    ``on_arrival`` for every birth. ``on_written`` (seconds of a batch) and ``on_dead`` are for those who count.
    """

    telemetry: Telemetry
    registry: Registry
    desired: DesiredStates
    uplink: Uplink
    newest_root: Callable[[], int]  # of the Director
    on_birth: Callable[[str, Birth], None]
    clock: Callable[[], int]  # UTC ms
    on_arrival: Callable[[str], None] = lambda _device: None
    on_written: Callable[[float], None] = lambda _seconds: None
    on_dead: Callable[[DeadCause], None] = lambda _cause: None
    monotonic: Callable[[], float] = time.monotonic
    size: int = QUEUE_SIZE
    _queue: "queue.Queue[Message]" = field(init=False)
    _stop: threading.Event = field(init=False, default_factory=threading.Event)
    _thread: threading.Thread | None = field(init=False, default=None)
    _admitted: dict[str, tuple[float, str | None]] = field(init=False, default_factory=dict)
    _acks: "Acknowledgements" = field(init=False)
    _stored: int = field(init=False, default=0)
    _dead: int = field(init=False, default=0)
    _refused: int = field(init=False, default=0)
    _failing_since: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Make the queue."""
        self._queue = queue.Queue(self.size)
        self._acks = Acknowledgements(send=self.uplink.acknowledge)

    def offer(self, topic: str, payload: bytes, accept: Callable[[], None]) -> bool:
        """Take a message; say no when the queue is full or we end, and then it must not be acknowledged."""
        if self._stop.is_set():
            return False
        try:
            self._queue.put_nowait(Message(topic=topic, payload=payload, accept=accept))
        except queue.Full:
            self._refused += 1
            return False
        return True

    def standing(self) -> Standing:
        """Say how it goes."""
        return Standing(
            queued=self._queue.qsize(),
            stored=self._stored,
            dead=self._dead,
            refused=self._refused,
            failing_since=self._failing_since,
        )

    def start(self) -> None:
        """Start the batcher."""
        self._thread = threading.Thread(target=self._run, name="ingest")
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued, as far as the database lets us, and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    # ------------------------------------------------------------ the batcher
    def _run(self) -> None:
        while not (self._stop.is_set() and self._queue.empty()):
            batch = self._gather()
            if batch and not self._write(batch):
                return
            self._acks.flush(self.monotonic())

    def _gather(self) -> Sequence[Message]:
        """Return up to BATCH_SIZE messages, waiting BATCH_WAIT for more after the first."""
        batch: list[Message] = []
        until = self.monotonic() + BATCH_WAIT
        while len(batch) < BATCH_SIZE:
            left = until - self.monotonic()
            try:
                batch.append(self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _write(self, messages: Sequence[Message]) -> bool:
        """Store, acknowledge to the broker, then tell the devices. False: we are to stop and could not store."""
        outcome = self._store_patiently(messages)
        if outcome is None:
            return False
        sorted_, stored = outcome
        for message in messages:
            _attempt(message.accept, "could not acknowledge to the broker; the message will come again")
        for device, acknowledgement in stored:
            self._acks.add(device, acknowledgement, self.monotonic())
        for device, state in [item.state for item in sorted_ if item.state]:
            if isinstance(state, Birth):
                _attempt(partial(self._greet, device, state), f"could not answer the birth of {device}")
        self._stored += len(messages)
        self._dead += sum(item.dead is not None for item in sorted_)
        for cause in [item.cause for item in sorted_ if item.dead]:
            self.on_dead(cause)
        return True

    # ------------------------------------------------------------ storing
    def _store_patiently(self, messages: Sequence[Message]) -> Outcome | None:
        """Store with back-off for as long as it takes; None when asked to stop before it could be done."""
        tries = 0
        while True:
            began = self.monotonic()
            try:
                sorted_ = [self._sort(message) for message in messages]
                stored = self._store_or_halve(messages, sorted_)
            except StoreUnavailable as error:
                tries += 1
                self._note_failure(error)
                if self._stop.wait(backoff(tries)):
                    return None
            else:
                self._note_success()
                self.on_written(self.monotonic() - began)
                return sorted_, stored

    def _store_or_halve(
        self, messages: Sequence[Message], sorted_: Sequence[Sorted]
    ) -> Sequence[tuple[str, Acknowledgement]]:
        try:
            return self.telemetry.store(_batch(sorted_, self.clock()))
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, one message must not stop those of others
            if len(messages) == 1:
                _log.exception("a message on %s cannot be stored", messages[0].topic)
                refused = _dead(messages[0], f"the database refuses it: {error}", DeadCause.DATABASE)
                self.on_dead(refused.cause)
                return self.telemetry.store(_batch([refused], self.clock()))
        middle = len(messages) // 2
        first = self._store_or_halve(messages[:middle], sorted_[:middle])
        return [*first, *self._store_or_halve(messages[middle:], sorted_[middle:])]

    def _note_failure(self, error: StoreUnavailable) -> None:
        if self._failing_since is None:
            self._failing_since = self.monotonic()
            _log.error("the database cannot be written (%s); nothing is acknowledged until it can", error)

    def _note_success(self) -> None:
        if self._failing_since is not None:
            _log.warning("the database can be written again after %.1f s", self.monotonic() - self._failing_since)
            self._failing_since = None

    # ------------------------------------------------------------ sorting
    def _sort(self, message: Message) -> Sorted:
        topic = parse(message.topic)
        if topic is None:
            return _dead(message, "not a topic of ours", DeadCause.TOPIC)
        refusal = self._refusal(topic.device)
        if refusal is not None:
            return _dead(message, refusal, DeadCause.DEVICE)
        try:
            return _decode(topic, message)
        except BadMessage as error:
            return _dead(message, str(error), DeadCause.UNREADABLE)
        except Implausible as error:
            return _dead(message, str(error), DeadCause.IMPLAUSIBLE)

    def _refusal(self, device: str) -> str | None:
        """Return why a device may not send, remembered for a moment."""
        looked_up, refusal = self._admitted.get(device, (-ADMISSION_LIFE, None))
        now = self.monotonic()
        if now - looked_up < ADMISSION_LIFE:
            return refusal
        refusal = self._look_up(device)
        if len(self._admitted) > MAX_REMEMBERED:
            self._admitted.clear()
        self._admitted[device] = (now, refusal)
        return refusal

    def _look_up(self, device: str) -> str | None:
        try:
            known = self.registry.device(device)
        except Exception as error:
            raise StoreUnavailable(f"cannot look up a device: {error}") from error
        if known is None:
            return "the device is unknown"
        return "the device is revoked" if known.revoked else None

    # ------------------------------------------------------------ births
    def _greet(self, device: str, birth: Birth) -> None:
        self.on_arrival(device)
        desire = self.desired.desired(device)
        wanted = desire.version if desire else 0
        if birth.director_version != wanted or birth.director_root < self.newest_root():
            self.on_birth(device, birth)


@dataclass(kw_only=True)
class Acknowledgements:
    """What devices are still to be told: the newest acknowledgement of each spool, at most one a second per device.

    When something turns out to be missing it is said at once, but the same holes are not named more often.
    """

    send: Callable[[str, Acknowledgement], None]
    _waiting: dict[tuple[str, str], Acknowledgement] = field(init=False, default_factory=dict)
    _sent: dict[tuple[str, str], tuple[float, Acknowledgement]] = field(init=False, default_factory=dict)

    def add(self, device: str, acknowledgement: Acknowledgement, now: float) -> None:
        """Take a new acknowledgement; send it now if it is time or urgent."""
        key = (device, acknowledgement.spool)
        self._waiting[key] = acknowledgement
        if self._is_urgent(key, acknowledgement):
            self._send(key, now)

    def flush(self, now: float) -> None:
        """Send what has waited long enough."""
        if len(self._sent) > MAX_REMEMBERED:
            self._sent.clear()
        for key in list(self._waiting):
            at, _ = self._sent.get(key, (now - ACK_INTERVAL, None))
            if now - at >= ACK_INTERVAL:
                self._send(key, now)

    def _is_urgent(self, key: tuple[str, str], new: Acknowledgement) -> bool:
        if not any(_holes(new)):
            return False
        _, told = self._sent.get(key, (0.0, None))
        return told is None or _holes(told) != _holes(new)

    def _send(self, key: tuple[str, str], now: float) -> None:
        acknowledgement = self._waiting.pop(key)
        self._sent[key] = (now, acknowledgement)
        _attempt(partial(self.send, key[0], acknowledgement), f"could not tell {key[0]} what is stored")


def _holes(acknowledgement: Acknowledgement) -> tuple[tuple[tuple[int, int], ...], ...]:
    return (acknowledgement.missing_telemetry, acknowledgement.missing_events, acknowledgement.missing_replies)


def _decode(topic: DeviceTopic, message: Message) -> Sorted:
    if topic.channel is Channel.STATE:
        state = decode_device_state(message.payload)
        check_state(state)
        return Sorted(state=(topic.device, state))
    if topic.channel is Channel.TELEMETRY:
        return _sort_report(topic.device, decode_report(message.payload), message)
    if topic.channel is Channel.EVENT:
        return _sort_event(topic.device, decode_event(message.payload), message)
    if topic.channel is Channel.REPLY:
        return _sort_reply(topic.device, decode_reply(message.payload), message)
    raise BadMessage(f"nothing is expected on {topic.channel.value}")


def _sort_report(device: str, report: Report, message: Message) -> Sorted:
    """Sort a report; when it cannot be true, its number is still taken, or it would be asked for again for ever."""
    try:
        check_report(report)
    except Implausible as error:
        return Sorted(report=(device, blank_report(report)), dead=_letter(message, str(error)))
    return Sorted(report=(device, report))


def _sort_event(device: str, event: Event, message: Message) -> Sorted:
    try:
        check_event(event)
    except Implausible as error:
        return Sorted(event=(device, blank_event(event, str(error))), dead=_letter(message, str(error)))
    return Sorted(event=(device, event))


def _sort_reply(device: str, reply: Reply, message: Message) -> Sorted:
    try:
        check_reply(reply)
    except Implausible as error:
        return Sorted(reply=(device, blank_reply(reply)), dead=_letter(message, str(error)))
    return Sorted(reply=(device, reply))


def _dead(message: Message, reason: str, cause: DeadCause) -> Sorted:
    return Sorted(dead=_letter(message, reason), cause=cause)


def _letter(message: Message, reason: str) -> tuple[str, bytes, str]:
    return message.topic, message.payload[:MAX_KEPT_PAYLOAD], reason


def _batch(sorted_: Sequence[Sorted], now: int) -> Batch:
    return Batch(
        reports=[item.report for item in sorted_ if item.report],
        events=[item.event for item in sorted_ if item.event],
        states=[item.state for item in sorted_ if item.state],
        replies=[item.reply for item in sorted_ if item.reply],
        dead_letters=[item.dead for item in sorted_ if item.dead],
        received_at=now,
    )


def _attempt(action: Callable[[], object], complaint: str) -> None:
    """Do what may fail without harm: an ingest thread that ends is worse than any of it."""
    try:
        action()
    except Exception:  # noqa: BLE001 - see above; the traceback is logged
        _log.exception(complaint)
