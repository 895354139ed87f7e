"""Could this message be true? Checks that types cannot express, before anything reaches the database. Pure.

Messages from devices are well-typed after `protocol.codec`, but their numbers and words are still the device's: a
count that no column can hold would otherwise stop the ingest for everybody. Raises `Implausible`; what to do about
it (dead letter) is the driver's business.
"""

from collections.abc import Iterable, Sequence

from protocol.messages import Birth, DeviceState, Event, Reply, Report, Resources, Window
from protocol.names import MAX_CLASSES
from protocol.states import CommandOutcome, EventKind
from protocol.statistics import CONFIDENCE_BINS, MAX_INDEX, Histogram, ModelStatistics, TruthStatistics

MAX_NUMBER = 2**53 - 1  # exact in every JSON reader, far below 64 bits even when a million are summed
MAX_COUNT = 2**40  # per window; sums of millions of windows stay below 64 bits
MAX_ID = 64  # characters of a spool or boot id
MAX_TEXT = 500  # characters of an event's detail
MAX_BUCKETS = 2 * MAX_INDEX  # from the lowest bucket to the highest
LOWEST_BUCKET = -MAX_INDEX
MAX_WINDOWS = 1000
MAX_MODELS = 64
MAX_FACTS = 64


class Implausible(ValueError):
    """A message from a device says something that cannot be."""


def check_report(report: Report) -> None:
    """Raise `Implausible` when a report cannot be stored as it is."""
    _stream(report.spool, report.sequence)
    _within("covers", report.covers, 1, report.sequence)
    _within("dropped", report.dropped, 0, MAX_NUMBER)
    _within("number of windows", len(report.windows), 0, MAX_WINDOWS)
    for window in report.windows:
        _window(window)
    for truth in report.truth:
        _truth(truth)


def check_event(event: Event) -> None:
    """Raise `Implausible` when an event cannot be stored as it is."""
    _stream(event.spool, event.sequence)
    _within("at", event.at, 0, MAX_NUMBER)
    _within("version", event.version or 0, 0, MAX_NUMBER)
    _within("attempt", event.attempt or 0, 0, MAX_NUMBER)
    _word("model", event.model or "", MAX_ID)
    _word("digest", event.digest or "", MAX_ID)
    _word("detail", event.detail, MAX_TEXT)


def check_reply(reply: Reply) -> None:
    """Raise `Implausible` when a reply cannot be stored as it is."""
    _stream(reply.spool, reply.sequence)
    _within("at", reply.at, 0, MAX_NUMBER)
    _word("command", reply.command, MAX_ID)
    _word("detail", reply.detail, MAX_TEXT)


def check_state(state: DeviceState) -> None:
    """Raise `Implausible` when a birth, farewell or will cannot be stored as it is."""
    _word("boot", state.boot, MAX_ID)
    _within("connection", state.connection, 0, MAX_NUMBER)
    if isinstance(state, Birth):
        _birth(state)


def blank_report(report: Report) -> Report:
    """Return a report that only takes the number of an implausible one, so that it is not asked for again."""
    _stream(report.spool, report.sequence)
    covers = report.covers if 1 <= report.covers <= report.sequence else 1
    return Report(spool=report.spool, sequence=report.sequence, covers=covers)


def blank_event(event: Event, reason: str) -> Event:
    """Return an event that takes the number of an implausible one and says so."""
    _stream(event.spool, event.sequence)
    detail = f"an event could not be stored: {reason}"[:MAX_TEXT]
    return Event(spool=event.spool, sequence=event.sequence, at=0, kind=EventKind.AGENT, detail=detail)


def blank_reply(reply: Reply) -> Reply:
    """Return a reply to no command that takes the number of an implausible one."""
    _stream(reply.spool, reply.sequence)
    return Reply(spool=reply.spool, sequence=reply.sequence, at=0, command="", outcome=CommandOutcome.FAILED)


def _birth(birth: Birth) -> None:
    for name in ("at", "director_version", "director_root", "image_root"):
        _within(name, getattr(birth, name), 0, MAX_NUMBER)
    _word("spool", birth.spool, MAX_ID)
    _word("agent", birth.agent, MAX_TEXT)
    _word("timezone", birth.timezone, MAX_TEXT)
    _word("device_class", birth.device_class, MAX_TEXT)
    _within("number of models", len(birth.models), 0, MAX_MODELS)
    for model in birth.models:
        _word("model", model.model, MAX_ID)
        _word("digest", model.digest or "", MAX_ID)
        _within("version", model.version or 0, 0, MAX_NUMBER)
    _within("number of facts", len(birth.facts), 0, MAX_FACTS)
    for name, value in birth.facts.items():
        _word("fact", name, MAX_TEXT)
        _word("fact", value, MAX_TEXT)


def _window(window: Window) -> None:
    _within("start", window.start, 0, MAX_NUMBER)
    _within("span", window.span, 0, MAX_NUMBER)
    _within("number of models", len(window.models), 0, MAX_MODELS)
    for statistics in window.models:
        _statistics(statistics)
    if window.resources is not None:
        _resources(window.resources)


def _statistics(statistics: ModelStatistics) -> None:
    _word("digest", statistics.digest, MAX_ID)
    _counts("count", (statistics.requests, statistics.errors, statistics.dropped, statistics.late, statistics.shed))
    _within("late and shed", statistics.late + statistics.shed, 0, statistics.dropped)
    _counts("confidence", statistics.confidence, longest=CONFIDENCE_BINS)
    _counts("classes", statistics.classes, longest=MAX_CLASSES)
    _histogram(statistics.latency)


def _histogram(histogram: Histogram) -> None:
    _within("bucket", histogram.offset, LOWEST_BUCKET, MAX_INDEX)
    _counts("bucket count", histogram.counts, longest=MAX_BUCKETS)
    _within("last bucket", histogram.offset + len(histogram.counts), LOWEST_BUCKET, MAX_INDEX + 1)
    _counts("bucket count", (histogram.zero,))
    _within("sum", histogram.sum, 0, MAX_NUMBER)
    _within("max", histogram.max, 0, MAX_NUMBER)


def _truth(truth: TruthStatistics) -> None:
    _word("digest", truth.digest, MAX_ID)
    _within("minute", truth.minute, 0, MAX_NUMBER)
    for true, predicted, n in truth.confusion:
        _within("class", true, 0, MAX_CLASSES - 1)
        _within("class", predicted, 0, MAX_CLASSES - 1)
        _counts("confusion", (n,))


def _resources(resources: Resources) -> None:
    for name in resources.__struct_fields__:
        _within(name, getattr(resources, name) or 0, -MAX_NUMBER, MAX_NUMBER)


def _stream(spool: str, sequence: int) -> None:
    if not spool:
        raise Implausible("the spool id is empty")
    _word("spool", spool, MAX_ID)
    _within("sequence", sequence, 1, MAX_NUMBER)


def _counts(what: str, counts: Sequence[int] | Iterable[int], *, longest: int | None = None) -> None:
    numbers = tuple(counts)
    if longest is not None:
        _within(f"length of {what}", len(numbers), 0, longest)
    for number in numbers:
        _within(what, number, 0, MAX_COUNT)


def _within(what: str, number: int, low: int, high: int) -> None:
    if not low <= number <= high:
        raise Implausible(f"{what} is {str(number)[:40]}, which is not between {low} and {high}")


def _word(what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise Implausible(f"{what} has {len(text)} characters, more than {longest}")
    if "\x00" in text:
        raise Implausible(f"{what} holds a NUL character")
