"""`/metrics`: what is counted as it passes, and the state of server and fleet, written as OpenMetrics or plain text.

The only file that knows prometheus_client. What each figure of the state means is said in `core/exposition.py`; here
is what passes: reports, events, dead letters, batches, orders, requests. The whole fleet is read at most once per
`FRESH_FOR` seconds, however often somebody scrapes, and a large one less often.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError

from fleet_server.adapters.database.measures import FleetMeasures, Known
from fleet_server.core.cohorts import JUDGED_OVER, CohortFacts, Cohorts
from fleet_server.core.exposition import (
    Distribution,
    Family,
    FleetFacts,
    IngestFacts,
    Kind,
    Reading,
    ServerFacts,
    families,
)
from fleet_server.ingest import DeadCause, Ingest
from fleet_server.ports import RoleFact, Stored
from protocol.messages import Event, Report
from protocol.states import DeploymentState, EventKind

FRESH_FOR = 10.0  # seconds that a reading of the fleet is shown again, at least
IDLE_FACTOR = 20  # a reading is shown again for so many times what it took: a large fleet costs no more than 5 %
ASK_AGAIN = 5.0  # seconds before an unknown digest is a reason to look for new versions again
LAG_BOUNDS = (
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
    900,
    3600,
    21_600,
    86_400,
    604_800,
)  # seconds; weeks offline are normal
BATCH_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
ANSWER_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
NO_REASON = "none"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the state comes from. ``roles`` are those of the signed metadata in force."""

    version: str
    broker_up: Callable[[], bool]
    ingest: Callable[[], Ingest]
    measures: FleetMeasures
    roles: Callable[[], Iterable[RoleFact]]
    certificates: Mapping[str, int]  # name -> UTC ms of expiry
    clock: Callable[[], int]  # UTC ms
    monotonic: Callable[[], float] = time.monotonic


class Passing:
    """Counts what passes. Any thread; the callbacks that drivers and adapters take are its methods."""

    def __init__(self, registry: CollectorRegistry, cohorts: "LockedCohorts") -> None:
        # Else each counter has a second series that says when the process started.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library forgot its return type
        self._cohorts = cohorts
        self._reports = Counter("edgewarden_ingest_reports", "Reports stored, each once", registry=registry)
        self._again = Counter(
            "edgewarden_ingest_duplicates", "Reports and events that were stored already", registry=registry
        )
        self._lag = Histogram(
            "edgewarden_ingest_lag_seconds",
            "From the end of a report's last window, by the device's clock, to its arrival",
            buckets=LAG_BOUNDS,
            registry=registry,
        )
        self._batch = Histogram(
            "edgewarden_ingest_batch_seconds", "Time to write a batch", buckets=BATCH_BOUNDS, registry=registry
        )
        self._dead = Counter(
            "edgewarden_ingest_dead_letters", "Messages put aside, by cause", ["cause"], registry=registry
        )
        self._events = Counter("edgewarden_device_events", "Events of devices, by kind", ["kind"], registry=registry)
        self._steps = Counter(
            "edgewarden_deployment_steps",
            "Steps of updates on devices, by the state that was reached and the reason given",
            ["state", "reason"],
            registry=registry,
        )
        self._signed = Counter(
            "edgewarden_desired_states_signed", "Desired states signed by the Director", registry=registry
        )
        self._published = Counter(
            "edgewarden_desired_states_published",
            "Desired states handed to the broker, the same again included",
            registry=registry,
        )
        self._requests = Counter(
            "edgewarden_http_requests",
            "Requests answered, by port, route and status",
            ["port", "method", "route", "status"],
            registry=registry,
        )
        self._answers = Histogram(
            "edgewarden_http_request_seconds",
            "Time to answer a request",
            ["port"],
            buckets=ANSWER_BOUNDS,
            registry=registry,
        )
        self._announce()

    def stored(self, stored: Stored) -> None:
        """Count what a batch added to the database."""
        self._reports.inc(len(stored.reports))
        self._again.inc(stored.again)
        for report in stored.reports:
            self._observe_lag(report, stored.received_at)
        for event in stored.events:
            self._count_event(event)
        self._cohorts.count(stored)

    def wrote(self, seconds: float) -> None:
        """Count a batch."""
        self._batch.observe(seconds)

    def buried(self, cause: DeadCause) -> None:
        """Count a dead letter."""
        self._dead.labels(cause.value).inc()

    def signed(self) -> None:
        """Count a desired state that was signed."""
        self._signed.inc()

    def published(self) -> None:
        """Count a desired state that was handed to the broker."""
        self._published.inc()

    def answered(self, port: str, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; ``route`` is a template, ``method`` one of a known few."""
        self._requests.labels(port, method, route, str(status)).inc()
        self._answers.labels(port).observe(seconds)

    def _observe_lag(self, report: Report, received_at: int) -> None:
        if report.windows:
            end = max(window.start + window.span for window in report.windows)
            self._lag.observe(max(0, received_at - end) / 1000)

    def _count_event(self, event: Event) -> None:
        self._events.labels(event.kind.value).inc()
        if event.kind is EventKind.DEPLOYMENT and event.state is not None:
            self._steps.labels(event.state.value, event.reason.value if event.reason else NO_REASON).inc()

    def _announce(self) -> None:
        """Begin at 0 what there may be, so that the first one is seen as an increase."""
        for cause in DeadCause:
            self._dead.labels(cause.value)
        for kind in EventKind:
            self._events.labels(kind.value)
        for state in DeploymentState:
            self._steps.labels(state.value, NO_REASON)


class LockedCohorts:
    """`core/cohorts.py` for several threads, under the names of published versions."""

    def __init__(self, measures: FleetMeasures, *, clock: Callable[[], int], monotonic: Callable[[], float]) -> None:
        self._measures = measures
        self._clock = clock
        self._monotonic = monotonic
        self._cohorts = Cohorts()
        self._known: Known = {}
        self._asked = -ASK_AGAIN
        self._lock = threading.Lock()

    def recall(self) -> None:
        """Take up the truth of the last hour; before anything new is counted."""
        now = self._clock()
        self.learn()
        with self._lock:
            for digest, minute, right, judged in self._measures.truth_since(now - JUDGED_OVER):
                self._cohorts.recall(self._known.get(digest), minute, right, judged, now)

    def learn(self) -> Known:
        """Ask which versions are published."""
        self._asked = self._monotonic()
        self._known = self._measures.versions()
        return self._known

    def count(self, stored: Stored) -> None:
        """Add what new reports say."""
        if not self._is_known(stored.reports) and self._monotonic() - self._asked >= ASK_AGAIN:
            self._try_to_learn()
        with self._lock:
            for report in stored.reports:
                self._count_report(report, stored.received_at)

    def _try_to_learn(self) -> None:
        """Ask for new versions; without an answer theirs are counted as others' figures, and ingest goes on."""
        try:
            self.learn()
        except SQLAlchemyError as error:
            _log.warning("the published versions cannot be read for /metrics: %s", error)

    def facts(self) -> tuple[CohortFacts, ...]:
        """Return the figures of every version."""
        with self._lock:
            return self._cohorts.facts(self._clock())

    def _count_report(self, report: Report, now: int) -> None:
        for window in report.windows:
            for model in window.models:
                self._cohorts.count_window(self._known.get(model.digest), model, now)
        for truth in report.truth:
            self._cohorts.count_truth(self._known.get(truth.digest), truth, now)

    def _is_known(self, reports: Sequence[Report]) -> bool:
        return all(
            model.digest in self._known for report in reports for window in report.windows for model in window.models
        )


class PrometheusExposition:
    """`ports.Exposition`: the registry of one server."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._cohorts = LockedCohorts(sources.measures, clock=sources.clock, monotonic=sources.monotonic)
        self._registry = CollectorRegistry(auto_describe=False)
        self.passing = Passing(self._registry, self._cohorts)
        ProcessCollector(registry=self._registry)
        self._registry.register(_State(self._families))
        self._reading: Reading | None = None
        self._read_at = 0.0
        self._lock = threading.Lock()

    def recall(self) -> None:
        """Take up what the database knows of the last hour; call before ingest starts."""
        self._cohorts.recall()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return body and content type, as the scraper likes it best."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _families(self) -> Sequence[Family]:
        sources = self._sources
        ingest = sources.ingest()
        standing = ingest.standing()
        return families(
            ServerFacts(
                version=sources.version,
                broker_up=sources.broker_up(),
                ingest=IngestFacts(
                    queued=standing.queued,
                    limit=ingest.size,
                    written=standing.stored,
                    refused=standing.refused,
                    failing=standing.failing_since is not None,
                ),
                reading=self._newest_reading(),
                cohorts=self._cohorts.facts(),
                roles={role.name: role.expires_at for role in sources.roles()},
                certificates=sources.certificates,
            )
        )

    def _newest_reading(self) -> Reading:
        with self._lock:  # who comes while it is read waits, and is shown the same
            now = self._sources.monotonic()
            if self._reading is None or now - self._read_at >= max(FRESH_FOR, IDLE_FACTOR * self._reading.took_s):
                self._reading, self._read_at = self._read(now), now
            return self._reading

    def _read(self, began: float) -> Reading:
        answered, fleet = None, None
        try:
            self._sources.measures.ping()
            answered = self._sources.monotonic() - began
            fleet = self._read_fleet()
        except SQLAlchemyError as error:
            _log.warning("the figures for /metrics cannot be read: %s", error)
        took = self._sources.monotonic() - began
        return Reading(fleet=fleet, took_s=took, answered_s=answered, at_s=self._sources.clock() / 1000)

    def _read_fleet(self) -> FleetFacts:
        return self._sources.measures.fleet(self._cohorts.learn())


class _State(Collector):
    """Families as prometheus_client wants them."""

    def __init__(self, told: Callable[[], Sequence[Family]]) -> None:
        self._told = told

    def collect(self) -> Iterable[Metric]:
        return [_metric(family) for family in self._told()]


def _metric(family: Family) -> Metric:
    if family.kind is Kind.HISTOGRAM:
        return _histogram(family)
    if family.kind is Kind.INFO:
        info = InfoMetricFamily(family.name, family.help)
        for sample in family.samples:
            info.add_metric([], dict(zip(family.labels, sample.labels, strict=True)))
        return info
    make = CounterMetricFamily if family.kind is Kind.COUNTER else GaugeMetricFamily
    metric = make(family.name, family.help, labels=family.labels)
    for sample in family.samples:
        metric.add_metric(sample.labels, sample.value)
    return metric


def _histogram(family: Family) -> Metric:
    metric = HistogramMetricFamily(family.name, family.help, labels=family.labels)
    for distribution in family.distributions:
        metric.add_metric(distribution.labels, _buckets(distribution), distribution.sum)
    return metric


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    names = [*(repr(float(bound)) for bound in distribution.bounds), "+Inf"]
    return list(zip(names, map(float, distribution.cumulative()), strict=True))
