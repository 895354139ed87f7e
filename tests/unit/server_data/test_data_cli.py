"""The operators' command line against a running web: what it prints, as text and as JSON, and its exit codes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_world import birth, bundle, enrol, event, report
from typer.testing import CliRunner
from web_world import Web, running_web

from fleet_server.adapters.database.registry import DatabaseReleases
from fleet_server.api_types import DeploymentView, EventView
from fleet_server.cli.__main__ import app
from fleet_server.cli.orders import Watcher
from fleet_server.cli.session import Session
from fleet_server.ports import Batch
from protocol.messages import RunningModel
from protocol.states import DeploymentState as D
from protocol.states import EventKind, RejectReason


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("cli")) as running:
        enrol(running.engine, "cam-1", "cam-2", "cam-3", labels={"site": "oslo"})
        DatabaseReleases(running.engine).add_bundles([bundle(1, sha256="a" * 64), bundle(2)])
        now = running.clock()
        model = RunningModel(model="digits", state=D.COMMITTED, version=1, digest="a" * 64)
        running.telemetry.store(
            Batch(
                states=[("cam-1", birth(at=now, models=(model,)))],
                reports=[("cam-1", report(1, start=now - 60_000, truth=((0, 0, 9), (1, 0, 1))))],
                events=[("cam-1", event(1, at=now - 9, detail="\x1b[31mred")), ("cam-2", event(1, at=now))],
                received_at=now,
            )
        )
        yield running


@pytest.fixture
def run(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Command"]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("EDGEWARDEN_SERVER", web.url)
    monkeypatch.setenv("EDGEWARDEN_PASSWORD", "correct horse")
    monkeypatch.setenv("COLUMNS", "200")
    return Command()


class Command:
    """Runs commands in this process."""

    def __call__(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.output

    def json(self, *arguments: str) -> object:
        code, printed = self(*arguments, "--json")
        assert code == 0, printed
        return json.loads(printed)


def test_status_and_lists_speak_to_people(run: Command) -> None:
    assert "1 new, 2 online" in run("status")[1]
    code, printed = run("devices", "list")
    assert (code, "cam-1" in printed, "committed" in printed, "90.0 %" in printed) == (0, True, True, True)
    assert "90.0 %" in run("models", "list")[1]
    assert "site=oslo" in run("devices", "show", "cam-2")[1]


def test_lists_are_the_api_as_json(run: Command) -> None:
    devices = run.json("devices", "list")
    assert [d["id"] for d in devices] == ["cam-1", "cam-2", "cam-3"]  # type: ignore[union-attr, index, attr-defined]  # JSON
    versions = run.json("models", "list")
    assert [v["version"] for v in versions] == [2, 1]  # type: ignore[union-attr, index, attr-defined]  # JSON
    assert [d["id"] for d in run.json("devices", "list", "--presence", "new")] == ["cam-3"]  # type: ignore[union-attr, index, attr-defined]  # JSON


def test_events_come_oldest_first_and_cannot_steer_the_terminal(run: Command) -> None:
    code, printed = run("events")
    lines = printed.splitlines()
    assert (code, "cam-1" in lines[0], "cam-2" in lines[1], "\x1b" in printed) == (0, True, True, False)


def test_the_session_is_kept_for_its_owner_alone(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("login")[0] == 0
    file = tmp_path / "edgewarden" / "session.json"
    assert (file.stat().st_mode & 0o777, "correct horse" in file.read_text()) == (0o600, False)
    monkeypatch.delenv("EDGEWARDEN_PASSWORD")
    assert run("status")[0] == 0
    assert run("logout")[0] == 0
    code, printed = run("status")
    assert (code, "edgewarden login" in printed) == (3, True)


def test_exit_codes_say_who_must_act(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {
        "unknown device": run("devices", "show", "nobody")[0],
        "not published": run("deploy", "digits", "9", "--all")[0],
        "wrong usage": run("deploy", "digits", "1")[0],
        "both choices": run("deploy", "digits", "1", "--all", "-d", "cam-1")[0],
        "bad label": run("tokens", "create", "--label", "nonsense")[0],
        "trust missing": run("tokens", "create")[0],
    }
    monkeypatch.setenv("EDGEWARDEN_SERVER", "http://127.0.0.1:9")
    codes["no server"] = run("status")[0]
    assert codes == {
        "unknown device": 1,
        "not published": 1,
        "wrong usage": 2,
        "both choices": 2,
        "bad label": 2,
        "trust missing": 1,
        "no server": 4,
    }


def test_a_token_is_written_for_its_owner_alone(run: Command, tmp_path: Path, web: Web) -> None:
    keys = tmp_path / "keys"
    assert run("keys", "init", "--dir", str(keys), "--no-passphrase")[0] == 0
    file = tmp_path / "token"
    code, printed = run("tokens", "create", "--uses", "3", "--label", "site=bergen", "-o", str(file))
    token = file.read_text().strip()
    assert (code, file.stat().st_mode & 0o777, len(token.split(".")), token in printed) == (0, 0o600, 4, False)


# ---------------------------------------------------------------- watching
def step(row: int, state: D, version: int = 2, reason: RejectReason | None = None) -> EventView:
    return EventView(
        row=row,
        device="cam-1",
        at=0,
        received_at=0,
        kind=EventKind.DEPLOYMENT,
        model="digits",
        version=version,
        state=state,
        reason=reason,
    )


class Recorded(Session):
    """A session that plays events."""

    def __init__(self, web: Web, steps: list[EventView]) -> None:
        self._devices = web.parts.queries.devices()
        self._steps = steps

    def get(self, path: str, type: type) -> object:  # type: ignore[override, type-arg]  # noqa: A002 - as Session
        if path.startswith("/devices"):
            return self._devices
        after = int(path.partition("after=")[2].partition("&")[0])
        return tuple(sorted((s for s in self._steps if s.row > after), key=lambda s: -s.row))


WATCHED = {
    "nothing heard yet": ([], (D.IDLE, False, False)),
    "under way": ([step(5, D.DOWNLOADING)], (D.DOWNLOADING, False, False)),
    "taken back": (
        [step(5, D.PROBATION), step(6, D.ROLLED_BACK, reason=RejectReason.CRASHED_IN_PROBATION)],
        (D.ROLLED_BACK, True, False),
    ),
    "what it replaces was superseded": ([step(5, D.SUPERSEDED, version=1)], (D.IDLE, False, False)),
    "only what came after the order counts": ([step(2, D.FAILED)], (D.IDLE, False, False)),
}


@pytest.mark.parametrize(("steps", "expected"), WATCHED.values(), ids=WATCHED.keys())
def test_an_order_is_followed_by_the_steps_after_it(
    web: Web, steps: list[EventView], expected: tuple[D, bool, bool]
) -> None:
    order = DeploymentView(id="o", kind="deploy", model="digits", targets={"cam-1": 2})
    (seen,) = Watcher(session=Recorded(web, steps), order=order, after=3).look()
    assert (seen.state, seen.over, seen.done) == expected


def test_a_device_that_is_there_already_is_done(web: Web) -> None:
    order = DeploymentView(id="o", kind="deploy", model="digits", targets={"cam-1": 1})
    (seen,) = Watcher(session=Recorded(web, []), order=order, after=3).look()
    assert (seen.over, seen.done) == (True, True)
