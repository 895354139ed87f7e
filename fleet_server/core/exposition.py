"""What `/metrics` says: facts about the server and its fleet become families of samples. Pure.

Knows every name, its labels and its help, and keeps the number of series bounded: a device is never a label, and only
the largest versions and the roles that expire soonest have a series of their own. A figure without support is absent,
never 0. What is counted as it passes (requests, reports, events) is in `adapters/prometheus.py`; how this is written
down is too.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fleet_server.core.cohorts import CohortFacts, Version, bounds_us
from protocol.metrics import Proportion
from protocol.states import PresenceState

MAX_VERSIONS = 50  # versions with a count of devices of their own; the rest is one "other"
MAX_ROLES = 30  # roles of the trust metadata, those that expire first
OTHER = "other"
VERSION_LABELS = ("model", "version")


class Kind(str, Enum):
    """Types of OpenMetrics that are used here."""

    COUNTER = "counter"  # its samples end in _total
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"  # its samples end in _info


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A value under its labels."""

    labels: tuple[str, ...] = ()
    value: float


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A histogram under its labels: counts up to each bound, not cumulative, the last without bound."""

    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    def cumulative(self) -> tuple[int, ...]:
        """Return the counts as the format wants them."""
        return tuple(itertools.accumulate(self.counts))


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric with all its series; it is announced even while it has none."""

    name: str  # without the ending of counters and infos
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    samples: Sequence[Sample] = ()
    distributions: Sequence[Distribution] = ()


@dataclass(frozen=True, kw_only=True)
class IngestFacts:
    """How ingest stands."""

    queued: int
    limit: int
    written: int
    refused: int
    failing: bool


@dataclass(frozen=True, kw_only=True)
class FleetFacts:
    """What the database says of the whole fleet."""

    presence: Mapping[PresenceState, int]
    serving: Mapping[Version | None, int]  # None: a version that is not published here
    missing: Mapping[str, int]  # by stream
    dead_letters: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One reading of the database: None where it could not be read."""

    fleet: FleetFacts | None
    took_s: float  # all of it
    answered_s: float | None  # the smallest possible question
    at_s: float  # UTC


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """Everything that a scrape needs. Expiries are UTC ms."""

    version: str
    broker_up: bool
    ingest: IngestFacts
    reading: Reading
    cohorts: Sequence[CohortFacts] = ()
    roles: Mapping[str, int] = field(default_factory=dict)
    certificates: Mapping[str, int] = field(default_factory=dict)


def families(facts: ServerFacts) -> tuple[Family, ...]:
    """Return everything that is told of a state, as opposed to what is counted as it passes."""
    return (
        *_server(facts),
        *_ingest(facts.ingest),
        *_fleet(facts.reading.fleet),
        *_usage(facts.cohorts),
        *_judgement(facts.cohorts),
        *_expiry(facts),
    )


def largest(counts: Mapping[Version | None, int], most: int) -> list[tuple[tuple[str, str], int]]:
    """Return the largest counts under their labels, and the sum of the rest as "other" when there is a rest."""
    named = sorted(((v, n) for v, n in counts.items() if v is not None), key=lambda item: (-item[1], item[0]))
    told = [((version[0], str(version[1])), n) for version, n in sorted(named[:most])]
    rest = sum(counts.values()) - sum(n for _, n in told)
    return [*told, ((OTHER, OTHER), rest)] if rest else told


# ---------------------------------------------------------------- the server
def _server(facts: ServerFacts) -> Iterable[Family]:
    reading = facts.reading
    build = Sample(labels=(facts.version,), value=1)
    yield Family(
        name="edgewarden_server", kind=Kind.INFO, help="Version of the server", labels=("version",), samples=[build]
    )
    yield _gauge("edgewarden_broker_up", "Whether the server is connected to its broker", facts.broker_up)
    yield _gauge("edgewarden_database_up", "Whether the database answers", reading.answered_s is not None)
    yield _gauge("edgewarden_database_seconds", "How long the smallest query took", reading.answered_s)
    yield _gauge(
        "edgewarden_snapshot_seconds",
        "How long the figures of the fleet took to read",
        _if_read(reading, reading.took_s),
    )
    yield _gauge(
        "edgewarden_snapshot_timestamp_seconds",
        "When they were read; at most every 10 s",
        _if_read(reading, reading.at_s),
    )


def _if_read(reading: Reading, value: float) -> float | None:
    return None if reading.fleet is None else value


def _ingest(facts: IngestFacts) -> Iterable[Family]:
    yield _gauge("edgewarden_ingest_queue_messages", "Messages waiting to be written", facts.queued)
    yield _gauge("edgewarden_ingest_queue_limit_messages", "Messages that may wait", facts.limit)
    yield _gauge("edgewarden_ingest_failing", "Whether the database cannot be written just now", facts.failing)
    yield _counter("edgewarden_ingest_messages", "Messages written and acknowledged", facts.written)
    yield _counter("edgewarden_ingest_refused", "Times a message was not taken: the queue was full", facts.refused)


# ---------------------------------------------------------------- the fleet
def _fleet(fleet: FleetFacts | None) -> Iterable[Family]:
    yield Family(
        name="edgewarden_devices",
        kind=Kind.GAUGE,
        help="Enrolled devices by what the server believes of their connection",
        labels=("presence",),
        samples=[Sample(labels=(s.value,), value=fleet.presence.get(s, 0)) for s in PresenceState] if fleet else (),
    )
    yield Family(
        name="edgewarden_devices_serving",
        kind=Kind.GAUGE,
        help="Devices by model and version that serves there",
        labels=VERSION_LABELS,
        samples=[Sample(labels=k, value=n) for k, n in largest(fleet.serving, MAX_VERSIONS)] if fleet else (),
    )
    yield Family(
        name="edgewarden_ingest_missing_numbers",
        kind=Kind.GAUGE,
        help="Sequence numbers that devices have used and that have not arrived, by stream",
        labels=("stream",),
        samples=[Sample(labels=(stream,), value=n) for stream, n in sorted(fleet.missing.items())] if fleet else (),
    )
    yield _gauge(
        "edgewarden_dead_letters_kept", "Dead letters in the database", fleet.dead_letters if fleet else None
    )


# ---------------------------------------------------------------- models
def _usage(cohorts: Sequence[CohortFacts]) -> Iterable[Family]:
    named = [(_labels(cohort.version), cohort) for cohort in cohorts]

    def counter(name: str, help_: str, count: Callable[[CohortFacts], int]) -> Family:
        samples = [Sample(labels=labels, value=count(cohort)) for labels, cohort in named]
        return Family(name=name, kind=Kind.COUNTER, help=help_, labels=VERSION_LABELS, samples=samples)

    yield counter("edgewarden_model_requests", "Requests worked on, errors included", lambda c: c.requests)
    yield counter("edgewarden_model_errors", "Requests that failed", lambda c: c.errors)
    yield counter("edgewarden_model_dropped", "Requests turned away on the device", lambda c: c.dropped)
    yield counter("edgewarden_model_judged", "Predictions whose truth arrived", lambda c: c.judged)
    yield counter("edgewarden_model_correct", "Predictions that were right", lambda c: c.right)
    yield Family(
        name="edgewarden_model_latency_seconds",
        kind=Kind.HISTOGRAM,
        help="Latency on the device of requests that were answered",
        labels=VERSION_LABELS,
        distributions=[_latency(labels, cohort) for labels, cohort in named],
    )


def _latency(labels: tuple[str, ...], cohort: CohortFacts) -> Distribution:
    bounds = tuple(bound / 1_000_000 for bound in bounds_us())
    return Distribution(labels=labels, bounds=bounds, counts=cohort.octaves, sum=cohort.latency_sum_us / 1_000_000)


def _judgement(cohorts: Sequence[CohortFacts]) -> Iterable[Family]:
    judged = [(_labels(cohort.version), cohort.accuracy) for cohort in cohorts if cohort.accuracy is not None]

    def gauge(name: str, help_: str, figure: Callable[[Proportion], float | None]) -> Family:
        values = [(labels, figure(accuracy)) for labels, accuracy in judged]
        samples = [Sample(labels=labels, value=value) for labels, value in values if value is not None]
        return Family(name=name, kind=Kind.GAUGE, help=help_, labels=VERSION_LABELS, samples=samples)

    yield gauge("edgewarden_model_accuracy_ratio", "Share of right predictions of the last hour", lambda a: a.value)
    yield gauge("edgewarden_model_accuracy_low_ratio", "Lower end of its 95 % interval", lambda a: a.low)
    yield gauge("edgewarden_model_accuracy_high_ratio", "Upper end of its 95 % interval", lambda a: a.high)
    yield gauge("edgewarden_model_accuracy_samples", "How many predictions it is of", lambda a: a.n)


# ---------------------------------------------------------------- expiry
def _expiry(facts: ServerFacts) -> Iterable[Family]:
    soonest = sorted(facts.roles.items(), key=lambda item: (item[1], item[0]))[:MAX_ROLES]
    yield Family(
        name="edgewarden_trust_expiry_timestamp_seconds",
        kind=Kind.GAUGE,
        help="When a role of the signed metadata expires",
        labels=("role",),
        samples=[Sample(labels=(role,), value=at / 1000) for role, at in sorted(soonest)],
    )
    yield Family(
        name="edgewarden_certificate_expiry_timestamp_seconds",
        kind=Kind.GAUGE,
        help="When a certificate that this process uses expires",
        labels=("certificate",),
        samples=[Sample(labels=(name,), value=at / 1000) for name, at in sorted(facts.certificates.items())],
    )


def _labels(version: Version | None) -> tuple[str, ...]:
    return (OTHER, OTHER) if version is None else (version[0], str(version[1]))


def _gauge(name: str, help_: str, value: float | None) -> Family:
    samples = [] if value is None else [Sample(value=float(value))]
    return Family(name=name, kind=Kind.GAUGE, help=help_, samples=samples)


def _counter(name: str, help_: str, value: float) -> Family:
    return Family(name=name, kind=Kind.COUNTER, help=help_, samples=[Sample(value=value)])
