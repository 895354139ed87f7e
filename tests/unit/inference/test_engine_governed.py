"""An engine that works less hard: what serves, what is loaded later, and the way back."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inference_parts import IMAGE, engine, servable

from agent.channel import CANDIDATE, Govern
from agent.core.delegates import Delegate
from agent.core.governor import TABLE, Level, Measures
from agent.inference.describe import prometheus
from agent.inference.engine import Engine, UnknownModel
from agent.inference.generation import Generation, ModelFailed, Retired, TurnedAway
from agent.inference.loading import Settings
from agent.inference.pool import NoneFree, Shed, Urgency

PATIENCE = 20.0


def order(level: Level, measures: Measures | None = None) -> Govern:
    return Govern(level=level, measures=measures or TABLE[level])


@pytest.fixture
def one() -> Iterator[Engine]:
    made = engine(settings=Settings(threads=4, instances=2))
    yield made
    made.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def width(found: Generation) -> int:
    """Count how many interpreters are given out at once."""
    held = []
    try:
        while len(held) < found.interpreters:
            held.append(found.pool.lease(patience=0.01))
    except NoneFree:
        pass
    for model in held:
        found.pool.give_back(model)
    return len(held)


def is_shed(found: Generation, priority: int) -> bool:
    try:
        found.run("r", (IMAGE,), Urgency(priority))
    except Shed as refusal:
        return refusal.retry_after >= 10
    return False


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        pytest.param(Level.NORMAL, (2, 4, False), id="normal"),
        pytest.param(Level.EASED, (1, 4, False), id="eased"),
        pytest.param(Level.STRAINED, (1, 2, False), id="strained"),
        pytest.param(Level.DISTRESS, (1, 1, True), id="distress"),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["serves-already", "comes-later"])
def test_a_level_holds_for_what_serves_and_for_what_comes(
    one: Engine, tmp_path: Path, before: bool, level: Level, expected: tuple[int, int, bool]
) -> None:
    if before:
        one.serve(servable(tmp_path, "v1", 1))
    one.govern(order(level))
    one.rethread()
    if not before:
        one.serve(servable(tmp_path, "v1", 1))
    found = one.find("digits")
    assert expected == (width(found), found.threads, is_shed(found, 9))
    assert not is_shed(found, 5)
    one.govern(order(Level.NORMAL))
    one.rethread()
    found = one.find("digits")
    assert (2, 4, False) == (width(found), found.threads, is_shed(found, 9))


def test_threads_that_are_preferred_are_eased_too_and_come_back(one: Engine, tmp_path: Path) -> None:
    bundle = servable(tmp_path, "v1", 1)
    one.prefer(bundle.digest, runtime="", threads=2)
    one.serve(bundle)
    found = []
    for level in (Level.STRAINED, Level.NORMAL):
        one.govern(order(level))
        one.rethread()
        found.append(one.find("digits").threads)
    assert [1, 2] == found


def test_requests_go_on_while_threads_change_and_are_counted_under_one_bundle(one: Engine, tmp_path: Path) -> None:
    bundle = servable(tmp_path, "v1", 1)
    one.serve(bundle)
    over, failures, answered = threading.Event(), [], [0]

    def ask() -> None:
        while not over.is_set():
            try:
                one.find("digits").run("r", (IMAGE,))
                answered[0] += 1
            except Retired:
                continue  # it is asked again, of the next one, as the service does
            except (ModelFailed, TurnedAway, UnknownModel) as error:
                failures.append(error)

    client = threading.Thread(target=ask)
    client.start()
    for level in (Level.STRAINED, Level.DISTRESS, Level.NORMAL):
        one.govern(order(level))
        one.rethread()
        seen = answered[0]
        wait_until(lambda seen=seen: answered[0] > seen + 5)
    over.set()
    client.join()
    assert [] == failures
    (counted,) = one.statistics.take_delta()
    assert answered[0] == counted.requests


def test_nothing_is_loaded_again_while_memory_is_short(one: Engine, tmp_path: Path) -> None:
    one.serve(servable(tmp_path, "v1", 1))
    before = one.find("digits")
    short = Measures(shadow=False, interpreters=2, threads=2, lowest=10, reload=False)
    one.govern(order(Level.STRAINED, short))
    one.rethread()
    assert one.find("digits") is before
    one.govern(order(Level.STRAINED))
    one.rethread()
    assert one.find("digits").threads == 2


def test_what_does_not_fit_twice_keeps_its_threads(tmp_path: Path) -> None:
    available = [None]
    one = engine(settings=Settings(threads=4), memory_available=lambda: available[0])
    one.serve(servable(tmp_path, "v1", 1))
    available[0] = 1
    one.govern(order(Level.STRAINED))
    one.rethread()
    assert one.find("digits").threads == 4
    one.close()


def test_a_bundle_that_cannot_be_loaded_again_serves_on(one: Engine, tmp_path: Path) -> None:
    bundle = servable(tmp_path, "v1", 1)
    one.serve(bundle)
    moved = bundle.path.rename(bundle.path.with_name("gone"))
    one.govern(order(Level.STRAINED))
    one.rethread()
    assert one.find("digits").threads == 4
    assert one.find("digits").run("r", (IMAGE,))
    moved.rename(bundle.path)


def test_a_model_on_an_accelerator_is_left_where_it_is(one: Engine, tmp_path: Path) -> None:
    """It may not be had twice, and what it does costs no threads."""
    bundle = servable(tmp_path, "v1", 1)
    one.serve(bundle)
    before = one.find("digits")
    one.prefer(bundle.digest, runtime="", threads=0, delegate=Delegate(name="tpu", library="/lib/none.so"))
    one.govern(order(Level.DISTRESS))
    one.rethread()
    assert one.find("digits") is before


def test_a_shadow_pauses_and_goes_on_with_bundles_that_were_loaded_again(one: Engine, tmp_path: Path) -> None:
    one.serve(servable(tmp_path, "v1", 1))
    one.serve(servable(tmp_path, "v2", 2), CANDIDATE)
    one.govern(order(Level.STRAINED))
    one.start_shadow("digits", share=1.0, cpu=1.0)  # one that begins later pauses too
    one.find("digits").run("r", (IMAGE,))
    assert () == one.take_shadows()
    one.govern(order(Level.DISTRESS))
    one.rethread()
    one.govern(order(Level.NORMAL))
    one.rethread()
    stable, candidate = one.versions("digits")
    assert (4, 4) == (stable.threads, candidate.threads)
    stable.run("r", (IMAGE,))
    taken: list[object] = []

    def compared() -> bool:
        taken.extend(counts for _, counts in one.take_shadows())
        return bool(taken)

    wait_until(compared)
    assert [(1, 0, 0)] == [(counts.compared, counts.failed, counts.dropped) for counts in taken]
    assert () == one.take_ended_shadows()


def test_the_level_is_among_the_metrics_once_somebody_governs(one: Engine) -> None:
    assert "edgewarden_governor_level" not in prometheus(one)
    one.govern(order(Level.STRAINED))
    assert "\nedgewarden_governor_level 2\n" in prometheus(one)
