"""``edgewarden-server backup, restore, doctor, user``: what an operator types, on real folders and databases."""

import json
import re
import time
from pathlib import Path

import pytest
from data_world import NOW, enrol
from postgres_cluster import Cluster

from fleet_server.__main__ import main
from fleet_server.adapters.authority import CertificateAuthority
from fleet_server.adapters.backup import UNFINISHED
from fleet_server.adapters.data_lock import DataLock
from fleet_server.adapters.database.accounts import DatabaseAccounts
from fleet_server.adapters.database.opening import open_database
from fleet_server.adapters.passwords import Argon2Passwords
from fleet_server.core import findings
from fleet_server.core.access import Role
from fleet_server.core.audit import SERVER, Act
from fleet_server.core.findings import DAY, Finding, Level
from fleet_server.ports import Account

GIB = 1 << 30


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a database and one user."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o700)
    engine = open_database(f"sqlite:///{folder / 'edgewarden.db'}")
    enrol(engine, "cam-1")
    account = Account(name="admin", password_hash="x", role=Role.ADMIN, created_at=NOW)
    DatabaseAccounts(engine).add_account(
        account, Act(at=NOW, who=SERVER, by=SERVER, address="", action="add-user", about="admin")
    )
    engine.dispose()
    return folder


def typed(data: Path, *words: object) -> int:
    return main([str(words[0]), *map(str, words[1:]), "--data", str(data)])


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    return {finding["about"]: finding for finding in json.loads(capsys.readouterr().out)}


# ---------------------------------------------------------------- what is found, in words
JUDGED: dict[str, tuple[Finding, Level, str]] = {
    "room enough": (findings.judge_disk(50 * GIB, 100 * GIB), Level.FINE, "50.0 of 100.0 GiB"),
    "little room": (findings.judge_disk(4 * GIB, 100 * GIB), Level.WARNING, "4.0 of 100.0 GiB"),
    "no room": (findings.judge_disk(GIB // 8, 100 * GIB), Level.TROUBLE, "0.1 of 100.0 GiB"),
    "a clock after what is stored": (findings.judge_clock(NOW, NOW - DAY), Level.FINE, "not behind"),
    "a clock with nothing to compare": (findings.judge_clock(NOW, None), Level.FINE, "not behind"),
    "a clock that went back": (findings.judge_clock(NOW, NOW + 3_600_000), Level.TROUBLE, "60 minutes behind"),
    "today's schema": (findings.judge_schema("7", "7", is_known=True), Level.FINE, "schema 7"),
    "an older schema": (findings.judge_schema("6", "7", is_known=True), Level.WARNING, "schema 6, and .* 7"),
    "no schema yet": (findings.judge_schema(None, "7", is_known=False), Level.WARNING, "none yet"),
    "a newer schema": (findings.judge_schema("8", "7", is_known=False), Level.TROUBLE, "schema 8"),
    "all is summed": (findings.judge_sums(None, NOW), Level.FINE, "are made"),
    "sums of today wait": (findings.judge_sums(NOW - DAY, NOW), Level.FINE, "are made"),
    "nothing was summed for days": (findings.judge_sums(NOW - 9 * DAY, NOW), Level.WARNING, "9 days ago"),
    "a young leaf": (findings.judge_certificate("server", NOW + 80 * DAY, NOW, is_ca=False), Level.FINE, "80 days"),
    "a leaf nobody renewed": (
        findings.judge_certificate("server", NOW + 9 * DAY, NOW, is_ca=False),
        Level.WARNING,
        "9 days",
    ),
    "an old CA": (findings.judge_certificate("ca", NOW + 80 * DAY, NOW, is_ca=True), Level.WARNING, "80 days"),
    "a dead CA": (findings.judge_certificate("ca", NOW - 2 * DAY, NOW, is_ca=True), Level.TROUBLE, "2 days ago"),
    "a root with time": (findings.judge_role("image-root", NOW + 300 * DAY, NOW), Level.FINE, "300 days"),
    "a root to renew": (findings.judge_role("image-root", NOW + 5 * DAY, NOW), Level.WARNING, "expires in 5 days"),
    "an expired root": (findings.judge_role("image-root", NOW - 5 * DAY, NOW), Level.TROUBLE, "expired 5 days ago"),
    "a private folder": (findings.judge_mode("/d", 0o700, is_ours=True), Level.FINE, "only its owner"),
    "an open folder": (findings.judge_mode("/d", 0o750, is_ours=True), Level.TROUBLE, "mode 0750"),
    "another's folder": (findings.judge_mode("/d", 0o700, is_ours=False), Level.TROUBLE, "somebody else"),
}


@pytest.mark.parametrize(("finding", "level", "words"), JUDGED.values(), ids=JUDGED.keys())
def test_every_fact_has_its_level_and_what_is_not_fine_has_a_remedy(
    finding: Finding, level: Level, words: str
) -> None:
    assert finding.level is level
    assert re.search(words, finding.sentence)
    assert bool(finding.remedy) == (level is not Level.FINE)


# ---------------------------------------------------------------- doctor
def test_a_server_that_does_not_run_is_in_trouble_with_its_broker_only(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CertificateAuthority(data / "authority", hosts=["localhost"], now=_now())
    assert typed(data, "doctor", "--json") == 1
    told = found(capsys)
    assert [about for about, finding in told.items() if finding["level"] == "trouble"] == ["broker"]
    assert told["database"]["level"] == told["certificate device-ca"]["level"] == "fine"
    assert typed(data, "doctor") == 1
    assert "trouble  broker: nothing answers at" in capsys.readouterr().out


def test_what_is_wrong_with_a_folder_is_named_with_a_remedy(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.chmod(0o755)
    (data / UNFINISHED).write_text("x")
    (data / "edgewarden.db").write_bytes(b"not a database, by far" * 100)
    (data / "authority").mkdir()
    (data / "authority" / "server.pem").write_text("nonsense")
    assert typed(data, "doctor", "--json") == 1
    told = found(capsys)
    assert "cut short" in told["data folder"]["sentence"]
    assert told[f"permissions of {data}"]["remedy"] == f"run: chmod go= {data}"
    assert {told[about]["level"] for about in ("database", "certificates", "broker")} == {"trouble"}
    assert typed(data / "nowhere", "doctor") == 1
    assert "there is no" in capsys.readouterr().out


def test_a_postgresql_that_is_away_is_named(
    data: Path, tmp_path: Path, postgres: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "server.toml"
    for name, level in (("nothing-here", "trouble"), (postgres.database().database, "warning")):
        settings.write_text(f'database = "postgresql://test@/{name}?host={postgres.folder}"\n')
        assert typed(data, "doctor", "--json", "--config", settings) == 1  # the broker is away
        assert found(capsys)["database"]["level"] == level


# ---------------------------------------------------------------- backup and restore
def test_a_backup_comes_back_by_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.zip"
    assert typed(data, "backup", copy) == 0
    assert typed(data, "backup", copy) == 1
    assert typed(tmp_path / "new", "restore", copy) == 0
    assert typed(tmp_path / "new", "restore", copy) == 1
    assert typed(tmp_path / "new", "restore", copy, "--force") == 0
    assert typed(data, "backup", data / "copy.zip") == 1
    errors = capsys.readouterr().err
    for words in ("is there already", "--force puts aside", "part of the next backup"):
        assert words in errors


def test_nothing_is_restored_under_a_server_that_runs(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(data, "backup", tmp_path / "copy.zip") == 0
    lock = DataLock(data)
    try:
        assert typed(data, "backup", tmp_path / "while-it-runs.zip") == 0
        assert typed(data, "restore", tmp_path / "copy.zip", "--force") == 1
    finally:
        lock.release()
    assert "another edgewarden-server runs" in capsys.readouterr().err


# ---------------------------------------------------------------- passwords
def hash_of(data: Path) -> str:
    engine = open_database(f"sqlite:///{data / 'edgewarden.db'}")
    try:
        account = DatabaseAccounts(engine).account("admin")
        assert account is not None
        return account.password_hash
    finally:
        engine.dispose()


def test_a_password_is_made_or_taken_from_a_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(data, "user", "reset-password", "admin") == 0
    made = capsys.readouterr().out.strip().rpartition(" ")[2]
    assert Argon2Passwords().is_right(hash_of(data), made)
    (tmp_path / "password").write_text("correct horse battery\n")
    assert typed(data, "user", "reset-password", "admin", "--password-file", tmp_path / "password") == 0
    assert "correct horse" not in capsys.readouterr().out
    assert Argon2Passwords().is_right(hash_of(data), "correct horse battery")


def test_a_user_who_is_not_there_or_a_bad_password_changes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "password").write_text("no\n")
    assert typed(data, "user", "reset-password", "nobody") == 1
    assert typed(data, "user", "reset-password", "admin", "--password-file", tmp_path / "password") == 1
    errors = capsys.readouterr().err
    assert "there is no user 'nobody'" in errors
    assert "a password has" in errors
    assert hash_of(data) == "x"


def _now() -> int:
    return time.time_ns() // 1_000_000
