"""The shipped dashboards and rules hold to what is documented: known metrics, units, words for people, no plugins."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
RULES = (ROOT / "deploy" / "prometheus" / "rules.yml").read_text()
HOW_TO = (ROOT / "docs" / "how-to" / "prometheus-and-grafana.md").read_text()
REFERENCE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
DOCUMENTED = set(re.findall(r"^\| `(\w+)` \| (?:counter|gauge|histogram) ", REFERENCE, re.MULTILINE))
OF_A_HISTOGRAM = ("_bucket", "_count", "_sum")
NAME = re.compile(r"(?<![\w:])(?:edgewarden|nv_inference|process)_\w+(?![\w:])")
COMES_WITH_GRAFANA = {"row", "stat", "timeseries", "bargauge", "table", "heatmap"}


def undocumented(expression: str) -> list[str]:
    """Return the metrics of an expression that no table of the reference has."""
    stems = [re.sub(rf"({'|'.join(OF_A_HISTOGRAM)})$", "", name) for name in NAME.findall(expression)]
    known = DOCUMENTED | {stem for stem in stems if stem in DOCUMENTED}
    return [stem for name, stem in zip(NAME.findall(expression), stems, strict=True) if not {name, stem} & known]


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(request.param.read_text())
    return read


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_there_are_the_four_dashboards_of_the_how_to() -> None:
    assert [path.stem for path in DASHBOARDS] == ["device", "fleet", "ingest", "models"]
    assert len({json.loads(path.read_text())["uid"] for path in DASHBOARDS}) == len(DASHBOARDS)


def test_every_metric_of_a_dashboard_is_documented(dashboard: dict[str, Any]) -> None:
    asked = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"][1:]]
    assert [] == [name for expression in asked for name in undocumented(expression)]


def test_every_metric_of_the_rules_is_documented() -> None:
    expressions = re.sub(r"(?m)^\s*(#|description:|summary:).*$", "", RULES)
    assert [] == undocumented(expressions)


def test_the_data_source_is_a_variable_everywhere(dashboard: dict[str, Any]) -> None:
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    used = [panel["datasource"] for panel in panels(dashboard)]
    used += [target["datasource"] for panel in panels(dashboard) for target in panel["targets"]]
    assert {"${datasource}"} == {source["uid"] for source in used}


def test_every_panel_has_a_title_a_description_and_a_unit(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_nothing_needs_a_plugin(dashboard: dict[str, Any]) -> None:
    assert {panel["type"] for panel in dashboard["panels"]} <= COMES_WITH_GRAFANA


def test_no_two_panels_share_a_place_or_a_number(dashboard: dict[str, Any]) -> None:
    every = dashboard["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: dict[tuple[int, int], str] = {}
    for panel in every:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]


def test_the_how_to_has_every_alert_and_no_other() -> None:
    assert re.findall(r"^\| (Edgewarden\w+) \|", HOW_TO, re.MULTILINE) == re.findall(r"- alert: (\w+)", RULES)
