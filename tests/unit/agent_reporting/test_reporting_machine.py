"""The small adapters: files, the machine's readings, jobs, systemd."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import apscheduler.schedulers.base
import psutil
import pytest

from agent.adapters.atomic_file import read_capped, remove_durably, write_atomically
from agent.adapters.host import MachineHost
from agent.adapters.scheduler import Scheduler, SteadyInterval
from agent.adapters.systemd import Notifier, notifier_from, watchdog_interval
from agent.ports import Trouble


# ---------------------------------------------------------------- files
def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert b"new" == path.read_bytes()
    assert 0o600 == path.stat().st_mode & 0o777
    assert [path] == list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_content_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Trouble, match="No space"):
        write_atomically(path, b"new")
    assert b"old" == path.read_bytes()
    assert [path] == list(tmp_path.iterdir())


KILLED_WRITER = """
import sys
from pathlib import Path
from agent.adapters.atomic_file import write_atomically
number = 0
while True:
    number += 1
    write_atomically(Path(sys.argv[1]), str(number).encode() * 5000)
    print(number, flush=True)
"""


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for lines in (1, 4, 11):
        child = subprocess.Popen([sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(lines):
            child.stdout.readline()
        child.kill()
        child.communicate()
        data = path.read_bytes()
        number = data[: len(data) // 5000]
        assert number * 5000 == data
        assert lines <= int(number)


def test_reading_stops_at_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    assert b"12345" == read_capped(path, 5)
    with pytest.raises(Trouble, match="larger"):
        read_capped(path, 4)
    assert read_capped(tmp_path / "absent", 5) is None
    with pytest.raises(Trouble):
        read_capped(tmp_path, 5)


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", b"")
    remove_durably(tmp_path / "f")
    remove_durably(tmp_path / "f")
    assert [] == list(tmp_path.iterdir())


# ---------------------------------------------------------------- the machine
def test_this_machine_tells_what_it_can(tmp_path: Path) -> None:
    host = MachineHost(tmp_path)
    resources = host.read(os.getpid())
    assert resources.memory is not None
    assert resources.memory_total is not None
    assert 0 < resources.memory < resources.memory_total
    assert resources.control_rss == pytest.approx(resources.data_plane_rss, rel=0.1)
    assert resources.disk_free == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.1)
    assert resources.cpu is not None
    assert 0 <= resources.cpu <= 1000
    assert resources.network_in is not None
    assert resources.network_in >= 0
    assert {"machine", "kernel", "python", "cpus", "memory", "os"} == set(host.facts())


def test_a_vanished_process_is_absent_not_zero(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert MachineHost(tmp_path).read(child.pid).data_plane_rss is None
    assert MachineHost(tmp_path).read(None).data_plane_rss is None


def test_a_missing_sensor_is_absent_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: object) -> object:
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_percent", fail)
    monkeypatch.setattr(psutil, "net_io_counters", fail)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict)
    host = MachineHost(tmp_path / "absent")
    host.read(None)
    resources = host.read(None)
    assert (None, None, None, None, None) == (
        resources.cpu,
        resources.network_in,
        resources.network_out,
        resources.disk_free,
        resources.temperature,
    )
    assert ["network", "cpu", "disk"] == [str(record.args[0]) for record in caplog.records if record.args]


def test_the_hottest_plausible_sensor_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sensor(current: float) -> object:
        return SimpleNamespace(current=current)

    sensors = {"cpu": [sensor(41.26), sensor(-273.2)], "board": [sensor(55.04), sensor(65261.85)]}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors)
    assert 550 == MachineHost(tmp_path).read(None).temperature


def test_a_network_counter_that_went_back_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100, 100), (150, 160), (10, 10), (15, 30)])
    monkeypatch.setattr("agent.adapters.host._network_totals", lambda: next(readings))
    host = MachineHost(tmp_path)
    found = [(r.network_in, r.network_out) for r in (host.read(None) for _ in range(3))]
    assert [(50, 60), (None, None), (5, 20)] == found


# ---------------------------------------------------------------- jobs
@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    jobs = Scheduler()
    yield jobs
    jobs.stop()


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def test_a_job_runs_again_and_again_even_when_it_fails(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []

    def job() -> None:
        runs.append(1)
        raise ValueError("the job's own fault")

    with caplog.at_level(logging.ERROR):
        scheduler.every(0.02, "failing", job)
        assert until(lambda: len(runs) > 2)
    assert any("failing" in record.getMessage() for record in caplog.records)


def test_a_running_job_is_not_started_again(scheduler: Scheduler) -> None:
    running, release, most = [0], threading.Event(), [0]

    def job() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        release.wait(0.1)
        running[0] -= 1

    logging.getLogger("apscheduler").setLevel(logging.CRITICAL)
    scheduler.every(0.01, "slow", job)
    time.sleep(0.25)
    release.set()
    logging.getLogger("apscheduler").setLevel(logging.NOTSET)
    assert 1 == most[0]


class _SetClock(datetime):
    """A wall clock that somebody sets; APScheduler reads it instead of the machine's."""

    offset = timedelta(0)

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime.now(tz=timezone.utc) + cls.offset


@pytest.mark.parametrize("jump", [timedelta(days=20_000), timedelta(days=-15_000)], ids=["forward", "back"])
def test_jobs_go_on_at_their_pace_when_the_clock_jumps(monkeypatch: pytest.MonkeyPatch, jump: timedelta) -> None:
    monkeypatch.setattr(_SetClock, "offset", timedelta(0))
    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", _SetClock)
    jobs = Scheduler()
    runs: list[float] = []
    jobs.every(0.05, "steady", lambda: runs.append(time.monotonic()))
    try:
        assert until(lambda: len(runs) >= 2)
        monkeypatch.setattr(_SetClock, "offset", jump)
        before = len(runs)
        assert until(lambda: len(runs) >= before + 4, 2.0)
        assert len(runs) < before + 20
    finally:
        jobs.stop()


def test_a_steady_interval_lists_few_missed_times() -> None:
    second = SteadyInterval(timedelta(seconds=1))
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert now + timedelta(seconds=1) == second.get_next_fire_time(datetime(1970, 1, 1, tzinfo=timezone.utc), now)
    assert now + timedelta(seconds=0.5) == second.get_next_fire_time(now - timedelta(seconds=0.5), now)


# ---------------------------------------------------------------- systemd
@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind(str(tmp_path / "notify"))
        yield sock


def test_systemd_is_told_in_its_own_words(manager: socket.socket) -> None:
    notifier = notifier_from({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready()
    notifier.status("serving digits 3\nsince noon")
    notifier.alive()
    notifier.stopping()
    told = [manager.recv(4096) for _ in range(4)]
    assert [b"READY=1", b"STATUS=serving digits 3 since noon", b"WATCHDOG=1", b"STOPPING=1"] == told


def test_the_abstract_namespace_is_understood() -> None:
    name = f"edgewarden-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.bind("\0" + name)
        Notifier("@" + name).ready()
        assert b"READY=1" == sock.recv(100)


def test_without_systemd_nothing_happens_and_with_a_dead_one_nothing_breaks(tmp_path: Path) -> None:
    assert not notifier_from({}).enabled
    notifier_from({}).ready()
    Notifier(str(tmp_path / "gone")).ready()


WATCHDOGS = [
    ({}, None),
    ({"WATCHDOG_USEC": "30000000"}, 15.0),
    ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
    ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
    ({"WATCHDOG_USEC": "soon"}, None),
]


@pytest.mark.parametrize(("environment", "interval"), WATCHDOGS)
def test_the_watchdog_is_petted_twice_per_period(environment: dict[str, str], interval: float | None) -> None:
    assert interval == watchdog_interval(environment, 7)
