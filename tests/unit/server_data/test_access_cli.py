"""``edgewarden login``, ``users``, ``api-tokens`` and ``audit`` against a running web."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner
from web_world import PASSWORD, Web, running_web

from fleet_server.adapters.database import tables
from fleet_server.cli.__main__ import app
from fleet_server.cli.session import Session, Unreachable

NEW = "a password of some length"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with running_web(tmp_path_factory.mktemp("access-cli")) as running:
        yield running


@pytest.fixture
def run(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Command":
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("EDGEWARDEN_SERVER", web.url)
    monkeypatch.setenv("EDGEWARDEN_PASSWORD", PASSWORD)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "new").write_text(NEW + "\n")
    return Command()


class Command:
    """Runs commands in this process."""

    def __call__(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.output

    def fine(self, *arguments: str) -> str:
        code, printed = self(*arguments)
        assert code == 0, printed
        return printed

    def json(self, *arguments: str) -> object:
        return json.loads(self.fine(*arguments, "--json"))


def test_a_user_is_added_changed_and_removed(run: Command, tmp_path: Path) -> None:
    file = str(tmp_path / "new")
    assert run.json("users", "add", "grace", "viewer", "--password-file", file)["revision"] == 1  # type: ignore[index]  # JSON
    assert "grace: operator" in run.fine("users", "role", "grace", "operator")
    assert "disabled" in run.fine("users", "disable", "grace")
    assert [u["disabled"] for u in run.json("users", "list")] == [False, True]  # type: ignore[attr-defined]  # JSON
    run.fine("users", "enable", "grace")
    run.fine("users", "password", "grace", "--password-file", file)
    assert "grace" in run.fine("users", "list")
    run.fine("users", "remove", "grace")
    codes = [run("users", "role", "grace", "viewer")[0], run("users", "role", "a/b", "viewer")[0]]
    assert [*codes, run("users", "disable", "admin")[0]] == [1, 2, 1]


def test_a_person_logs_in_says_who_they_are_and_changes_the_password(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.fine("users", "add", "ada", "operator", "--password-file", str(tmp_path / "new"))
    run.fine("logout")
    monkeypatch.delenv("EDGEWARDEN_PASSWORD")
    run.fine("login", "--user", "ada", "--password-file", str(tmp_path / "new"))
    assert run.json("whoami")["role"] == "operator"  # type: ignore[index]  # JSON
    assert "ada, operator, by session; may: look, order" in run.fine("whoami")
    (tmp_path / "newer").write_text("yet another password")
    run.fine("password", "--present-file", str(tmp_path / "new"), "--new-file", str(tmp_path / "newer"))
    assert run.json("whoami")["user"] == "ada"  # type: ignore[index]  # JSON
    code, printed = run("users", "list")
    assert (code, "permission 'users'" in printed) == (1, True)
    run.fine("logout", "--everywhere")
    assert run("whoami")[0] == 3


def test_a_script_uses_a_token_from_the_environment_and_leaves_the_log_in_alone(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    run.fine("api-tokens", "create", "ci", "--scope", "look", "-s", "devices", "--output", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as script:
        script.setenv("EDGEWARDEN_TOKEN", file.read_text().strip())
        me = run.json("whoami")
        assert (me["by"].startswith("token:"), me["permissions"]) == (True, ["look", "devices"])  # type: ignore[index]  # JSON
        assert run("users", "list")[0] == 1
        assert run("api-tokens", "list")[0] == 1
    (token,) = run.json("api-tokens", "list")  # type: ignore[misc]  # JSON
    run.fine("api-tokens", "revoke", token["id"])
    assert "revoked" in run.fine("api-tokens", "list", "--everybody")
    monkeypatch.setenv("EDGEWARDEN_TOKEN", file.read_text().strip())
    assert run("whoami")[0] == 3
    assert run("api-tokens", "revoke", "../x")[0] == 2


def test_a_creation_whose_answer_was_lost_is_asked_for_again_and_done_once(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, lost = Session._send, [True]

    def send(self: Session, method: str, path: str, *rest: object, **more: object) -> object:
        answer = whole(self, method, path, *rest, **more)  # type: ignore[arg-type]  # passed on
        if path == "/users" and lost:
            lost.clear()
            raise Unreachable(0, "no answer", "cut off")
        return answer

    monkeypatch.setattr(Session, "_send", send)
    run.fine("users", "add", "once", "viewer", "--password-file", str(tmp_path / "new"))
    assert not lost
    assert "once" in run.fine("users", "list")


# ---------------------------------------------------------------- the audit log
def test_the_log_is_listed_and_its_chain_holds(run: Command) -> None:
    run.fine("devices", "list")
    assert "login" in run.fine("audit")
    entries = [json.loads(line) for line in run.fine("audit", "list", "--limit", "3", "--json").splitlines()]
    assert [entry["sequence"] for entry in entries] == sorted(entry["sequence"] for entry in entries)
    assert "admin" in run.fine("audit", "list", "--who", "admin", "--action", "login")
    first = run.json("audit", "verify")
    assert first["holds"] is True  # type: ignore[index]  # JSON
    run.fine("logout")
    second = run.fine("audit", "verify")
    assert f"goes on from entry {first['entries']}, where it ended before" in second  # type: ignore[index]  # JSON
    assert run("audit", "verify", "--head", "nonsense")[0] == 2


def test_the_first_broken_link_is_printed(run: Command, web: Web) -> None:
    run.fine("audit", "verify")
    with web.engine.begin() as connection:
        last = connection.scalar(sa.select(sa.func.max(tables.audit.c.sequence)))
        kept = connection.execute(sa.select(tables.audit).where(tables.audit.c.sequence == last)).one()
        connection.execute(sa.delete(tables.audit).where(tables.audit.c.sequence == last))
    code, printed = run("audit", "verify")
    assert (code, f"entry {last}: missing" in printed) == (1, True)
    with web.engine.begin() as connection:
        connection.execute(sa.insert(tables.audit).values(kept._asdict()))
        connection.execute(sa.update(tables.audit).where(tables.audit.c.sequence == 2).values(about="nothing"))
    code, printed = run("audit", "verify", "--json")
    assert (code, json.loads(printed.splitlines()[0])["broken_at"]) == (1, 2)
