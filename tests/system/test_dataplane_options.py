"""What a data plane is started with: words that reach it, and limits that allow nothing."""

import subprocess
import sys

import pytest

from agent.config import InferenceSettings
from agent.daemon import data_plane_options
from agent.inference.__main__ import _parser


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_agents_log_level_is_its_data_planes_too(level: str) -> None:
    options = _parser().parse_args(data_plane_options(InferenceSettings(), level))
    assert level == options.log_level


LIMITS = {"too little to begin": ("1", "too little to serve anything"), "no number": ("-1", "not a number of bytes")}


@pytest.mark.parametrize(("limit", "said"), LIMITS.values(), ids=LIMITS.keys())
def test_a_memory_limit_that_allows_nothing_is_said_in_words(limit: str, said: str) -> None:
    command = [sys.executable, "-m", "agent", "serve", "examples/digits/v1", "--http", "127.0.0.1:0"]
    ended = subprocess.run(
        [*command, f"--memory-bytes={limit}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, said in ended.stderr, "Traceback" in ended.stderr) == (2, True, False), ended.stderr
