"""What an installation brings: a device stays light, and every third-party import has its extra."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def brought_by(extra: str) -> set[str]:
    """Return the distributions that an extra names, those of the extras within included."""
    names: set[str] = set()
    for line in SETUP["options.extras_require"][extra].split("\n"):
        if own := re.match(r"edgewarden\[([a-z,]+)\]", line.strip()):
            for inner in own[1].split(","):
                names |= brought_by(inner)
        elif match := re.match(r"[A-Za-z0-9_.-]+", line.strip()):
            names.add(match[0].lower())
    return names


HEAVY = {"litestar", "uvicorn", "sqlalchemy", "alembic", "jinja2", "argon2-cffi", "typer", "rich", "tensorflow"}


def test_a_device_gets_no_server_package() -> None:
    assert set() == HEAVY & brought_by("agent")


def test_the_server_gets_no_model_runtime() -> None:
    assert set() == {"numpy", "ai-edge-litert", "tflite-runtime"} & brought_by("server")


def test_the_packages_the_user_fixed_are_there() -> None:
    assert {"tflite-runtime", "paho-mqtt", "psutil", "cryptography", "apscheduler"} <= brought_by("agent")


@pytest.mark.parametrize("script", SETUP["options.entry_points"]["console_scripts"].strip().splitlines())
def test_every_command_exists(script: str) -> None:
    module, _, function = script.partition("=")[2].strip().partition(":")
    source = ROOT / (module.replace(".", "/") + ".py")
    assert re.search(rf"^def {function}\(", source.read_text(), re.MULTILINE), source


def test_the_top_level_is_as_agreed() -> None:
    for name in ("agent", "fleet_server", "converters", "tests", "systemd", "setup.cfg"):
        assert (ROOT / name).exists(), name
