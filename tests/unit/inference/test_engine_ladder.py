"""Measuring a model rung by rung, in children that may crash."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from inference_parts import EXAMPLES, IMAGE, engine, servable

from agent.adapters.model_store import FolderStore
from agent.core.rungs import Rung, choose
from agent.inference.ladder import climb, measure, rungs_for, table
from agent.inference.loading import Settings, load_one, run_golden
from protocol.manifest import Golden
from protocol.states import RuntimeName

L, T = RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME


@pytest.mark.parametrize(("cores", "threads"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])], ids=str)
def test_threads_double_up_to_the_cores(tmp_path: Path, cores: int, threads: list[int]) -> None:
    rungs = rungs_for(servable(tmp_path, "v2", 2), cores, kernels=("",))
    assert [(L, n) for n in threads] + [(T, n) for n in threads] == [(rung.runtime, rung.threads) for rung in rungs]


def test_only_what_the_manifest_allows_is_tried(tmp_path: Path) -> None:
    model = servable(tmp_path, "v2", 2)
    assert model.manifest
    needs = msgspec.structs.replace(model.manifest.needs, runtimes=(T,))
    rungs = rungs_for(servable(tmp_path, "v2", 2, needs=needs), 1)
    assert {rung.runtime for rung in rungs} == {T}
    assert [rung.kernels for rung in rungs] == ["", "plain", "reference"]


@pytest.mark.parametrize("runtime", [L, T])
@pytest.mark.parametrize("kernels", ["", "plain", "reference"])
def test_every_kind_of_kernels_passes_the_golden_samples(tmp_path: Path, runtime: RuntimeName, kernels: str) -> None:
    model = servable(tmp_path, "v2", 2)
    with load_one(model, Settings(runtime=runtime.value, kernels=kernels)) as loaded:
        assert run_golden(model, loaded) == 20


def test_a_rung_is_measured(tmp_path: Path) -> None:
    rung = measure(servable(tmp_path, "v2", 2), Rung(runtime=L, threads=1))
    assert (rung.error, rung.golden) == ("", 20)
    assert 0 < rung.p50_us <= rung.p95_us


def test_a_rung_whose_golden_samples_disagree_does_not_count(tmp_path: Path) -> None:
    rung = measure(servable(tmp_path, "v2", 2, golden=Golden(samples=7, tolerance=1)), Rung(runtime=L, threads=1))
    assert "20 samples, the manifest says 7" in rung.error
    assert choose([rung]) is None


def test_a_rung_that_crashes_is_a_row_and_no_end(tmp_path: Path) -> None:
    """tflite-runtime dies of a truncated model; LiteRT says what is wrong."""
    broken = tmp_path / "broken.tflite"
    broken.write_bytes((EXAMPLES / "v2" / "model.tflite").read_bytes()[:2000])
    seen: list[int] = []
    litert, tflite = climb(
        broken, [Rung(runtime=L, threads=1), Rung(runtime=T, threads=1)], lambda done, *_: seen.append(done)
    )
    assert seen == [0, 1]
    assert "cannot load" in litert.error
    assert tflite.error
    assert "its process ended" in tflite.error or "cannot load" in tflite.error


def test_a_rung_that_takes_too_long_is_ended() -> None:
    (rung,) = climb(EXAMPLES / "v2", [Rung(runtime=L, threads=1)], lambda *_: None, seconds=0.01)
    assert rung.error == "it was not done within 0.01 s"


def test_the_table_marks_the_best() -> None:
    rungs = [Rung(runtime=L, threads=1, p50_us=9, p95_us=10, golden=20), Rung(runtime=T, threads=1, error="it died")]
    lines = table(rungs).splitlines()
    assert [line[0] for line in lines] == [" ", ">", " "]
    assert lines[2].endswith("it died")


def test_bench_answers_in_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent", "bench", "--json", str(EXAMPLES / "v2")],
        capture_output=True,
        check=True,
        timeout=100,
    )
    answer = json.loads(done.stdout)
    assert not [rung for rung in answer["rungs"] if "error" in rung]
    assert answer["best"] in answer["rungs"]


def test_what_is_preferred_for_a_bundle_is_how_it_is_loaded(tmp_path: Path) -> None:
    one = engine()
    model = servable(tmp_path, "v2", 2)
    one.prefer(model.digest, runtime=T.value, threads=2)
    assert one.serve(model).runtime is T
    assert one.find("digits").run("r", (IMAGE,))
    assert one.serve(servable(tmp_path, "v1", 1)).runtime is L
    one.close()


def test_what_was_measured_is_kept_beside_the_bundle_and_collected_with_it(tmp_path: Path) -> None:
    digest = "a" * 64
    store = FolderStore(tmp_path)
    staged = Path(store.stage(digest))
    for path in (EXAMPLES / "v2").iterdir():
        (staged / path.name).write_bytes(path.read_bytes())
    assert store.admit(digest).rung is None
    store.note_rungs(digest, [Rung(runtime=T, threads=2, p50_us=5)])
    bench = tmp_path / "models" / f"{digest}.bench.json"
    for again in (store, FolderStore(tmp_path)):
        found = again.find(digest)
        assert found is not None
        assert found.rung == Rung(runtime=T, threads=2, p50_us=5)
    store.collect([digest])
    assert bench.exists()
    bench.write_bytes(b"{")
    found = FolderStore(tmp_path).find(digest)
    assert found is not None
    assert found.rung is None
    store.collect([])
    assert not bench.exists()
