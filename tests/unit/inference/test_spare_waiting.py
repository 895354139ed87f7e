"""What a process does while it is a spare, and what a data plane leaves unimported that is not configured."""

import subprocess
import sys
from pathlib import Path

import pytest

from agent.channel import Configure, Prepare
from agent.core.capturing import CapturePolicy
from agent.core.pipelines import HttpSource, PipelineSettings
from agent.inference.configured import modules_for
from agent.inference.spare import Waiting
from protocol.states import RuntimeName

UNNEEDED = (
    "agent.config",
    "agent.inference.capture",
    "agent.inference.ladder",
    "agent.inference.pipelines.building",
    "agent.inference.pipelines.pipeline",
    "agent.inference.unmanaged",
    "cryptography",
    "grpc",
    "PIL",
    "statistics",
    "zoneinfo",
)
PUSHED = PipelineSettings(name="pushed", model="digits", source=HttpSource())


@pytest.fixture
def score(tmp_path: Path) -> Path:
    file = tmp_path / "oom_score_adj"
    file.write_text("7\n")
    return file


def test_a_spare_gives_its_memory_up_first_until_it_steps_in(score: Path) -> None:
    waiting = Waiting(score)
    waiting.prepare(Prepare(runtimes=(RuntimeName.LITERT,)))
    waiting.prepare(Prepare(runtimes=(RuntimeName.LITERT,)))  # more is needed
    assert score.read_text() == "1000"
    waiting.step_in()
    assert score.read_text() == "7"


def test_a_process_that_was_no_spare_steps_in_without_a_change(score: Path) -> None:
    Waiting(score).step_in()
    assert score.read_text() == "7\n"


def test_a_kernel_without_such_scores_is_no_hindrance(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path / "none")
    waiting.prepare(Prepare())
    waiting.step_in()


@pytest.mark.parametrize(
    ("order", "modules"),
    [
        (Configure(), []),
        (Configure(state="STATE"), []),
        (Configure(pipelines=(PUSHED,)), ["agent.inference.pipelines.building"]),
        (
            Configure(capture=CapturePolicy(enabled=True), state="STATE"),
            ["agent.inference.capture", "agent.inference.samples"],
        ),
    ],
)
def test_a_spare_imports_what_is_configured(order: Configure, modules: list[str]) -> None:
    assert list(modules_for(order)) == modules


def test_samples_that_were_kept_before_need_capture_too(tmp_path: Path) -> None:
    (tmp_path / "captures").mkdir()
    assert "agent.inference.capture" in modules_for(Configure(state=str(tmp_path)))


def test_a_data_plane_starts_without_what_its_first_answer_does_not_need() -> None:
    imported = "import sys, agent.inference.__main__; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", imported], capture_output=True, text=True, check=True)
    assert set(UNNEEDED) & set(told.stdout.split()) == set()
