"""Every reader of a stranger's bytes, on its corpus and on what becomes of it: nothing escapes but its own errors."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = Path(__file__).parents[2] / "fuzz" / "fuzz_targets.py"
EXAMPLES = 200  # per target; `make fuzz` has more time


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzz = _load()
NAMES = sorted(fuzz.TARGETS)
PLACE = st.integers(0, 2**16)


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """Cut, repeat, overwrite and insert."""
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(PLACE) % (len(data) + 1)
        match draw(st.sampled_from(["cut", "flip", "insert", "repeat", "drop"])):
            case "cut":
                del data[at:]
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[at:at] = draw(st.one_of(st.binary(max_size=8), st.sampled_from(NASTY)))
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case _:
                del data[at : at + draw(st.integers(1, 16))]
    return bytes(data)


NASTY = (
    b"[" * 2000,
    b'{"a":' * 2000,
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"\r\n",
    b"\r\n\r\n",
    b"\x00",
    b"\xff" * 4,
    b"\xed\xa0\x80",
    b"%00%ff%",
    b"\\ud800",
    b"true",
    b"null",
)


def test_every_target_has_a_corpus_and_every_corpus_a_target() -> None:
    assert NAMES == sorted(path.name for path in fuzz.CORPUS.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_survives_its_corpus(name: str) -> None:
    for data in fuzz.seeds(name):
        fuzz.TARGETS[name](data)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_survives_any_damage_to_its_corpus(name: str) -> None:
    target, seeds = fuzz.TARGETS[name], st.sampled_from(fuzz.seeds(name))

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(seeds.flatmap(damaged))
    def survives(data: bytes) -> None:
        target(data)

    survives()


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_survives_noise(name: str) -> None:
    target = fuzz.TARGETS[name]

    @settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(st.binary(max_size=300), st.sampled_from(NASTY)))
    def survives(data: bytes) -> None:
        target(data)

    survives()
