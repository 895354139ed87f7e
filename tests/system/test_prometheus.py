"""A real Prometheus scrapes a real server and a real data plane, and every query that is shipped has an answer."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from demo import story
from demo.world import World

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
REFERENCE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
DEVICE = "edge-1"
FILLED_IN = {"$__rate_interval": "30s", "$__range": "5m", "$instance": ".*", "$model": ".*", "$version": ".*"}
COMPARISON = re.compile(r"(==|!=|>=|<=|(?<![=!])>(?!=)|(?<![=!])<(?!=))(?!\s*bool)(?=\s*\d)")
PATIENCE = 60.0  # seconds

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A fleet of one device, and the Prometheus that looks at it."""

    world: World
    prometheus: str  # its address
    config: Path
    http: urllib3.PoolManager

    def ask(self, path: str, **fields: str) -> Any:
        answer = self.http.request("GET", f"{self.prometheus}/api/v1/{path}", fields=fields)
        body = json.loads(answer.data)
        assert body["status"] == "success", f"{fields}: {body}"
        return body["data"]

    def answers(self, expression: str) -> bool:
        """Say whether a query gives at least one number."""
        data = self.ask("query", query=expression)
        values = [data] if data["resultType"] == "scalar" else data["result"]
        return any(not math.isnan(float(item["value"][1])) for item in values)

    def scrape(self, target: str, **headers: str) -> str:
        answer = self.http.request("GET", f"http://{target}/metrics", headers=headers)
        assert answer.status == 200, answer.data
        return answer.data.decode()


def eventually(what: str, look: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.3)


def unanswered(watched: Watched, expressions: list[str]) -> list[str]:
    """Return the expressions that have no answer, after having waited for one."""
    left = list(dict.fromkeys(expressions))
    deadline = time.monotonic() + PATIENCE
    while left and time.monotonic() < deadline:
        left = [expression for expression in left if not watched.answers(expression)]
        time.sleep(0.3 if left else 0)
    return left


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    world = World(tmp_path_factory.mktemp("watched") / "fleet")
    with ExitStack() as stack:
        stack.callback(world.programs.stop_all)
        make_history(world)
        stream = world.streams[DEVICE]
        stream.start()
        stack.callback(stream.stop)
        world.wait("accuracy", lambda: world.model_on(DEVICE).accuracy)
        config = configure(world)
        address = stack.enter_context(running_prometheus(config))
        http = stack.enter_context(urllib3.PoolManager(retries=False, timeout=20.0))
        yield Watched(world=world, prometheus=address, config=config, http=http)


def make_history(world: World) -> None:
    """Let one device enrol, install a model and have a pipeline and captures, so that every metric is there."""
    story.start_server(world)
    story.make_keys(world)
    token = world.folder / "token"
    world.edgewarden("tokens", "create", "--uses", "1", "--output", str(token))
    settings = world.config(DEVICE)
    frames = world.folder / "frames"
    frames.mkdir()
    settings.write_text(
        settings.read_text() + "\n[capture]\nenabled = true\nrandom = 0.1\n\n"
        f'[[pipeline]]\nname = "frames"\nmodel = "digits"\n'
        f'source = {{ kind = "directory", path = "{frames}" }}\n'
        f'sink = [{{ kind = "file", path = "{world.folder / "results.jsonl"}" }}]\n'
    )
    world.enrol(DEVICE, token)
    world.start_agent(DEVICE)
    story.publish(world, "v1")
    world.edgewarden("deploy", "digits", "1", "--device", DEVICE)
    world.wait("version 1 serves", lambda: world.model_on(DEVICE).running_version == 1)


def configure(world: World) -> Path:
    """Write the example configuration for this fleet: other addresses, another token file, both jobs, often."""
    folder = world.folder / "prometheus"
    folder.mkdir()
    shutil.copy(PROMETHEUS / "rules.yml", folder)
    text = (PROMETHEUS / "prometheus.yml").read_text()
    changes = {
        "  # - job_name": "  - job_name",
        "  #   static_configs": "    static_configs",
        "  #     - targets": "      - targets",
        "127.0.0.1:8080": f"127.0.0.1:{world.ports.console}",
        "127.0.0.1:8500": f"127.0.0.1:{world.ports.inference[DEVICE]}",
        "/etc/prometheus/edgewarden-metrics-token": str(world.data / "metrics-token"),
        "scrape_interval: 15s": "scrape_interval: 1s",
        "evaluation_interval: 15s": "evaluation_interval: 1s",
    }
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    config = folder / "prometheus.yml"
    config.write_text(text)
    return config


@contextmanager
def running_prometheus(config: Path) -> Iterator[str]:
    """Run a Prometheus on a free port; it needs nothing else than the Debian package."""
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (config.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            eventually("Prometheus listens", lambda: process.poll() is not None or is_open(port))
            assert process.poll() is None, (config.parent / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------- the files by themselves
def test_the_example_configuration_is_well_formed() -> None:
    promtool("check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml"))


def test_the_rules_are_well_formed() -> None:
    promtool("check", "rules", str(PROMETHEUS / "rules.yml"))


def test_the_alerts_fire_for_what_they_are_about_and_are_silent_beside_it() -> None:
    promtool("test", "rules", str(PROMETHEUS / "rules_test.yml"))


# ---------------------------------------------------------------- with a fleet
def test_prometheus_takes_the_configuration_and_reaches_server_and_device(watched: Watched) -> None:
    promtool("check", "config", str(watched.config))
    eventually("both targets are up", lambda: up(watched) == {"edgewarden-server": 1.0, "edgewarden-device": 1.0})


def up(watched: Watched) -> dict[str, float]:
    return {item["metric"]["job"]: float(item["value"][1]) for item in watched.ask("query", query="up")["result"]}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_has_an_answer(watched: Watched, dashboard: Path) -> None:
    assert [] == unanswered(watched, expressions_of(dashboard))


def expressions_of(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert found
    return [filled_in(expression) for expression in found]


def filled_in(expression: str) -> str:
    for name, value in FILLED_IN.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def test_every_recording_rule_has_an_answer(watched: Watched) -> None:
    rules = rules_of(watched, "recording")
    assert [] == unanswered(watched, [rule["query"] for rule in rules])
    assert [] == unanswered(watched, [rule["name"] for rule in rules])


def test_every_alert_asks_for_something_that_is_there(watched: Watched) -> None:
    """With `bool` a comparison answers 0 or 1; without, an alert that is misspelt looks like one that is silent."""
    alerts = rules_of(watched, "alerting")
    asked = [COMPARISON.sub(r"\1 bool", rule["query"]) for rule in alerts]
    assert all("bool" in expression for expression in asked)
    assert [] == unanswered(watched, asked)


def rules_of(watched: Watched, kind: str) -> list[dict[str, Any]]:
    found = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"] if rule["type"] == kind]
    assert found
    return found


def test_nothing_is_wrong_with_a_healthy_fleet(watched: Watched) -> None:
    alerts = {rule["name"]: rule for rule in rules_of(watched, "alerting")}
    eventually("every rule was evaluated", lambda: all(r["health"] == "ok" for r in rules_of(watched, "alerting")))
    assert [] == [name for name, rule in alerts.items() if rule["state"] == "firing"]


def test_the_figures_are_those_of_the_console(watched: Watched) -> None:
    eventually("the devices online", lambda: watched.answers('edgewarden_devices{presence="online"} == 1'))
    eventually("what serves", lambda: watched.answers('edgewarden_devices_serving{model="digits", version="1"} == 1'))
    accuracy = watched.world.model_on(DEVICE).accuracy
    assert accuracy
    (told,) = watched.ask("query", query="edgewarden_model_accuracy_ratio")["result"]
    assert told["metric"]["version"] == "1"
    assert abs(float(told["value"][1]) - (accuracy.value or 0)) < 0.2


def test_prometheus_takes_every_line_of_both(watched: Watched) -> None:
    for job in ("edgewarden-server", "edgewarden-device"):
        assert watched.answers(f'scrape_samples_scraped{{job="{job}"}} > 0')


def test_without_the_token_the_server_tells_nothing(watched: Watched) -> None:
    url = f"{watched.world.console}/metrics"
    assert watched.http.request("GET", url, redirect=False).status == 401


# ---------------------------------------------------------------- the reference
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", re.MULTILINE)
Metric = tuple[str, str]  # type, help


def documented(heading: str) -> dict[str, tuple[Metric, set[str]]]:
    """Return name -> (type and help, labels) of a table of the page."""
    _, _, after = REFERENCE.partition(f"## {heading}\n")
    rows = ROW.findall(after.partition("\n## ")[0])
    return {name: ((kind, help_), set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, help_ in rows}


def told(text: str) -> dict[str, Metric]:
    """Return name -> (type, help) of a scrape in plain text."""
    helps = dict(re.findall(r"^# HELP (\w+) (.*)$", text, re.MULTILINE))
    return {name: (kind, helps[name]) for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)}


def labels_of(text: str, name: str) -> set[str]:
    """Return the labels of a metric's samples."""
    samples = re.findall(rf"^{name}(?:_bucket|_count|_sum)?(?:{{(.*)}})? ", text, re.MULTILINE)
    return {label for sample in samples for label in re.findall(r'(\w+)="', sample)} - {"le"}


def assert_told_as_documented(heading: str, scraped: str) -> None:
    page = documented(heading)
    assert {name: metric for name, (metric, _) in page.items()} == told(scraped)
    found = {name: labels_of(scraped, name) for name in page}
    assert {name: labels for name, (_, labels) in page.items() if found[name]} == {
        n: f for n, f in found.items() if f
    }


def test_the_reference_lists_what_the_server_tells_and_nothing_else(watched: Watched) -> None:
    token = (watched.world.data / "metrics-token").read_text().strip()
    target = f"127.0.0.1:{watched.world.ports.console}"
    assert_told_as_documented("Fleet server", watched.scrape(target, Authorization=f"Bearer {token}"))


def test_the_reference_lists_what_the_data_plane_tells_and_nothing_else(watched: Watched) -> None:
    scraped = watched.scrape(f"127.0.0.1:{watched.world.ports.inference[DEVICE]}")
    assert_told_as_documented("Data plane of a device", scraped)
