"""The pages that need no fleet, typed as they stand."""

from pathlib import Path

import pytest
from docs_shell import DOCS, empty_home, processes_naming, type_page

HOW_TO = DOCS / "how-to"


@pytest.mark.parametrize(
    "name",
    [
        "ask-a-model.md",
        "serve-without-a-fleet.md",
        "publish-a-model.md",
        "pipelines.md",
        "capture.md",
        "call-from-python.md",
    ],
)
def test_every_command_of_the_page_works_and_says_what_is_shown(name: str) -> None:
    with empty_home() as home:
        said = type_page(HOW_TO / name, home, [8000])
        left = processes_naming(home)
    assert {0} == {block.code for block in said}, "\n".join(block.text for block in said)
    assert {} == {block.typed: block.absent for block in said if block.absent}
    assert [] == left


def test_every_kind_of_call_is_shown() -> None:
    page = Path(HOW_TO / "ask-a-model.md").read_text()
    calls = (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/digits\n",
        "/v2/models/digits/config",
        "/v2/models/digits/infer",
        "/v2/models/digits/feedback",
        "/v2/models/digits/stats",
        "/v2/repository/index",
        "/metrics",
        "tritonclient.http",
    )
    assert [] == [call for call in calls if call not in page]
