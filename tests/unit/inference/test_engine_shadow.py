"""A candidate in the shadow of the stable version."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from inference_parts import EXAMPLES, IMAGE, engine, servable

from agent.channel import CANDIDATE
from agent.core.shadowing import ShadowCounts, add, summary
from agent.inference.engine import Engine
from agent.inference.loading import CannotServe
from agent.inference.shadow import QUEUE, Shadow
from protocol.manifest import TensorSpec
from protocol.states import Task


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Engine]:
    one = engine()
    one.serve(servable(tmp_path, "v1", 1))
    one.serve(servable(tmp_path, "v2", 2), CANDIDATE)
    yield one
    one.close()


def images(count: int) -> list[bytes]:
    with np.load(EXAMPLES / "heldout.npz") as arrays:
        pixels = arrays["images"][:count]
    return [bytes(one) for one in np.clip(np.rint(pixels / 16.0 * 255) - 128, -128, 127).astype(np.int8)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def total(one: Engine) -> ShadowCounts:
    """Return all that was counted up to the end of the shadow."""
    counts = None
    for _, taken in one.take_shadows():
        counts = add(counts, taken)
    one.end_shadow("digits", "test")
    (ended,) = one.take_ended_shadows()
    return add(counts, ended.counts) if ended.counts else counts


def test_each_live_answer_is_compared_with_the_candidates(both: Engine) -> None:
    both.start_shadow("digits", share=1.0, cpu=1.0)
    stable, candidate = both.versions("digits")
    shadow, agreed, distance = stable.shadow, 0, 0.0
    for k, image in enumerate(images(40)):
        answers = [one._predictor.predict(one.run(f"r{k}", (image,))[0]) for one in (stable, candidate)]
        agreed += answers[0].label == answers[1].label
        distance += abs(answers[0].confidence - answers[1].confidence)
        wait_until(lambda k=k: shadow._counts.compared == k + 1)
    counts = total(both)
    assert (counts.stable, counts.candidate) == (stable.servable.digest, candidate.servable.digest)
    assert (counts.compared, counts.agreed, counts.failed, counts.dropped) == (40, agreed, 0, 0)
    assert counts.distance == pytest.approx(distance * 1e6, abs=40)
    assert counts.latency.count == 40
    assert 0 < agreed < 40


def test_a_shadow_is_not_counted_among_requests_nor_remembered_for_truth(both: Engine) -> None:
    both.start_shadow("digits", share=1.0, cpu=1.0)
    both.find("digits").run("r1", (IMAGE,))
    shadow = both.find("digits").shadow
    wait_until(lambda: shadow._counts.compared == 1)
    (taken,) = both.statistics.take_delta()
    assert (taken.digest, taken.requests) == (both.find("digits").counters.short_digest, 1)


def test_only_a_share_is_sampled(both: Engine) -> None:
    stable, candidate = both.versions("digits")
    lots = iter([0.05, 0.5, 0.09, 0.1, 0.99])
    shadow = Shadow(stable, candidate, share=0.1, cpu=1.0, chance=lambda: next(lots))
    stable.shadow = shadow
    for k in range(5):
        stable.run(f"r{k}", (IMAGE,))
    assert shadow._queue.qsize() == 2


def test_what_a_busy_shadow_cannot_take_is_dropped_and_counted(both: Engine) -> None:
    stable, candidate = both.versions("digits")
    shadow = Shadow(stable, candidate, share=1.0, cpu=1.0)  # its thread does not run
    stable.shadow = shadow
    for k in range(QUEUE + 5):
        stable.run(f"r{k}", (IMAGE,))
    counts = shadow.take()
    assert counts is not None
    assert (counts.compared, counts.dropped) == (0, 5)
    assert shadow.take() is None


def test_the_input_is_copied_for_the_buffer_is_used_again(both: Engine) -> None:
    stable, candidate = both.versions("digits")
    stable.shadow = shadow = Shadow(stable, candidate, share=1.0, cpu=1.0)
    buffer = bytearray(IMAGE)
    stable.run("r1", (memoryview(buffer),))
    buffer[:] = b"\x7f" * 64
    assert shadow._queue.get().inputs == (IMAGE,)


def test_its_cpu_time_stays_within_its_budget(both: Engine) -> None:
    """A tenth of a core: after work of t it rests for 9 t."""
    stable, candidate = both.versions("digits")
    shadow = Shadow(stable, candidate, share=1.0, cpu=0.1)
    work, rests, rest = 0.02, [], shadow._over.wait

    def compare(_: object) -> float:
        time.sleep(work)
        return work

    shadow._compare = compare
    shadow._over.wait = lambda seconds: rests.append(seconds) or rest(0)
    shadow.start()
    for k in range(3):
        stable.run(f"r{k}", (IMAGE,))
    wait_until(lambda: len(rests) == 3)
    shadow.stop()
    assert rests == [pytest.approx(work * 9)] * 3


def test_it_runs_with_a_lower_priority_than_clients(both: Engine) -> None:
    both.start_shadow("digits", share=1.0, cpu=1.0)
    shadow = both.find("digits").shadow
    both.find("digits").run("r1", (IMAGE,))
    wait_until(lambda: shadow._counts.compared == 1)
    assert os.getpriority(os.PRIO_PROCESS, shadow._thread.native_id) == 10
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 10


def test_a_candidate_that_fails_is_counted_and_clients_feel_nothing(
    both: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    both.start_shadow("digits", share=1.0, cpu=1.0)
    monkeypatch.setattr(both.find("digits", CANDIDATE), "rehearse", lambda _: 1 / 0)
    shadow = both.find("digits").shadow
    assert both.find("digits").run("r1", (IMAGE,))
    wait_until(lambda: shadow._counts.failed == 1)


def test_a_paused_shadow_takes_nothing(both: Engine) -> None:
    stable, candidate = both.versions("digits")
    stable.shadow = shadow = Shadow(stable, candidate, share=1.0, cpu=1.0)
    shadow.pause(paused=True)
    stable.run("r1", (IMAGE,))
    assert shadow._queue.empty()
    shadow.pause(paused=False)
    stable.run("r2", (IMAGE,))
    assert shadow._queue.qsize() == 1


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda one, root: one.serve(servable(root, "v3", 3)), id="another-stable-version"),
        pytest.param(lambda one, root: one.serve(servable(root, "v2", 2)), id="promotion"),
        pytest.param(lambda one, _: one.withdraw("digits", CANDIDATE), id="candidate-withdrawn"),
        pytest.param(lambda one, _: one.withdraw("digits"), id="model-withdrawn"),
        pytest.param(lambda one, _: one.start_shadow("digits", share=0.5, cpu=1), id="another-shadow"),
    ],
)
def test_a_shadow_ends_with_either_of_its_versions(
    both: Engine, tmp_path: Path, end: Callable[[Engine, Path], object]
) -> None:
    both.start_shadow("digits", share=1.0, cpu=1.0)
    stable = both.find("digits")
    shadow = stable.shadow
    end(both, tmp_path)
    assert stable.shadow is not shadow
    assert not shadow._thread.is_alive()
    assert [one.model for one in both.take_ended_shadows()] == ["digits"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"task": Task.OTHER, "classes": ()}, "only classifiers", id="no-classifier"),
        pytest.param({"classes": tuple("abcdefghij")}, "same classes", id="other-classes"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    one = engine()
    one.serve(servable(tmp_path, "v1", 1))
    one.serve(servable(tmp_path, "v2", 2, **changes), CANDIDATE)
    with pytest.raises(CannotServe, match=said):
        one.start_shadow("digits", share=1.0, cpu=1.0)
    one.withdraw("digits", CANDIDATE)
    with pytest.raises(CannotServe, match="no stable version and candidate"):
        one.start_shadow("digits", share=1.0, cpu=1.0)
    one.close()


def test_inputs_in_another_scale_mean_something_else(both: Engine) -> None:
    stable, candidate = both.versions("digits")
    other = TensorSpec(name="image", dtype="INT8", shape=(1, 8, 8, 1), scale=0.5, zero_point=0)
    object.__setattr__(candidate.signature, "inputs", (other,))
    with pytest.raises(CannotServe, match="in another scale"):
        Shadow(stable, candidate, share=1.0, cpu=1.0)


def test_the_summary_gives_n_with_every_share() -> None:
    one = ShadowCounts(stable="a" * 64, candidate="b" * 64, compared=3, agreed=2, distance=600_000)
    two = add(one, ShadowCounts(stable="a" * 64, candidate="b" * 64, compared=1, agreed=1, dropped=5))
    assert summary(two) == (
        f"candidate {'b' * 16} agreed with {'a' * 16} on 3 of 4 requests (75.0%), "
        "mean confidence distance 0.150; 0 failed, 5 dropped"
    )
    assert summary(None) == "no request was compared"
    assert add(two, ShadowCounts(stable="c", candidate="b", compared=1)).compared == 1
