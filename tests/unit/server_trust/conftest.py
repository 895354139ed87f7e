from pathlib import Path
from typing import Any

import pytest
from trust_world import World
from typer import Typer
from typer.testing import CliRunner

from fleet_server.cli import keys as keys_command
from fleet_server.cli import publish as publish_command
from fleet_server.cli import release_desk

cli = Typer()
cli.add_typer(keys_command.app, name="keys")
for command in (publish_command.publish, publish_command.yank, publish_command.floor):
    cli.command()(command)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A server without trust roots yet."""
    return World(tmp_path)


@pytest.fixture
def ready(world: World) -> World:
    """A server with both trust roots."""
    return world.ready()


@pytest.fixture
def run(world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command against the world's server."""

    def session(server: str | None = None) -> Any:
        return world.client

    monkeypatch.setattr(type(world.client), "close", lambda self: None, raising=False)
    monkeypatch.setattr(release_desk, "Session", session)

    def invoke(*args: object, typed: str | None = None) -> Any:
        return CliRunner().invoke(cli, [str(a) for a in args], input=typed)

    return invoke
