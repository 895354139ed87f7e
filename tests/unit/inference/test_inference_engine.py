import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from inference_parts import IMAGE, NOON, engine, servable

from agent.inference.engine import Engine, UnknownModel
from agent.inference.generation import Generation, ModelFailed, QueueFull, Retired
from agent.inference.loading import CannotServe, Settings, WrongTensors, from_argument
from protocol.manifest import Golden, TensorSpec
from protocol.states import RuntimeName, Task
from protocol.statistics import merge_by_digest


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Engine]:
    one = engine()
    one.serve(servable(tmp_path, "v1", 1))
    yield one
    one.close()


class Blocked:
    """Holds every interpreter of a generation, so that requests wait."""

    def __init__(self, generation: Generation) -> None:
        self._pool = generation.pool
        self._held = [self._pool.lease() for _ in range(generation.interpreters)]

    def release(self) -> None:
        for model in self._held:
            self._pool.give_back(model)


def test_a_served_model_answers_and_counts(serving: Engine) -> None:
    found = serving.find("digits")
    (scores,) = found.run("r1", (IMAGE,))
    assert len(scores) == 10
    (taken,) = serving.statistics.take_delta()
    assert (taken.requests, taken.errors, taken.dropped, taken.latency.count) == (1, 0, 0, 1)
    assert (sum(taken.classes), sum(taken.confidence)) == (1, 1)
    assert serving.statistics.take_delta() == ()


def test_only_what_serves_is_found_and_the_error_names_it(serving: Engine) -> None:
    assert serving.find("digits", "1").servable.version == 1
    with pytest.raises(UnknownModel, match="models that are: digits"):
        serving.find("faces")
    with pytest.raises(UnknownModel, match="version 1 is served"):
        serving.find("digits", "2")


def test_a_swap_flips_the_name_and_splits_the_statistics(serving: Engine, tmp_path: Path) -> None:
    old = serving.find("digits")
    old.run("r1", (IMAGE,))
    serving.serve(servable(tmp_path, "v2", 2))
    new = serving.find("digits", "2")
    for k in range(3):
        new.run(f"n{k}", (IMAGE,))
    counts = {one.digest: one.requests for one in serving.statistics.take_delta()}
    assert counts == {old.counters.short_digest: 1, new.counters.short_digest: 3}
    with pytest.raises(Retired):
        old.run("late", (IMAGE,))


def test_a_swap_lets_the_old_one_finish_what_it_took(serving: Engine, tmp_path: Path) -> None:
    old = serving.find("digits")
    blocked, answers = Blocked(old), []
    waiting = threading.Thread(target=lambda: answers.append(old.run("r1", (IMAGE,))))
    waiting.start()
    while old.waiting < 2:
        pass
    swap = threading.Thread(target=serving.serve, args=(servable(tmp_path, "v2", 2),))
    swap.start()
    while serving.find("digits").servable.version != 2:
        pass
    assert serving.find("digits").run("r2", (IMAGE,))  # the new one serves while the old one finishes
    assert answers == []
    blocked.release()
    waiting.join()
    swap.join()
    assert len(answers) == 1


def test_the_same_digest_again_changes_nothing(serving: Engine, tmp_path: Path) -> None:
    before = serving.find("digits")
    flip = serving.serve(servable(tmp_path, "v1", 1))
    assert flip.took_us == 0
    assert serving.find("digits") is before


def test_a_version_that_comes_back_goes_on_counting(serving: Engine, tmp_path: Path) -> None:
    first, second = servable(tmp_path, "v1", 1), servable(tmp_path, "v2", 2)
    serving.find("digits").run("r1", (IMAGE,))
    serving.serve(second)
    serving.serve(first)
    serving.find("digits").run("r2", (IMAGE,))
    (taken,) = serving.statistics.take_delta()
    assert taken.requests == 2


def test_a_withdrawn_model_is_unknown_and_withdrawing_twice_is_fine(serving: Engine) -> None:
    serving.withdraw("digits")
    serving.withdraw("digits")
    with pytest.raises(UnknownModel, match="models that are: none"):
        serving.find("digits")


def test_a_full_queue_turns_requests_away_and_counts_them(tmp_path: Path) -> None:
    one = engine(queue_limit=3)
    one.serve(servable(tmp_path, "v1", 1))
    found = one.find("digits")
    blocked = Blocked(found)
    threads = [threading.Thread(target=found.run, args=(f"r{k}", (IMAGE,))) for k in range(2)]
    for thread in threads:
        thread.start()
    while found.waiting < 3:
        pass
    with pytest.raises(QueueFull, match="3 requests are waiting") as full:
        found.run("r3", (IMAGE,))
    assert full.value.retry_after == 1
    blocked.release()
    for thread in threads:
        thread.join()
    one.close()
    (taken,) = one.statistics.take_delta()
    assert (taken.requests, taken.dropped) == (2, 1)


def test_a_request_that_finds_no_interpreter_in_time_fails(tmp_path: Path) -> None:
    one = engine(wait_seconds=0.01)
    one.serve(servable(tmp_path, "v1", 1))
    found = one.find("digits")
    blocked = Blocked(found)
    with pytest.raises(ModelFailed, match="no interpreter came free"):
        found.run("r1", (IMAGE,))
    blocked.release()
    assert found.run("r2", (IMAGE,))
    one.close()
    assert merge_by_digest(one.statistics.take_delta())[0].errors == 1


def test_a_failing_run_is_counted_and_the_next_one_is_answered(serving: Engine) -> None:
    found = serving.find("digits")
    with pytest.raises(ModelFailed, match="takes 64 bytes, got 3"):
        found.run("r1", (b"abc",))
    assert found.run("r2", (IMAGE,))
    (taken,) = serving.statistics.take_delta()
    assert (taken.requests, taken.errors, taken.latency.count) == (2, 1, 1)


def test_several_interpreters_answer_at_the_same_time(tmp_path: Path) -> None:
    one = engine(settings=Settings(instances=2))
    one.serve(servable(tmp_path, "v2", 2))
    found = one.find("digits")
    answers: list[bytes] = []

    def ask() -> None:
        for k in range(100):
            answers.extend(found.run(f"r{k}", (IMAGE,)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close()
    assert len(set(answers)) == 1
    assert sum(taken.requests for taken in one.statistics.take_delta()) == 400


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        pytest.param(
            {"golden": Golden(samples=7, tolerance=1)}, CannotServe, "20 samples, the manifest says 7", id="golden"
        ),
        pytest.param(
            {"inputs": (TensorSpec(name="image", dtype="UINT8", shape=(1, 8, 8, 1)),)},
            WrongTensors,
            "promises UINT8",
            id="input-type",
        ),
        pytest.param(
            {"inputs": (TensorSpec(name="image", dtype="INT8", shape=(1, 8, 8, 1), scale=0.5, zero_point=0),)},
            WrongTensors,
            "promises scale 0.5",
            id="quantisation",
        ),
        pytest.param(
            {"inputs": (TensorSpec(name="a", dtype="INT8", shape=(1,)),) * 2}, WrongTensors, "2 inputs", id="count"
        ),
    ],
)
def test_a_bundle_that_breaks_its_promise_is_refused_and_the_old_one_serves_on(
    serving: Engine, tmp_path: Path, changes: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        serving.serve(servable(tmp_path, "v2", 2, **changes))
    assert serving.find("digits").servable.version == 1
    assert serving.find("digits").run("r1", (IMAGE,))


def test_a_size_left_open_and_unstated_quantisation_fit_the_model(tmp_path: Path) -> None:
    one = engine()
    promised = TensorSpec(name="picture", dtype="INT8", shape=(-1, 8, 8, 1))
    one.serve(servable(tmp_path, "v2", 2, inputs=(promised,)))
    (spec,) = one.find("digits").signature.inputs
    one.close()
    assert (spec.name, spec.shape) == ("picture", (1, 8, 8, 1))


def test_the_manifest_says_which_runtimes_may_run_it(tmp_path: Path) -> None:
    one = engine()
    model = servable(tmp_path, "v2", 2)
    assert model.manifest
    needs = msgspec.structs.replace(model.manifest.needs, runtimes=(RuntimeName.TFLITE_RUNTIME,))
    flip = one.serve(servable(tmp_path, "v2", 2, needs=needs))
    one.close()
    assert flip.runtime is RuntimeName.TFLITE_RUNTIME


def test_what_is_no_classifier_is_timed_but_not_counted_by_class(tmp_path: Path) -> None:
    one = engine()
    one.serve(servable(tmp_path, "v2", 2, task=Task.OTHER, classes=()))
    one.find("digits").run("r1", (IMAGE,))
    one.close()
    (taken,) = one.statistics.take_delta()
    assert (taken.requests, taken.classes, taken.confidence) == (1, (), ())


def test_a_bare_model_takes_its_name_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "_Mobile Net.tflite"
    path.write_bytes(servable(tmp_path, "v1", 1).path.read_bytes())
    assert from_argument(path, tmp_path).model == "mobile-net"
    with pytest.raises(CannotServe, match="rename the file"):
        from_argument(tmp_path / "ü.tflite", tmp_path)
    with pytest.raises(CannotServe, match="not a bundle folder"):
        from_argument(tmp_path / "x.onnx", tmp_path)


def test_a_prediction_is_remembered_for_its_truth(serving: Engine) -> None:
    found = serving.find("digits")
    (scores,) = found.run("r1", (IMAGE,))
    predicted = max(range(10), key=lambda k: int.from_bytes(scores[k : k + 1], "big", signed=True))
    serving.truth.judge("digits", "r1", 4)
    ((record,), unknown) = serving.truth.take_delta()
    assert (record.digest, record.minute, record.confusion) == (
        found.counters.short_digest,
        NOON,
        ((4, predicted, 1),),
    )
    assert unknown == 0
