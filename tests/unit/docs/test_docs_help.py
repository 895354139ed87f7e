"""Every program says what each of its words means, which version it is, and how it ends."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import protocol
from agent.inference.__main__ import _parser as data_plane_parser

BIN = Path(sys.executable).parent
PROGRAMS = ("edgewarden-agent", "edgewarden-server", "edgewarden", "edgewarden-convert", "edgewarden-simulate")
HANDED_ON = (("serve",), ("bench",), ("--log-level", "debug", "serve"), ("--log-level=debug", "bench"))


def load_generate() -> ModuleType:
    place = Path(__file__).parents[3] / "docs" / "reference" / "generate.py"
    spec = importlib.util.spec_from_file_location("docs_help_generate", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


GENERATE = load_generate()
COMMANDS = {command.name: command for program in GENERATE.programs() for command in program.commands}


def said(*words: str) -> str:
    """Return what a program answers, in one line."""
    command = [str(BIN / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "200"}, timeout=60)
    return " ".join(done.stdout.split())


def wordless() -> Iterator[str]:
    for name, command in COMMANDS.items():
        if not command.does:
            yield name
        yield from (f"{name} {option.words}" for option in command.options if not option.meaning)


def test_every_command_argument_and_option_of_every_program_has_a_help_text() -> None:
    assert [] == list(wordless())


def test_the_walk_meets_every_program_and_what_is_nested_deepest() -> None:
    assert set(PROGRAMS) <= set(COMMANDS)
    assert {"edgewarden keys init", "edgewarden-agent bench", "edgewarden-convert pack"} <= set(COMMANDS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_says_its_version(program: str) -> None:
    assert f"{program} {protocol.__version__}" == said(program, "--version")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_a_program_ends_with_its_exit_codes(program: str) -> None:
    assert re.search(r"Exit codes: 0 \w.*[a-z]\)?\.$", said(program, "--help"))


@pytest.mark.parametrize("words", HANDED_ON, ids=" ".join)
def test_what_is_handed_on_to_the_data_plane_is_still_the_agents_own_command(words: tuple[str, ...]) -> None:
    text = said("edgewarden-agent", *words, "--help")
    assert text.startswith(f"usage: edgewarden-agent {words[-1]} ")
    assert "Exit codes: 0 " in text


def test_instances_go_by_the_name_they_have_in_agent_toml_and_by_their_first_one() -> None:
    assert "--workers" not in said("edgewarden-agent", "serve", "--help")
    for words in (["serve", "m", "--instances", "3"], ["serve", "m", "--workers", "3"], ["--workers", "3"]):
        assert 3 == data_plane_parser().parse_args(words).instances
    assert 1 == data_plane_parser().parse_args(["serve", "m"]).instances
