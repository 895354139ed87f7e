"""Versions side by side, and the swap that has no room for both."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from inference_parts import IMAGE, engine, servable

from agent.channel import CANDIDATE, STABLE
from agent.inference.engine import Engine, UnknownModel
from agent.inference.generation import Retired
from agent.inference.loading import CannotServe, Servable
from agent.inference.parsing import Head
from agent.inference.repository import Repository
from agent.inference.routes import Routes
from protocol.manifest import Golden


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Engine]:
    """Version 1 is stable, version 2 the candidate."""
    one = engine()
    one.serve(servable(tmp_path, "v1", 1))
    one.serve(servable(tmp_path, "v2", 2), CANDIDATE)
    yield one
    one.close()


def served(one: Engine) -> list[int]:
    return [found.servable.version for found in one.all()]


@pytest.mark.parametrize(("asked", "version"), [(None, 1), (STABLE, 1), (CANDIDATE, 2), ("1", 1), ("2", 2)], ids=str)
def test_a_version_is_found_by_its_number_or_alias(both: Engine, asked: str | None, version: int) -> None:
    found = both.find("digits", asked)
    assert found.servable.version == version
    assert found.run("r", (IMAGE,))


def test_what_is_not_there_is_unknown_and_the_error_names_what_is(both: Engine) -> None:
    with pytest.raises(UnknownModel, match="version 1 and 2 is served"):
        both.find("digits", "3")
    both.withdraw("digits", CANDIDATE)
    with pytest.raises(UnknownModel, match="'candidate' of digits is not served here; version 1"):
        both.find("digits", CANDIDATE)


def test_a_candidate_alone_is_not_asked_by_the_models_name(tmp_path: Path) -> None:
    one = engine()
    one.serve(servable(tmp_path, "v2", 2), CANDIDATE)
    with pytest.raises(UnknownModel, match="'stable' of digits is not served here; version 2"):
        one.find("digits")
    one.close()


def test_both_count_for_themselves(both: Engine) -> None:
    both.find("digits").run("r1", (IMAGE,))
    both.find("digits", "2").run("r2", (IMAGE,))
    assert [one.requests for one in both.statistics.take_delta()] == [1, 1]


def test_a_candidate_that_becomes_stable_is_not_loaded_again(both: Engine, tmp_path: Path) -> None:
    candidate, old = both.find("digits", CANDIDATE), both.find("digits")
    both.serve(servable(tmp_path, "v2", 2))
    assert both.find("digits") is candidate
    assert served(both) == [2]
    with pytest.raises(Retired):
        old.run("late", (IMAGE,))


def test_what_is_stable_cannot_be_the_candidate_too(both: Engine, tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match="is the stable version already"):
        both.serve(servable(tmp_path, "v1", 1), CANDIDATE)
    assert served(both) == [1, 2]


def test_withdrawing_the_model_ends_both(both: Engine) -> None:
    both.withdraw("digits")
    assert served(both) == []


def test_every_path_knows_both_versions(both: Engine) -> None:
    routes = Routes(both, managed=True, body_cap=10**6)

    def get(*path: str, method: str = "GET") -> object:
        head = Head(method=method, path=("v2", *path), keep_alive=True)
        return json.loads(b"".join(routes.plan(head, over_tcp=False).answer(memoryview(b"")).body))

    assert get("models", "digits")["versions"] == ["1", "2"]
    assert get("models", "digits", "versions", CANDIDATE)["versions"] == ["2"]
    assert [one["version"] for one in get("models", "digits", "stats")["model_stats"]] == ["1", "2"]
    assert [one["version"] for one in get("models", "digits", "versions", "2", "stats")["model_stats"]] == ["2"]
    assert get("models", "digits", "versions", "2", "ready")["ready"]


def test_the_index_lists_both_versions(both: Engine) -> None:
    assert [(one.name, one.version) for one in Repository(both).index()] == [("digits", 1), ("digits", 2)]


# ---------------------------------------------------------------- no room for both
class Tight:
    """An engine on a machine with room for one."""

    def __init__(self, root: Path) -> None:
        self.available = 10**9
        self.root = root
        self.engine = engine(memory_available=lambda: self.available)
        self.engine.serve(servable(root, "v1", 1))
        self.available = 1000

    def broken(self) -> Servable:
        return servable(self.root, "v2", 2, golden=Golden(samples=7, tolerance=1))


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[Tight]:
    one = Tight(tmp_path)
    yield one
    one.engine.close()


def test_with_room_for_both_nothing_stops(tight: Tight, tmp_path: Path) -> None:
    tight.available = 10**9
    assert not tight.engine.serve(servable(tmp_path, "v2", 2)).stop_start


def test_without_room_the_old_one_goes_first_and_the_flip_says_so(tight: Tight, tmp_path: Path) -> None:
    assert tight.engine.serve(servable(tmp_path, "v2", 2)).stop_start
    assert served(tight.engine) == [2]


def test_if_the_new_one_fails_then_the_old_one_is_loaded_again(tight: Tight) -> None:
    with pytest.raises(CannotServe, match="20 samples, the manifest says 7"):
        tight.engine.serve(tight.broken())
    assert tight.engine.find("digits").run("r", (IMAGE,))
    assert served(tight.engine) == [1]


def test_if_the_old_one_cannot_be_loaded_again_either_the_error_says_both(tight: Tight, tmp_path: Path) -> None:
    broken = tight.broken()
    shutil.rmtree(tight.engine.find("digits").servable.path.parent)
    with pytest.raises(CannotServe, match="manifest says 7; nor can version 1 be loaded again"):
        tight.engine.serve(broken)
    assert served(tight.engine) == []


def test_requests_wait_while_there_is_no_version(
    tight: Tight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, asked = tight.engine._load, threading.Event()
    answers: list[int] = []

    def ask() -> None:
        asked.set()
        answers.append(tight.engine.find("digits").servable.version)

    def slow(bundle: Servable) -> object:
        client = threading.Thread(target=ask)
        client.start()
        asked.wait(5)
        assert answers == []
        loaded = load(bundle)
        threads.append(client)
        return loaded

    threads: list[threading.Thread] = []
    monkeypatch.setattr(tight.engine, "_load", slow)
    tight.engine.serve(servable(tmp_path, "v2", 2))
    threads[0].join(5)
    assert answers == [2]


def test_a_candidate_without_room_is_refused_and_costs_the_stable_version_nothing(
    tight: Tight, tmp_path: Path
) -> None:
    before = tight.engine.find("digits")
    with pytest.raises(CannotServe, match="needs 4194304 bytes, 1000 are left beside the stable version"):
        tight.engine.serve(servable(tmp_path, "v2", 2), CANDIDATE)
    assert tight.engine.find("digits") is before


def test_the_first_version_is_tried_whatever_memory_says(tmp_path: Path) -> None:
    one = engine(memory_available=lambda: 0)
    assert not one.serve(servable(tmp_path, "v1", 1)).stop_start
    one.close()
