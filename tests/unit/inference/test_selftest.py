"""The golden samples, run where a model serves."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from inference_parts import IMAGE, engine, servable

from agent.inference.engine import Engine
from agent.inference.selftest import self_test


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Engine]:
    one = engine()
    one.serve(servable(tmp_path, "v2", 2))
    yield one
    one.close()


def test_a_healthy_model_agrees_and_says_where(serving: Engine) -> None:
    outcome = self_test(serving, "digits")
    (found,) = serving.all()
    assert (True, found.servable.digest) == (outcome.passed, outcome.digest)
    assert f"golden samples agree on {found.runtime.value}" in outcome.detail


def test_nobody_is_counted_and_the_interpreters_are_given_back(serving: Engine) -> None:
    self_test(serving, "digits")
    assert () == tuple(serving.statistics.take_delta())
    (found,) = serving.all()
    assert 0 == found.waiting
    assert found.run("r", (IMAGE,))


def test_a_model_that_answers_otherwise_fails(serving: Engine) -> None:
    (found,) = serving.all()
    path = found.servable.path.parent / found.servable.golden.member
    with np.load(path) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["out_0"] = np.flip(changed["out_0"], axis=-1)
    np.savez(path, **changed)
    outcome = self_test(serving, "digits")
    assert outcome.passed is False
    assert "golden sample 0" in outcome.detail


def test_golden_samples_that_cannot_be_read_fail(serving: Engine) -> None:
    (found,) = serving.all()
    (found.servable.path.parent / found.servable.golden.member).write_bytes(b"bit rot")
    assert self_test(serving, "digits").passed is False


def test_what_cannot_be_tested_now_is_not_a_failure(serving: Engine) -> None:
    assert self_test(serving, "faces").passed is None
    (found,) = serving.all()
    found.pool.retire()
    assert self_test(serving, "digits").passed is None
