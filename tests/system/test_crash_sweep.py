"""A drawn part of `make soak-crash`: the agent is killed at moments of an update, and comes back right."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "agent_adapters"))

import crash_stories
import crash_sweep
from crash_journal import JOURNAL, POWER
from crash_world import Fleet, far_ends

POINTS = 16
STORIES = ["first", "delta", "superseded", "withdrawn", "rotation", "enrolment-again", "renewal"]


@pytest.mark.parametrize("story", STORIES)
def test_an_agent_that_is_killed_or_loses_power_comes_back_right(story: str) -> None:
    outcome = crash_sweep.sweep([story], sample=POINTS, seed=7)
    assert outcome.failures == []
    assert outcome.points == POINTS


def test_the_sweep_finds_a_store_that_leaves_half_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep itself can fail: here is an agent that forgets to look for what an earlier one left."""
    monkeypatch.setattr("crash_world.remove_leftovers", lambda _: None)
    outcome = crash_sweep.sweep(["withdrawn"], sample=60)
    assert any("is left" in failure for failure in outcome.failures)


def test_a_power_cut_in_a_delta_costs_no_whole_bundle(tmp_path: Path) -> None:
    """What the delta made took its name before it was on the disk, and a delta with a hole was given up."""
    with far_ends() as (book, authority):
        story = crash_stories.story("delta", lambda: Fleet(book, authority))
        found = crash_sweep.record(story, tmp_path / "delta")
        cut = [moment for moment in found if moment.mode == JOURNAL and moment.after.endswith((".ewb", ".delta"))]
        assert cut
        assert [[]] * len(cut) == [crash_sweep.try_moment(story, moment, tmp_path / "delta")[0] for moment in cut]


def test_what_was_flushed_of_a_download_that_broke_off_has_a_name_after_a_power_cut(tmp_path: Path) -> None:
    with far_ends() as (book, authority):
        story = crash_stories.story("broken-off", lambda: Fleet(book, authority))
        found = crash_sweep.record(story, tmp_path / "broken-off")
    flushed = [moment for moment in found if moment.mode == POWER and moment.after.endswith(".part")]
    assert any(len(data or b"") >= 9000 for path, data in flushed[-1].image.items() if path.endswith(".part"))


def test_a_first_download_that_is_finished_is_there_after_a_power_cut(tmp_path: Path) -> None:
    """The folder of downloads was made, and its own name was not on the disk."""
    with far_ends() as (book, authority):
        story = crash_stories.story("first", lambda: Fleet(book, authority))
        found = crash_sweep.record(story, tmp_path / "first")
    finished = next(moment for moment in found if moment.mode == POWER and "'downloaded'" in moment.after)
    assert any(path.endswith(".ewb") for path in finished.image)
