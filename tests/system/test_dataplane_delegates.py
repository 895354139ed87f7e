"""Real delegates, compiled from C, loaded by both runtimes: good ones are used, others are a row with a reason."""

import hashlib
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from dataplane_parts import UnixClient, control_side, write_ewb
from delegate_parts import SIZE, chain_folder, chain_members, compiled

from agent.adapters.delegate_libraries import marks
from agent.adapters.model_store import FolderStore
from agent.adapters.trial import TrialChild
from agent.channel import Configure, Serving, TrialVerdict
from agent.core.delegates import Delegate
from agent.core.rungs import Rung, choose, name, weigh
from agent.inference.ladder import climb, rungs_for, table
from agent.inference.loading import from_folder
from agent.ports import StoredModel, Target
from protocol.manifest import MANIFEST_NAME, encode_manifest
from protocol.release import Assignment, release_of
from protocol.states import RuntimeName

SAMPLE = np.arange(SIZE, dtype=np.float32)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain_folder(tmp_path_factory.mktemp("bundle") / "chain")


def rows(bundle: Path, delegate: Delegate, *, compare: bool = False, seconds: float = 30.0) -> tuple[Rung, ...]:
    """Measure one delegate on both runtimes, and with ``compare`` what works without it."""
    tried = rungs_for(from_folder(bundle, ""), 1, kernels=("",), delegates=(delegate,))
    wanted = tried if compare else [rung for rung in tried if rung.delegate]
    return climb(bundle, wanted, lambda *_: None, delegates=(delegate,), seconds=seconds)


@pytest.fixture(scope="module")
def good(libraries: Path) -> Delegate:
    return compiled(libraries, "TAKES_ALL")


@pytest.fixture(scope="module")
def measured(bundle: Path, good: Delegate) -> tuple[Rung, ...]:
    return rows(bundle, good, compare=True)


# ---------------------------------------------------------------- measuring
def test_a_delegate_that_is_faster_and_right_is_the_rung_to_choose(measured: tuple[Rung, ...]) -> None:
    assert [rung.error for rung in measured] == [""] * 4
    assert [rung.golden for rung in measured] == [2] * 4
    best = choose(measured)
    assert best is not None
    assert best.delegate == "takes-all"
    assert [rung.refused for rung in measured] == [""] * 4


def test_a_delegate_that_leaves_all_to_the_cpu_works_and_is_refused(bundle: Path, libraries: Path) -> None:
    """It is as fast as the CPU; that must not depend on how busy this machine is, so the CPU's figure is made up."""
    alone = rows(bundle, compiled(libraries, "LEAVES_ALL"))
    measured = [msgspec.structs.replace(rung, refused="") for rung in alone]
    assert [(rung.error, rung.golden) for rung in measured] == [("", 2)] * 2
    on_cpu = Rung(runtime=RuntimeName.LITERT, threads=1, p50_us=min(rung.p50_us for rung in measured), golden=2)
    refused = {rung.refused for rung in weigh((*measured, on_cpu)) if rung.delegate}
    assert refused == {f"not faster than litert x 1 with {on_cpu.p50_us} us"}


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        pytest.param("LIES", "golden sample 0", id="other-answers"),
        pytest.param("FAILS_IN_PREPARE", "the accelerator is on fire", id="fails-in-prepare"),
        pytest.param("FAILS_TO_CREATE", "no device is plugged in", id="no-device"),
        pytest.param("ABORTS", "its process ended by SIGABRT", id="crash"),
        pytest.param("NEEDS_OPTION", "option device is not usb:0", id="option-missing"),
    ],
)
def test_a_delegate_that_fails_is_a_row_with_the_reason(
    bundle: Path, libraries: Path, variant: str, said: str
) -> None:
    measured = rows(bundle, compiled(libraries, variant))
    assert [rung.runtime for rung in measured] == list(RuntimeName)
    assert all(said in rung.error for rung in measured), measured
    assert choose(measured) is None


def test_a_delegate_that_hangs_is_ended(bundle: Path, libraries: Path) -> None:
    rung, delegate = Rung(runtime=RuntimeName.LITERT, threads=1, delegate="hangs"), compiled(libraries, "HANGS")
    (ended,) = climb(bundle, [rung], lambda *_: None, delegates=(delegate,), seconds=2.0)
    assert ended.error == "it was not done within 2 s"


def test_options_reach_the_library(bundle: Path, libraries: Path) -> None:
    measured = rows(bundle, compiled(libraries, "NEEDS_OPTION", options={"device": "usb:0"}))
    assert [rung.error for rung in measured] == ["", ""]


@pytest.mark.parametrize(
    ("library", "said"),
    [
        pytest.param("/nowhere/libtpu.so", "/nowhere/libtpu.so cannot be loaded", id="missing"),
        pytest.param("libm.so.6", "tflite_plugin_create_delegate", id="another-library"),
        pytest.param(__file__, "cannot be loaded", id="no-library"),
    ],
)
def test_what_is_no_delegate_is_a_row_with_the_reason(bundle: Path, library: str, said: str) -> None:
    measured = rows(bundle, Delegate(name="tpu", library=library))
    assert all(said in rung.error for rung in measured), measured


def test_the_table_says_why_a_delegate_is_refused() -> None:
    slow = Rung(runtime=RuntimeName.LITERT, threads=1, delegate="tpu", p50_us=99, p95_us=99, golden=2)
    lines = table((slow, Rung(runtime=RuntimeName.LITERT, threads=1, p50_us=100, p95_us=100, golden=2))).splitlines()
    assert lines[1].startswith("  litert x 1 + tpu")
    assert lines[1].endswith("refused: not faster than litert x 1 with 100 us")
    assert lines[2].startswith("> litert x 1")


def test_bench_shows_the_delegates_of_a_settings_file(good: Delegate, libraries: Path, tmp_path: Path) -> None:
    bundle = chain_folder(tmp_path / "chain", RuntimeName.LITERT)
    bad = compiled(libraries, "ABORTS")
    settings = tmp_path / "agent.toml"
    settings.write_text(
        "".join(f'[[inference.delegate]]\nname = "{d.name}"\nlibrary = "{d.library}"\n' for d in (good, bad))
    )
    command = [sys.executable, "-m", "agent", "bench", "--json", "--config", str(settings), str(bundle)]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
    assert answer["best"]["delegate"] == "takes-all"
    assert [rung.get("delegate") for rung in answer["rungs"][:3]] == ["takes-all", "aborts", None]
    assert answer["rungs"][1]["error"].startswith("its process ended by SIGABRT")


# ---------------------------------------------------------------- in the trial
def tried(folder: Path, delegates: tuple[Delegate, ...]) -> TrialVerdict:
    manifest, content = chain_members()
    path = write_ewb(folder / "chain.ewb", manifest, content)
    unpacked = folder / "unpacked"
    unpacked.mkdir()
    target = Target(release=release_of(manifest), assignment=Assignment(rollout="r"), sha256="0" * 64, length=1)
    trial = TrialChild(runtime="litert", ladder_seconds=80.0, wall_seconds=100.0, delegates=delegates)
    return trial.run(str(path), str(unpacked), target)


def test_a_trial_measures_delegates_and_survives_those_that_crash(libraries: Path, tmp_path: Path) -> None:
    delegates = (compiled(libraries, "ABORTS"), compiled(libraries, "TAKES_ALL"))
    verdict = tried(tmp_path, delegates)
    assert verdict.passed, verdict
    best = choose(verdict.ladder)
    assert best is not None
    assert best.delegate == "takes-all"
    crashed = [rung for rung in verdict.ladder if rung.delegate == "aborts"]
    assert all("its process ended by SIGABRT" in rung.error for rung in crashed), crashed


# ---------------------------------------------------------------- in the data plane
@pytest.fixture
def model(bundle: Path, tmp_path: Path, good: Delegate, measured: tuple[Rung, ...]) -> StoredModel:
    """Return the bundle from a store that was told how its trial on a good delegate went."""
    manifest, content = chain_members()
    digest = hashlib.sha256(encode_manifest(manifest)).hexdigest()
    store = FolderStore(tmp_path, delegates=marks((good,)))
    staged = Path(store.stage(digest))
    (staged / MANIFEST_NAME).write_bytes((bundle / MANIFEST_NAME).read_bytes())
    for member, data in content.items():
        (staged / member).write_bytes(data)
    store.admit(digest)
    store.note_rungs(digest, measured)
    found = store.find(digest)
    assert found is not None
    return found


def parameters_of(client: UnixClient) -> dict:
    status, answer = client.ask("GET", "/v2/models/chain/config")
    assert status == 200
    return answer["parameters"]


def test_the_data_plane_serves_with_the_delegate_that_was_measured(
    model: StoredModel, good: Delegate, tmp_path: Path
) -> None:
    assert model.rung is not None
    assert name(model.rung).endswith(" x 1 + takes-all")
    with control_side(tmp_path, configuration=Configure(delegates=(good,))) as control:
        answer = control.serve(model)
        assert isinstance(answer, Serving)
        assert (answer.runtime, answer.without_delegate) == (model.rung.runtime, "")
        with closing(UnixClient(control.unix)) as client:
            assert parameters_of(client)["delegate"] == {"string_value": "takes-all"}
            status, answered = client.infer(SAMPLE, "chain")
    assert status == 200
    assert answered.endswith(SAMPLE.tobytes())


@pytest.mark.parametrize("broken", ["FAILS_TO_CREATE", "LIES"])
def test_a_delegate_that_fails_later_costs_speed_and_not_the_model(
    model: StoredModel, good: Delegate, libraries: Path, tmp_path: Path, broken: str
) -> None:
    """The accelerator was there in the trial, and is gone, or wrong, when the data plane loads the model."""
    gone = msgspec.structs.replace(compiled(libraries, broken), name=good.name)
    with control_side(tmp_path, configuration=Configure(delegates=(gone,))) as control:
        answer = control.serve(model)
        assert isinstance(answer, Serving), answer
        assert answer.without_delegate.startswith("takes-all: chain 1: ")
        with closing(UnixClient(control.unix)) as client:
            assert "delegate" not in parameters_of(client)
            status, answered = client.infer(SAMPLE, "chain")
    assert (status, answered.endswith(SAMPLE.tobytes())) == (200, True)


def test_a_delegate_that_kills_the_data_plane_when_it_reloads_is_left_out(
    model: StoredModel, good: Delegate, libraries: Path, tmp_path: Path
) -> None:
    crashing = msgspec.structs.replace(compiled(libraries, "ABORTS"), name=good.name)
    with control_side(tmp_path, configuration=Configure(delegates=(crashing,))) as control:
        control.supervisor.serve(0, model)  # it served before this start
        served = control.wait_for(lambda event: isinstance(event, Serving))
        with closing(UnixClient(control.unix)) as client:
            status, _ = client.infer(SAMPLE, "chain")
    assert isinstance(served, Serving)
    assert status == 200


# ---------------------------------------------------------------- what was measured is no longer there
def test_a_rung_counts_only_for_the_library_and_options_that_were_measured(
    model: StoredModel, good: Delegate, tmp_path: Path
) -> None:
    other_options = msgspec.structs.replace(good, options={"device": "usb:1"})
    for now in ((), (other_options,)):
        found = FolderStore(tmp_path, delegates=marks(now)).find(model.digest)
        assert found is not None
        assert found.rung is not None
        assert found.rung.delegate == ""
    again = FolderStore(tmp_path, delegates=marks((good,))).find(model.digest)
    assert again is not None
    assert again.rung == model.rung


def test_a_library_that_was_replaced_is_another_delegate(libraries: Path, tmp_path: Path) -> None:
    library = tmp_path / "libtpu.so"
    library.write_bytes(Path(compiled(libraries, "TAKES_ALL").library).read_bytes())
    delegate = Delegate(name="tpu", library=str(library))
    before = marks((delegate,))
    library.write_bytes(library.read_bytes() + b"\0")
    assert marks((delegate,)) != before
