"""`/metrics` as a scraper gets it: over a real socket, from a real database that a real ingest fills."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import urllib3
from data_world import DIGEST, MINUTE, NOW, birth, bundle, database, enrol, event, report
from litestar import Litestar, get
from litestar.di import Provide
from litestar.params import FromPath
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as plain_families
from prometheus_client.samples import Sample
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.adapters.database.measures import FleetMeasures
from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseRegistry, DatabaseReleases
from fleet_server.adapters.database.telemetry import DatabaseTelemetry
from fleet_server.adapters.prometheus import FRESH_FOR, IDLE_FACTOR, PrometheusExposition, Sources
from fleet_server.ingest import DeadCause, Ingest
from fleet_server.ports import Batch, RoleFact
from fleet_server.web.metrics import TOKEN_FILE, counted, metrics, scrape_token
from fleet_server.web.serving import Site, WebServer, listen
from protocol.codec import encode
from protocol.messages import Report, RunningModel
from protocol.metrics import proportion
from protocol.states import DeploymentState, EventKind, RejectReason

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
SHA = {1: "1" * 64, 2: "2" * 64}


class Uplink:
    """`ports.Uplink` that nobody listens to."""

    def acknowledge(self, device_id: str, acknowledgement: object) -> None:
        """Say nothing."""


@dataclass(kw_only=True)
class Scene:
    """A database, an ingest, and what is told of them."""

    engine: Engine
    exposition: PrometheusExposition
    telemetry: DatabaseTelemetry
    ingest: Ingest
    seconds: list[float] = field(default_factory=lambda: [1000.0])
    now: list[int] = field(default_factory=lambda: [NOW])

    def store(self, *reports: tuple[str, Report], **more: Any) -> None:
        self.telemetry.store(Batch(reports=reports, received_at=self.now[0], **more))

    def samples(self) -> list[Sample]:
        body, _ = self.exposition.render(OPENMETRICS)
        return [sample for family in text_string_to_metric_families(body.decode()) for sample in family.samples]

    def value(self, name: str, **labels: str) -> float | None:
        found = [sample.value for sample in self.samples() if (sample.name, sample.labels) == (name, labels)]
        return found[0] if found else None


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as every test finds it; made once."""
    folder = tmp_path_factory.mktemp("fresh")
    with database(folder) as engine:
        enrol(engine, "cam-1", "cam-2", "cam-3")
        DatabaseReleases(engine).add_bundles([bundle(1), bundle(2)])
    return folder


@pytest.fixture
def scene(tmp_path: Path, fresh: Path) -> Iterator[Scene]:
    for file in fresh.iterdir():
        shutil.copy(file, tmp_path)
    engine = dialect.connect(f"sqlite:///{tmp_path / 'test.db'}")
    yield make_scene(engine)
    engine.dispose()


def make_scene(engine: Engine) -> Scene:
    seconds, now = [1000.0], [NOW]
    parts: dict[str, Ingest] = {}
    exposition = PrometheusExposition(
        Sources(
            version="1.2.3",
            broker_up=lambda: True,
            ingest=lambda: parts["ingest"],
            measures=FleetMeasures(engine, clock=lambda: now[0]),
            roles=lambda: [RoleFact(name="image-root", version=1, expires_at=NOW, threshold=1, keys=1)],
            certificates={"server": NOW},
            clock=lambda: now[0],
            monotonic=lambda: seconds[0],
        )
    )
    exposition.recall()
    telemetry = DatabaseTelemetry(engine, on_stored=exposition.passing.stored)
    parts["ingest"] = Ingest(
        telemetry=telemetry,
        registry=DatabaseRegistry(engine, clock=lambda: NOW),
        desired=DatabaseDesiredStates(engine),
        uplink=Uplink(),  # type: ignore[arg-type]  # ingest only acknowledges
        newest_root=lambda: 1,
        on_birth=lambda device, message: None,
        clock=lambda: now[0],
        on_written=exposition.passing.wrote,
        on_dead=exposition.passing.buried,
    )
    return Scene(
        engine=engine,
        exposition=exposition,
        telemetry=telemetry,
        ingest=parts["ingest"],
        seconds=seconds,
        now=now,
    )


# ---------------------------------------------------------------- what passes
def test_a_report_counts_once_however_often_it_comes(scene: Scene) -> None:
    scene.store(("cam-1", report(1)))
    scene.store(("cam-1", report(1)), ("cam-1", report(2)))
    assert scene.value("edgewarden_ingest_reports_total") == 2
    assert scene.value("edgewarden_ingest_duplicates_total") == 1


def test_figures_of_a_version_are_those_of_all_devices_together(scene: Scene) -> None:
    short = SHA[1][:16]
    cells = ((0, 0, 8), (1, 0, 2))
    scene.store(*((name, report(1, digest=short, requests=10, errors=1, truth=cells)) for name in ("cam-1", "cam-2")))
    labels = {"model": "digits", "version": "1"}
    assert scene.value("edgewarden_model_requests_total", **labels) == 20
    assert scene.value("edgewarden_model_errors_total", **labels) == 2
    assert scene.value("edgewarden_model_latency_seconds_bucket", le="0.002048", **labels) == 18
    assert scene.value("edgewarden_model_latency_seconds_bucket", le="0.001024", **labels) == 0
    assert scene.value("edgewarden_model_accuracy_ratio", **labels) == 0.8
    assert scene.value("edgewarden_model_accuracy_low_ratio", **labels) == proportion(16, 20).low
    assert scene.value("edgewarden_model_accuracy_samples", **labels) == 20


def test_a_version_that_nobody_published_is_other(scene: Scene) -> None:
    scene.store(("cam-1", report(1, digest="f" * 16, requests=3)))
    assert scene.value("edgewarden_model_requests_total", model="other", version="other") == 3


def test_a_version_that_was_published_just_now_has_its_name_at_once(scene: Scene) -> None:
    scene.store(("cam-1", report(1, digest=SHA[1][:16])))
    scene.seconds[0] += 60
    DatabaseReleases(scene.engine).add_bundles([bundle(3)])
    scene.store(("cam-1", report(2, digest="3" * 16, requests=4)))
    assert scene.value("edgewarden_model_requests_total", model="digits", version="3") == 4


def test_accuracy_survives_a_restart_and_nothing_is_counted_twice(scene: Scene) -> None:
    scene.store(("cam-1", report(1, digest=SHA[1][:16], truth=((0, 0, 9), (0, 1, 1)))))
    again = make_scene(scene.engine)
    again.store(("cam-1", report(2, digest=SHA[1][:16], truth=((0, 0, 5),))))
    labels = {"model": "digits", "version": "1"}
    assert again.value("edgewarden_model_accuracy_samples", **labels) == 15
    assert again.value("edgewarden_model_judged_total", **labels) == 5


LAGS = {
    "just now": (MINUTE, "1.0"),
    "half a minute": (MINUTE + 30_000, "30.0"),
    "by a clock that is ahead": (0, "1.0"),
    "weeks offline": (MINUTE + 20 * 24 * 3_600_000, "+Inf"),
}


@pytest.mark.parametrize(("after", "bound"), LAGS.values(), ids=LAGS.keys())
def test_lag_is_from_the_end_of_the_window_to_the_arrival(scene: Scene, after: int, bound: str) -> None:
    scene.now[0] = NOW + after
    scene.store(("cam-1", report(1, start=NOW)))
    reached = {s.labels["le"]: s.value for s in scene.samples() if s.name == "edgewarden_ingest_lag_seconds_bucket"}
    assert next(le for le, n in reached.items() if n) == bound


def test_events_and_steps_are_counted_by_what_they_say(scene: Scene) -> None:
    failed = event(1, state=DeploymentState.FAILED, reason=RejectReason.NO_SPACE)
    other = event(2, kind=EventKind.GOVERNOR, model=None, version=None, state=None)
    scene.store(events=[("cam-1", failed), ("cam-1", other), ("cam-1", failed)])
    assert scene.value("edgewarden_deployment_steps_total", state="failed", reason="no-space") == 1
    assert scene.value("edgewarden_device_events_total", kind="governor") == 1
    assert scene.value("edgewarden_device_events_total", kind="spool") == 0


BAD = {
    "a topic of somebody else": ("home/lamp", b"on", DeadCause.TOPIC),
    "a device that is not enrolled": ("ew/1/d/stranger/up/t", b"", DeadCause.DEVICE),
    "bytes that are no message": ("ew/1/d/cam-1/up/t", b"\x00{", DeadCause.UNREADABLE),
    "a report that cannot be true": (
        "ew/1/d/cam-1/up/t",
        encode(report(1, requests=1, errors=0, turned_away=(0, 5, 5))),
        DeadCause.IMPLAUSIBLE,
    ),
}


@pytest.mark.parametrize(("topic", "payload", "cause"), BAD.values(), ids=BAD.keys())
def test_a_dead_letter_is_counted_by_its_cause(scene: Scene, topic: str, payload: bytes, cause: DeadCause) -> None:
    accepted = threading.Event()
    scene.ingest.start()
    try:
        scene.ingest.offer(topic, payload, accepted.set)
        assert accepted.wait(20)
    finally:
        scene.ingest.stop()
    counted_ = {c: scene.value("edgewarden_ingest_dead_letters_total", cause=c.value) for c in DeadCause}
    assert counted_ == {c: float(c is cause) for c in DeadCause}
    assert scene.value("edgewarden_ingest_batch_seconds_count") == 1


# ---------------------------------------------------------------- the fleet
def step(sequence: int, state: DeploymentState, version: int, **fields: Any) -> Any:
    return event(sequence, state=state, version=version, digest=SHA.get(version), **fields)


RUNS_1 = birth(models=(RunningModel(model="digits", state=DeploymentState.COMMITTED, version=1, digest=SHA[1]),))
SERVING = {
    "as its birth says": ([], {"1": 1}),
    "on probation": ([step(1, DeploymentState.PROBATION, 2)], {"2": 1}),
    "taken back": ([step(1, DeploymentState.PROBATION, 2), step(2, DeploymentState.ROLLED_BACK, 2)], {"1": 1}),
    "only downloading": ([step(1, DeploymentState.DOWNLOADING, 2)], {"1": 1}),
    "steps of before its birth": ([step(1, DeploymentState.COMMITTED, 2, at=NOW - 1)], {"1": 1}),
}


@pytest.mark.parametrize(("steps", "expected"), SERVING.values(), ids=SERVING.keys())
def test_devices_are_counted_by_what_serves_now(scene: Scene, steps: list[Any], expected: dict[str, int]) -> None:
    scene.store(states=[("cam-1", RUNS_1)], events=[("cam-1", one) for one in steps])
    serving = {s.labels["version"]: s.value for s in scene.samples() if s.name == "edgewarden_devices_serving"}
    assert serving == expected


def test_steps_that_come_later_are_followed(scene: Scene) -> None:
    scene.store(states=[("cam-1", RUNS_1)])
    assert scene.value("edgewarden_devices_serving", model="digits", version="1") == 1
    scene.store(events=[("cam-1", step(1, DeploymentState.COMMITTED, 2))])
    scene.seconds[0] += FRESH_FOR
    assert scene.value("edgewarden_devices_serving", model="digits", version="2") == 1


def test_presence_is_that_of_the_registry(scene: Scene) -> None:
    scene.store(states=[("cam-1", birth())])
    DatabaseRegistry(scene.engine, clock=lambda: NOW).revoke("cam-2", NOW)
    told = {s.labels["presence"]: s.value for s in scene.samples() if s.name == "edgewarden_devices"}
    assert told == {"new": 1, "online": 1, "stale": 0, "offline": 0, "lost": 0, "revoked": 1}


def test_missing_numbers_are_told_by_stream(scene: Scene) -> None:
    scene.store(("cam-1", report(1)), ("cam-1", report(5)))
    assert scene.value("edgewarden_ingest_missing_numbers", stream="telemetry") == 3
    assert scene.value("edgewarden_ingest_missing_numbers", stream="events") == 0


# ---------------------------------------------------------------- what it costs
@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_more: object) -> None:
        seen.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(engine, "before_cursor_execute", note)


def test_the_fleet_is_read_once_in_a_while_however_often_somebody_scrapes(scene: Scene) -> None:
    scene.samples()
    with statements(scene.engine) as seen:
        for _ in range(5):
            scene.samples()
    assert seen == []
    scene.seconds[0] += FRESH_FOR
    with statements(scene.engine) as seen:
        scene.samples()
    assert seen


def test_a_fleet_that_is_slow_to_read_is_read_less_often(scene: Scene) -> None:
    def take_a_second(*_event: object) -> None:
        scene.seconds[0] += 1

    sa.event.listen(scene.engine, "checkout", take_a_second)
    scene.samples()
    sa.event.remove(scene.engine, "checkout", take_a_second)
    scene.seconds[0] += FRESH_FOR
    with statements(scene.engine) as seen:
        scene.samples()
    assert seen == []
    scene.seconds[0] += IDLE_FACTOR * 3  # the smallest query, the versions, the fleet
    with statements(scene.engine) as seen:
        scene.samples()
    assert seen


def test_a_scrape_never_reads_what_devices_reported(scene: Scene) -> None:
    scene.store(("cam-1", report(1)))
    with statements(scene.engine) as seen:
        scene.samples()
    raw = (tables.report, tables.statistics, tables.resources, tables.truth)
    assert [s for s in seen if any(f"FROM {table.name}" in s for table in raw)] == []


def test_the_number_of_queries_does_not_grow_with_the_fleet(scene: Scene) -> None:
    with statements(scene.engine) as few:
        scene.samples()
    enrol(scene.engine, *(f"more-{k}" for k in range(50)))
    scene.store(states=[(f"more-{k}", birth()) for k in range(50)])
    scene.seconds[0] += FRESH_FOR
    with statements(scene.engine) as many:
        scene.samples()
    assert len([s for s in many if s.startswith("SELECT")]) == len([s for s in few if s.startswith("SELECT")])


def test_a_database_that_does_not_answer_is_said_and_nothing_else_is_lost(scene: Scene) -> None:
    with scene.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE presence RENAME TO aside"))
    assert scene.value("edgewarden_broker_up") == 1
    assert [s for s in scene.samples() if s.name == "edgewarden_devices"] == []
    with scene.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE aside RENAME TO presence"))


def test_no_series_names_a_device(scene: Scene) -> None:
    scene.store(("cam-1", report(1)), ("cam-2", report(7)), states=[("cam-1", RUNS_1)], events=[("cam-2", event(1))])
    values = {value for sample in scene.samples() for value in sample.labels.values()}
    assert [value for value in values if "cam-" in value or DIGEST[:16] in value] == []


def test_the_process_is_told_too(scene: Scene) -> None:
    names = {sample.name for sample in scene.samples()}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= names


# ---------------------------------------------------------------- over the web
@get("/things/{name:str}", sync_to_thread=False)
def thing(name: FromPath[str]) -> str:
    if name == "broken":
        raise RuntimeError("broken")
    return name


@dataclass(kw_only=True)
class Given:
    """The part of `Parts` that the page needs."""

    exposition: PrometheusExposition | None
    scrape_token: str


@contextmanager
def served(given: Given, answered: Callable[..., None]) -> Iterator[Callable[..., urllib3.BaseHTTPResponse]]:
    app = Litestar(
        [metrics, thing], dependencies={"parts": Provide(lambda: given, sync_to_thread=False)}, logging_config=None
    )
    site = Site(app=counted(app, "console", answered), listener=listen("127.0.0.1", 0))
    server = WebServer([site])
    server.start()
    with urllib3.PoolManager(retries=False, timeout=20.0) as pool:
        yield lambda method, path, **more: pool.request(method, f"http://127.0.0.1:{site.port}{path}", **more)
    server.stop()


WRONG = {
    "nothing": {},
    "another token": {"Authorization": "Bearer something"},
    "the token as a password": {"Authorization": "Basic s3cret"},
    "an empty token": {"Authorization": "Bearer "},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
def test_without_the_token_nothing_is_told(scene: Scene, headers: dict[str, str]) -> None:
    with served(Given(exposition=scene.exposition, scrape_token="s3cret"), scene.exposition.passing.answered) as ask:
        refused = ask("GET", "/metrics", headers=headers)
    assert (refused.status, b"edgewarden_" in refused.data) == (401, False)


def test_a_server_without_a_token_tells_nobody(scene: Scene) -> None:
    with served(Given(exposition=scene.exposition, scrape_token=""), scene.exposition.passing.answered) as ask:
        assert ask("GET", "/metrics", headers={"Authorization": "Bearer "}).status == 401


FORMATS = {
    "what Prometheus asks for": (
        OPENMETRICS,
        "application/openmetrics-text; version=1.0.0",
        text_string_to_metric_families,
    ),
    "what curl asks for": ("*/*", "text/plain; version=0.0.4", plain_families),
}


@pytest.mark.parametrize(("accept", "content_type", "parse"), FORMATS.values(), ids=FORMATS.keys())
def test_a_scraper_gets_the_format_that_it_likes(scene: Scene, accept: str, content_type: str, parse: Any) -> None:
    headers = {"Authorization": "Bearer s3cret", "Accept": accept}
    with served(Given(exposition=scene.exposition, scrape_token="s3cret"), scene.exposition.passing.answered) as ask:
        answer = ask("GET", "/metrics", headers=headers)
    assert answer.headers["Content-Type"].startswith(content_type)
    assert "edgewarden_devices" in {family.name for family in parse(answer.data.decode())}


def test_requests_are_counted_by_route_never_by_what_people_make_up(scene: Scene) -> None:
    given = Given(exposition=scene.exposition, scrape_token="s3cret")
    with served(given, scene.exposition.passing.answered) as ask:
        for path in ("/things/a", "/things/b", "/nowhere", "/elsewhere", "/things/broken"):
            ask("GET", path)
        ask("BREW", "/nowhere")
        deadline = time.monotonic() + 20
        while len(by_route(scene)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert by_route(scene) == {
        ("GET", "/things/{name}", "200"): 2,
        ("GET", "none", "404"): 2,
        ("GET", "/things/{name}", "500"): 1,
        ("other", "none", "404"): 1,
    }


def by_route(scene: Scene) -> dict[tuple[str, str, str], float]:
    return {
        (s.labels["method"], s.labels["route"], s.labels["status"]): s.value
        for s in scene.samples()
        if s.name == "edgewarden_http_requests_total"
    }


def test_the_token_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    token = scrape_token(tmp_path)
    assert (scrape_token(tmp_path), len(token) > 40) == (token, True)
    assert (tmp_path / TOKEN_FILE).stat().st_mode & 0o777 == 0o600


def test_an_operator_may_choose_the_token(tmp_path: Path) -> None:
    (tmp_path / TOKEN_FILE).write_text("chosen\n")
    assert scrape_token(tmp_path) == "chosen"
