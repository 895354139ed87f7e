"""What `make soak-crash` once found wrong: one test for each fault, so that it stays away."""

import os
import sys
from pathlib import Path

from device_pki import Authority

from agent.adapters.allowance import PARTS, Allowance
from agent.adapters.atomic_file import remove_leftovers
from agent.adapters.history_file import HistoryFile
from agent.adapters.identity import IdentityFolder
from agent.adapters.model_store import FolderStore
from agent.adapters.scratch import Scratch
from agent.core.downloading import DAY_MS
from agent.local_api import Step
from protocol.states import DeploymentState

sys.path.insert(0, str(Path(__file__).parents[2] / "soak"))

from crash_journal import POWER, lay_out, recording


def step(number: int) -> Step:
    return Step(at=number, model="digits", state=DeploymentState.COMMITTED, version=number)


def test_what_a_write_left_that_was_cut_short_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".deployments.json.0a1b2c3d.tmp", "deployments.json", "hold", "spool.db-wal"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert ["deployments.json", "hold", "spool.db-wal"] == sorted(path.name for path in tmp_path.iterdir())


def test_a_store_that_starts_removes_half_a_measurement(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f".{'a' * 64}.bench.json.0a1b2c3d.tmp").touch()
    FolderStore(tmp_path)
    assert [] == list((tmp_path / "models").iterdir())


def test_half_a_line_of_the_history_swallows_no_whole_one(tmp_path: Path) -> None:
    history = HistoryFile(tmp_path / "history.jsonl")
    history.add(step(1))
    for half in (b'{"at":2,"mod', bytes(40)):  # a kill, and a power cut that kept the length only
        with (tmp_path / "history.jsonl").open("ab") as file:
            file.write(half)
        history.add(step(3))
    assert (step(3), step(3), step(1)) == history.newest(3)


def test_a_kill_wastes_no_day_of_a_small_budget(tmp_path: Path) -> None:
    budget = 500_000
    for _ in range(PARTS // 2):  # each is killed after it has booked, and before a byte came
        Allowance(tmp_path / "downloads.json", bytes_per_day=budget, clock=lambda: 20_000 * DAY_MS).begin()
    again = Allowance(tmp_path / "downloads.json", bytes_per_day=budget, clock=lambda: 20_000 * DAY_MS)
    again.begin()
    assert 0 < again.size() <= budget // PARTS


def test_an_enrolment_that_was_completed_survives_a_power_cut(tmp_path: Path) -> None:
    """The folders above the files are flushed too, all that were made."""
    authority, state = Authority(), tmp_path / "state"
    state.mkdir()
    with recording(state) as recorder:
        files = IdentityFolder(state / "agent" / "identity")
        files.accept("cam-7", "https://127.0.0.1:8443", authority.response(files.request("cam-7")))
    disk = recorder.start
    for op in recorder.ops:
        disk.apply(op)
    lay_out(disk.image(POWER), tmp_path / "after")
    assert "cam-7" == IdentityFolder(tmp_path / "after" / "agent" / "identity").load().device


def test_a_copy_of_the_key_that_a_kill_left_goes_with_the_next_enrolment(tmp_path: Path) -> None:
    authority, files = Authority(), IdentityFolder(tmp_path)
    request = files.request("cam-7")
    (tmp_path / ".key.pem.0a1b2c3d.tmp").write_bytes((tmp_path / "key.pem").read_bytes())
    files.accept("cam-7", "https://127.0.0.1:8443", authority.response(request))
    assert [] == list(tmp_path.glob(".*"))


def test_the_throw_away_folder_of_a_killed_agent_goes_with_the_next_start(tmp_path: Path) -> None:
    living, killed, other = Scratch(tmp_path), tmp_path / "edgewarden-agent-killed", tmp_path / "somebody-else"
    (killed / "tuf-1").mkdir(parents=True)
    other.mkdir()
    for folder in (living.path, killed, other):
        os.utime(folder, (0, 0))
    again = Scratch(tmp_path)
    assert {living.path, again.path, other} == set(tmp_path.iterdir())
    again.close()
    living.close()
    assert [other] == list(tmp_path.iterdir())


def test_the_throw_away_folder_of_an_agent_that_is_just_starting_stays(tmp_path: Path) -> None:
    (tmp_path / "edgewarden-agent-young").mkdir()
    Scratch(tmp_path).close()
    assert ["edgewarden-agent-young"] == [path.name for path in tmp_path.iterdir()]
