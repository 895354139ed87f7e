"""Candidates in the trial child: good ones pass, and whatever a bad one does is a verdict that names it."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from dataplane_parts import manifest_of, members, write_ewb

from agent.adapters.trial import TrialChild
from agent.channel import TrialVerdict
from agent.core.rungs import choose
from agent.ports import Target
from protocol.manifest import Manifest
from protocol.release import Assignment, Release, release_of
from protocol.states import RejectReason, RuntimeName

Content = dict[str, bytes]


def run(tmp_path: Path, bundle: Path, release: Release, **limits: object) -> TrialVerdict:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    target = Target(release=release, assignment=Assignment(rollout="r"), sha256="0" * 64, length=1)
    return TrialChild(**limits).run(str(bundle), str(folder), target)


def bundle(tmp_path: Path, manifest: Manifest, content: Content) -> Path:
    return write_ewb(tmp_path / "candidate.ewb", manifest, content)


@pytest.mark.parametrize("runtime", ["litert", "tflite-runtime", "auto"])
def test_a_good_candidate_passes_with_its_measurements(tmp_path: Path, runtime: str) -> None:
    manifest = manifest_of("v2", 2)
    path = bundle(tmp_path, manifest, members("v2"))
    verdict = run(tmp_path, path, release_of(manifest), runtime=runtime)
    assert verdict.passed, verdict
    assert verdict.runtime is (RuntimeName.TFLITE_RUNTIME if runtime == "tflite-runtime" else RuntimeName.LITERT)
    assert verdict.golden == manifest.golden.samples
    assert verdict.latency_us is not None
    assert 0 < verdict.latency_us < 100_000
    assert verdict.peak_memory is not None
    assert 0 < verdict.peak_memory < 64 * 1024**2
    assert verdict.network in {"unshare", "seccomp"}
    assert (tmp_path / "unpacked" / "manifest.json").is_file()


def other_model(model: bytes) -> Content:
    return {**members("v2"), "model.tflite": model}


def flipped(model: bytes) -> bytes:
    """Flip bits in the weights, where the file stays a valid flatbuffer."""
    damaged, dice = bytearray(model), random.Random(5)
    for _ in range(400):
        damaged[dice.randrange(len(model) // 3, len(model) * 2 // 3)] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def wrong_golden() -> Content:
    content = members("v2")
    with np.load(io.BytesIO(content["golden.npz"])) as arrays:
        kept = {name: arrays[name] for name in arrays}
    kept["out_0"] = np.roll(kept["out_0"], 1, axis=-1)
    target = io.BytesIO()
    np.savez(target, **kept)
    return {**content, "golden.npz": target.getvalue()}


MODEL = members("v2")["model.tflite"]


@pytest.mark.parametrize(
    ("content", "reason", "said"),
    [
        pytest.param(lambda: other_model(MODEL[:5000]), RejectReason.SELFTEST_FAILED, "", id="truncated"),
        pytest.param(lambda: other_model(MODEL[:16]), RejectReason.SELFTEST_FAILED, "", id="stub"),
        pytest.param(
            lambda: other_model(random.Random(1).randbytes(9000)), RejectReason.SELFTEST_FAILED, "", id="noise"
        ),
        pytest.param(
            lambda: other_model(b"\x1c\0\0\0TFL3" + random.Random(2).randbytes(9000)),
            RejectReason.SELFTEST_FAILED,
            "",
            id="noise-with-the-right-magic",
        ),
        pytest.param(lambda: other_model(flipped(MODEL)), RejectReason.SELFTEST_FAILED, "", id="flipped-bits"),
        pytest.param(wrong_golden, RejectReason.SELFTEST_FAILED, "golden sample 0", id="golden-disagrees"),
        pytest.param(
            lambda: {**members("v2"), "golden.npz": b"PK"}, RejectReason.SELFTEST_FAILED, "golden", id="golden-broken"
        ),
    ],
)
def test_a_damaged_candidate_fails(
    tmp_path: Path, content: Callable[[], Content], reason: RejectReason, said: str
) -> None:
    manifest = manifest_of("v2", 2)
    verdict = run(tmp_path, bundle(tmp_path, manifest, content()), release_of(manifest))
    assert (verdict.passed, verdict.reason) == (False, reason.value), verdict
    assert said in verdict.detail


@pytest.mark.parametrize(
    ("signed", "said"),
    [
        pytest.param({"model": "faces"}, "faces 2 int8 (classification) was signed", id="model"),
        pytest.param({"version": 3}, "digits 3 int8 (classification) was signed", id="version"),
        pytest.param({"variant": "float"}, "digits 2 float (classification) was signed", id="variant"),
    ],
)
def test_a_bundle_that_is_not_the_signed_release_is_named(
    tmp_path: Path, signed: dict[str, object], said: str
) -> None:
    manifest = manifest_of("v2", 2)
    release = msgspec.structs.replace(release_of(manifest), **signed)
    verdict = run(tmp_path, bundle(tmp_path, manifest, members("v2")), release)
    assert (verdict.passed, verdict.reason) == (False, RejectReason.WRONG_RELEASE.value)
    assert said in verdict.detail


def test_a_file_that_is_no_bundle_is_a_bad_bundle(tmp_path: Path) -> None:
    path = tmp_path / "candidate.ewb"
    path.write_bytes(b"not a zip")
    verdict = run(tmp_path, path, release_of(manifest_of("v2", 2)))
    assert (verdict.passed, verdict.reason) == (False, RejectReason.BAD_BUNDLE.value)


def test_tensors_that_are_not_those_of_the_manifest_do_not_fit(tmp_path: Path) -> None:
    manifest = manifest_of("v2", 2)
    promised = msgspec.structs.replace(manifest.inputs[0], shape=(1, 16, 16, 1))
    manifest = msgspec.structs.replace(manifest, inputs=(promised,))
    verdict = run(tmp_path, bundle(tmp_path, manifest, members("v2")), release_of(manifest))
    assert (verdict.passed, verdict.reason) == (False, RejectReason.DOES_NOT_FIT.value)
    assert "promises INT8 [1, 16, 16, 1], the model has INT8 [1, 8, 8, 1]" in verdict.detail


def test_a_candidate_that_needs_more_memory_than_it_may_take_fails(tmp_path: Path) -> None:
    """32 MB under a budget of 24 MB (4 MB promised, twice, and the margin): reading alone goes over it."""
    manifest = manifest_of("v2", 2)
    golden = msgspec.structs.replace(manifest.golden, samples=500_000)
    manifest = msgspec.structs.replace(manifest, golden=golden)
    path = bundle(tmp_path, manifest, many_golden_samples(500_000))
    verdict = run(tmp_path, path, release_of(manifest))
    assert (verdict.passed, verdict.reason) == (False, RejectReason.SELFTEST_FAILED.value), verdict
    assert "memory" in verdict.detail


def test_a_trial_that_uses_up_its_cpu_time_fails(tmp_path: Path) -> None:
    manifest = manifest_of("v2", 2)
    content = many_golden_samples(60_000)
    golden = msgspec.structs.replace(manifest.golden, samples=60_000, tolerance=1e9)
    manifest = msgspec.structs.replace(manifest, golden=golden)
    verdict = run(tmp_path, bundle(tmp_path, manifest, content), release_of(manifest), cpu_seconds=1)
    assert (verdict.passed, verdict.reason) == (False, RejectReason.SELFTEST_FAILED.value)
    assert verdict.detail == "the trial used up its 1 s of CPU time"


def many_golden_samples(samples: int) -> Content:
    target = io.BytesIO()
    np.savez(target, in_0=np.zeros((samples, 1, 8, 8, 1), np.int8), out_0=np.zeros((samples, 1, 10), np.int8))
    return {**members("v2"), "golden.npz": target.getvalue()}


def test_a_trial_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    manifest = manifest_of("v2", 2)
    path = bundle(tmp_path, manifest, members("v2"))
    verdict = run(tmp_path, path, release_of(manifest), wall_seconds=0.02)
    assert (verdict.passed, verdict.reason) == (False, RejectReason.SELFTEST_FAILED.value)
    assert verdict.detail == "the trial was ended: it was not done within 0.02 s"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param("kill -SEGV $$", "the trial died of SIGSEGV", id="crash"),
        pytest.param("exit 3", "the trial ended with 3", id="exit-code"),
        pytest.param("exit 0", "the trial ended without a verdict", id="silence"),
        pytest.param("echo hello", "the trial ended without a verdict", id="nonsense"),
        pytest.param("yes", "the trial was ended: it wrote more than 65536 bytes", id="flood"),
        pytest.param("yes >&2", "the trial was ended: it was not done within 1 s", id="flood-of-errors"),
        pytest.param("echo '{\"passed\": true}'; exit 1", "the trial ended with 1", id="verdict-then-failure"),
        pytest.param("exec 1>&- 2>&-; sleep 60", "the trial was ended: it was not done within 1 s", id="hang"),
    ],
)
def test_whatever_becomes_of_the_child_is_a_failed_verdict(tmp_path: Path, script: str, said: str) -> None:
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    verdict = run(tmp_path, tmp_path / "any", release_of(manifest_of("v2", 2)), python=str(child), wall_seconds=1)
    assert verdict == TrialVerdict(passed=False, reason=RejectReason.SELFTEST_FAILED.value, detail=said)


def test_a_trial_measures_when_asked_and_the_limits_hold_for_its_children_too(tmp_path: Path) -> None:
    manifest = manifest_of("v2", 2)
    verdict = run(tmp_path, bundle(tmp_path, manifest, members("v2")), release_of(manifest), ladder_seconds=30.0)
    assert verdict.passed, verdict.detail
    assert {rung.runtime for rung in verdict.ladder} == set(RuntimeName)
    assert [rung.error for rung in verdict.ladder if rung.threads == 1] == ["", ""]
    assert choose(verdict.ladder) is not None
