"""Captured samples on a real disk: encrypted, bound to their id, inside the budget, gone when their time is over."""

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from inference_parts import IMAGE, NOON, engine, servable

from agent.core.capturing import DAY_MS, CapturePolicy
from agent.inference.capture import Capture, _Scorer
from agent.inference.generation import Generation
from agent.inference.redaction import NoRedaction
from agent.inference.samples import KEY_FILE, KeyTrouble, NoSuchSample, SampleFolder, Unreadable
from protocol.manifest import Calibrator, TensorSpec
from runtime.calibrator import probabilities
from runtime.preprocess import quantise

ALL = {"enabled": True, "random": 1.0}
BLACKEN = "import json,sys; d=json.load(sys.stdin); d['inputs'][0]['data']='A'*84+'AA=='; print(json.dumps(d))"


def eventually(question: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


class Clock:
    def __init__(self) -> None:
        self.ms = NOON

    def __call__(self) -> int:
        return self.ms


@contextmanager
def capturing(state: Path, clock: Clock | None = None, **policy: object) -> Iterator[tuple[Capture, Generation]]:
    """A served model whose requests are captured by this policy."""
    state.mkdir(exist_ok=True)
    serving = engine()
    serving.serve(servable(state, "v1", 1))
    capture = Capture(
        CapturePolicy(**{**ALL, **policy}), SampleFolder(state), now_ms=clock or Clock(), chance=lambda: 0.0
    )
    capture.start()
    serving.tap(capture)
    try:
        yield capture, serving.find("digits")
    finally:
        capture.finish()
        serving.close()


def captured(capture: Capture, count: int) -> list[dict]:
    eventually(lambda: sum(capture.kept.values()) + sum(capture.refused.values()) + capture.failed >= count)
    return capture.listed(None)["captures"]


# ---------------------------------------------------------------- keeping
def test_a_sample_holds_the_request_and_the_answer(tmp_path: Path) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        outputs = model.run("r-1", (IMAGE,))
        [status] = captured(capture, 1)
    sample = SampleFolder(tmp_path / "s").read(status["id"])
    assert ("r-1", "digits", 1, "random") == (
        sample.head.request,
        sample.head.model,
        sample.head.version,
        sample.head.trigger,
    )
    assert [IMAGE] == [tensor.data for tensor in sample.inputs]
    assert outputs == [tensor.data for tensor in sample.outputs]
    assert ("held", NOON) == (status["state"], status["at"])


def test_nothing_of_a_sample_is_readable_on_disk(tmp_path: Path) -> None:
    image = np.arange(64, dtype=np.int8).tobytes()
    with capturing(tmp_path / "s") as (capture, model):
        model.run("secret-request", (image,))
        [status] = captured(capture, 1)
    file = tmp_path / "s" / "captures" / f"{status['id']}.ewc"
    assert 0o600 == file.stat().st_mode & 0o777
    assert not {b"digits", b"secret-request", image[:16]} & {
        part for part in (b"digits", b"secret-request", image[:16]) if part in file.read_bytes()
    }
    assert 0o600 == (tmp_path / "s" / KEY_FILE).stat().st_mode & 0o777
    assert 0o700 == file.parent.stat().st_mode & 0o777


def test_the_same_request_is_sealed_differently_each_time(tmp_path: Path) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        model.run("r", (IMAGE,))
        [status] = captured(capture, 1)
    folder = SampleFolder(tmp_path / "s")
    sample = folder.read(status["id"])
    assert folder.seal(sample) != folder.seal(sample)


def test_one_samples_file_cannot_stand_for_another(tmp_path: Path) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        model.run("a", (IMAGE,))
        model.run("b", (IMAGE,))
        first, second = captured(capture, 2)
    folder, files = SampleFolder(tmp_path / "s"), tmp_path / "s" / "captures"
    (files / f"{first['id']}.ewc").replace(files / f"{second['id']}.ewc")
    with pytest.raises(Unreadable):
        folder.read(second["id"])


@pytest.mark.parametrize("place", [0, 6, 40, -1])
def test_a_changed_byte_anywhere_is_found(tmp_path: Path, place: int) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        model.run("a", (IMAGE,))
        [status] = captured(capture, 1)
    file = tmp_path / "s" / "captures" / f"{status['id']}.ewc"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(Unreadable):
        SampleFolder(tmp_path / "s").read(status["id"])


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    SampleFolder(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(KeyTrouble, match="chmod 600"):
        SampleFolder(tmp_path)


def test_a_key_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    (tmp_path / KEY_FILE).chmod(0o600)
    with pytest.raises(KeyTrouble, match="5 bytes"):
        SampleFolder(tmp_path)


@pytest.mark.parametrize("wrong", ["", "x", "../../etc/passwd", "0190000000000-000000000000000g"])
def test_an_id_that_is_none_finds_nothing(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(NoSuchSample):
        SampleFolder(tmp_path).taken_at(wrong)


@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
@pytest.mark.parametrize("dtype", ["INT8", "UINT8", "FP32"])
def test_scores_are_those_that_the_runtime_computes(dtype: str, temperature: float | None) -> None:
    quantised = {"scale": 1 / 256, "zero_point": -128 if dtype == "INT8" else 0} if dtype != "FP32" else {}
    spec = TensorSpec(name="p", dtype=dtype, shape=(1, 10), **quantised)
    calibrator = Calibrator(temperature=temperature, samples=9) if temperature else None
    data = quantise(np.random.default_rng(1).dirichlet(np.ones(10)), spec)
    expected = probabilities(data, spec, calibrator)
    np.testing.assert_allclose(expected, _Scorer(spec, calibrator).scores(data.tobytes()), rtol=1e-6)


# ---------------------------------------------------------------- budgets
def test_a_day_never_takes_more_samples_than_its_budget(tmp_path: Path) -> None:
    with capturing(tmp_path / "s", samples_per_day=3) as (capture, model):
        for number in range(10):
            model.run(str(number), (IMAGE,))
        eventually(lambda: sum(capture.kept.values()) + sum(capture.refused.values()) == 10)
        assert ({"random": 3}, {"samples-per-day": 7}) == (dict(capture.kept), dict(capture.refused))


def test_the_files_of_a_day_are_never_larger_than_its_bytes(tmp_path: Path) -> None:
    with capturing(tmp_path / "s", bytes_per_day=4000, queue=64) as (capture, model):
        for number in range(30):
            model.run(str(number), (IMAGE,))
        eventually(lambda: sum(capture.kept.values()) + sum(capture.refused.values()) == 30)
        kept = sum(capture.kept.values())
    sizes = [file.stat().st_size for file in (tmp_path / "s" / "captures").glob("*.ewc")]
    assert kept == len(sizes)
    assert 0 < sum(sizes) <= 4000


def test_a_restart_does_not_renew_the_budget_and_a_new_day_does(tmp_path: Path) -> None:
    clock = Clock()
    for expected in (2, 0):
        with capturing(tmp_path / "s", clock, samples_per_day=2) as (capture, model):
            for number in range(4):
                model.run(str(number), (IMAGE,))
            captured(capture, 4)
            assert expected == sum(capture.kept.values())
    clock.ms += DAY_MS
    with capturing(tmp_path / "s", clock, samples_per_day=2) as (capture, model):
        model.run("tomorrow", (IMAGE,))
        captured(capture, 1)
        assert 1 == sum(capture.kept.values())


def test_a_full_queue_drops_samples_and_no_request(tmp_path: Path) -> None:
    with capturing(tmp_path / "s", queue=1, redact_command=("sleep", "0.2")) as (capture, model):
        for number in range(8):
            model.run(str(number), (IMAGE,))
        assert capture.dropped >= 5


# ---------------------------------------------------------------- time
def test_an_expired_sample_is_emptied_and_still_known(tmp_path: Path) -> None:
    clock = Clock()
    with capturing(tmp_path / "s", clock, keep_days=1) as (capture, model):
        model.run("old", (IMAGE,))
        [status] = captured(capture, 1)
    clock.ms += DAY_MS
    with capturing(tmp_path / "s", clock, keep_days=1) as (capture, _):
        file = tmp_path / "s" / "captures" / f"{status['id']}.ewc"
        eventually(lambda: file.stat().st_size == 0)
        assert "expired" == capture.status(status["id"])["state"]
        assert [] == capture.listed("held")["captures"]
        assert [status["id"]] == [one["id"] for one in capture.listed("expired")["captures"]]


def test_consent_releases_what_is_kept(tmp_path: Path) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        model.run("r", (IMAGE,))
        [status] = captured(capture, 1)
        assert "held" == status["state"]
    with capturing(tmp_path / "s", consent=True) as (capture, _):
        assert [status["id"]] == [one["id"] for one in capture.listed("released")["captures"]]


# ---------------------------------------------------------------- redaction
def blacken(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(array) for name, array in inputs.items()}


def refuse_all(_: dict[str, np.ndarray]) -> None:
    return None


def shrink(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array[:, :2] for name, array in inputs.items()}


ONES = np.ones(64, np.int8).tobytes()
REDACTIONS = {
    "a function": {"redact": f"{__name__}:blacken"},
    "a program": {"redact_command": (sys.executable, "-c", BLACKEN)},
}


@pytest.mark.parametrize("case", REDACTIONS)
def test_what_the_hook_takes_out_is_not_kept(tmp_path: Path, case: str) -> None:
    with capturing(tmp_path / "s", **REDACTIONS[case]) as (capture, model):
        model.run("r", (ONES,))
        [status] = captured(capture, 1)
    assert bytes(64) == SampleFolder(tmp_path / "s").read(status["id"]).inputs[0].data


BROKEN = {
    "the function refuses": ({"redact": f"{__name__}:refuse_all"}, "refused"),
    "the function gives another shape": ({"redact": f"{__name__}:shrink"}, "failed"),
    "the program fails": ({"redact_command": ("false",)}, "failed"),
    "the program prints nonsense": ({"redact_command": ("echo", "hello")}, "failed"),
    "the program prints without end": ({"redact_command": ("yes",)}, "failed"),
    "the program is not there": ({"redact_command": ("no-such-program-here",)}, "failed"),
    "the program refuses": ({"redact_command": ("echo", '{"inputs": null}')}, "refused"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_sample_that_cannot_be_redacted_is_not_kept(tmp_path: Path, case: str) -> None:
    policy, outcome = BROKEN[case]
    with capturing(tmp_path / "s", **policy) as (capture, model):
        model.run("r", (ONES,))
        assert [] == captured(capture, 1)
        assert {"refused": (1, 0), "failed": (0, 1)}[outcome] == (sum(capture.refused.values()), capture.failed)


@pytest.mark.parametrize("hook", ["no.such.module:f", "os:no_such_function", "os:name", "os"])
def test_a_hook_that_is_not_there_keeps_capture_from_starting(tmp_path: Path, hook: str) -> None:
    capture = Capture(CapturePolicy(redact=hook, **ALL), SampleFolder(tmp_path))
    with pytest.raises(NoRedaction):
        capture.start()


# ---------------------------------------------------------------- trouble
@contextmanager
def full_disk(limit: int = 0) -> Iterator[None]:
    """No file of this process can grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_samples_and_nothing_else(tmp_path: Path) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        with full_disk():
            answers = [model.run(str(number), (IMAGE,)) for number in range(3)]
            eventually(lambda: capture.failed == 3)
        assert 3 == len(answers)
        assert "File too large" in capture.error
        assert [] == list((tmp_path / "s" / "captures").glob("*.tmp"))
        model.run("after", (IMAGE,))
        assert ["after"] == [one["request"] for one in captured(capture, 4)]


def test_a_folder_that_vanishes_costs_samples_and_nothing_else(tmp_path: Path) -> None:
    with capturing(tmp_path / "s") as (capture, model):
        (tmp_path / "s" / "captures").rename(tmp_path / "elsewhere")
        model.run("r", (IMAGE,))
        eventually(lambda: capture.failed >= 1)
        (tmp_path / "elsewhere").rename(tmp_path / "s" / "captures")


def test_many_clients_at_once_stay_inside_the_budget(tmp_path: Path) -> None:
    with capturing(tmp_path / "s", class_quota=5, random=0.0, queue=1024) as (capture, model):
        clients = [
            threading.Thread(target=lambda n=n: [model.run(f"{n}-{k}", (IMAGE,)) for k in range(10)])
            for n in range(4)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        eventually(lambda: capture.kept["class-quota"] == 5)
        time.sleep(0.1)
        assert 5 == len(capture.listed(None)["captures"])
