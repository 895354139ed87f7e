"""The tutorial, typed as it stands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_shell import DOCS, Said, empty_home, processes_naming, type_page

PORTS = (8080, 8443, 8883, 8884, 8500)
RIGHT = re.compile(r"(\d+) of 400 right")

pytestmark = [pytest.mark.broker, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with empty_home() as folder:
        yield folder


@pytest.fixture(scope="module")
def said(home: Path) -> list[Said]:
    return type_page(DOCS / "tutorial" / "first-rollback.md", home, PORTS)


def output_of(said: list[Said], command: str) -> list[str]:
    """Return what the blocks with a command printed."""
    return [block.text for block in said if command in block.typed]


def test_every_block_of_the_tutorial_ends_with_0(said: list[Said]) -> None:
    assert {0} == {block.code for block in said}, "\n".join(block.text for block in said)


def test_what_the_tutorial_shows_is_what_the_programs_say(said: list[Said]) -> None:
    assert {} == {block.typed: block.absent for block in said if block.absent}


def test_the_good_model_is_committed_and_answers(said: list[Said]) -> None:
    (deployed,) = output_of(said, "deploy digits 1")
    assert re.search(r"edge-1 +online +v1 +v1 +committed", deployed)
    (answer,) = output_of(said, "/infer -d")
    scores = [int(score) for score in re.findall(r"-?\d+", answer.partition('"data":')[2])]
    assert 5 == scores.index(max(scores))


def test_the_server_shows_the_accuracy_that_the_client_counted(said: list[Said]) -> None:
    first, second, third = (
        int(count) for text in output_of(said, "python digits.py") for count in RIGHT.findall(text)
    )
    after_first, after_third = output_of(said, "edgewarden devices list")
    (after_second,) = output_of(said, "edgewarden models list")
    assert f"{first / 4:.1f} %" in after_first
    assert f"{second / 4:.1f} %" in after_second
    assert "n=800" in after_third
    assert first == third  # the good one came back
    assert second < first - 50  # the bad one is clearly worse


def test_the_rollback_brings_version_1_back(said: list[Said]) -> None:
    (rolled_back,) = output_of(said, "edgewarden rollback")
    assert "rollback digits: version 1 on 1 devices" in rolled_back
    assert re.search(r"edge-1 +online +v1 +v1 +committed", rolled_back)


@pytest.mark.usefixtures("said")
def test_the_tutorial_leaves_no_process_behind(home: Path) -> None:
    assert [] == processes_naming(home / "edgewarden-try")
