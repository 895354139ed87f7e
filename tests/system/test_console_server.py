"""The whole server as a process: starts, says where it is, keeps sessions over a restart, leaves nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import urllib3

from fleet_server.cli.session import Session

pytestmark = pytest.mark.broker


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def running(data: Path, ports: list[int], **environment: str) -> Iterator["subprocess.Popen[str]"]:
    console, devices, broker, admin = ports
    command = [sys.executable, "-m", "fleet_server", "serve", "--data", str(data), "--public-host", "localhost"]
    command += ["--console", f"127.0.0.1:{console}", "--devices", f"127.0.0.1:{devices}"]
    command += ["--broker", f"127.0.0.1:{broker}", "--broker-admin-port", str(admin)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        wait_for_health(process, console)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for_health(process: "subprocess.Popen[str]", port: int) -> None:
    deadline = time.monotonic() + 30
    with urllib3.PoolManager(retries=False, timeout=2.0) as pool:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if pool.request("GET", f"http://127.0.0.1:{port}/health").status == 200:
                    return
            except urllib3.exceptions.HTTPError:
                time.sleep(0.1)
    raise AssertionError("the server did not come up")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_within_seconds(tmp_path: Path, number: signal.Signals) -> None:
    ports = free_ports(4)
    with running(tmp_path / "data", ports) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert [child.name() for child in children] == ["mosquitto"]
        os.killpg(process.pid, number)  # as a terminal or a service manager does it: to the whole group
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    assert f"Console: http://127.0.0.1:{ports[0]}" in said
    assert not any(child.is_running() for child in children)
    assert ("Traceback" in said, "the broker ended" in said) == (False, False)


def test_the_password_is_shown_once_and_a_session_outlives_a_restart(tmp_path: Path) -> None:
    data, ports = tmp_path / "data", free_ports(4)
    with running(data, ports) as process:
        password = (data / "admin-password").read_text().strip()
        assert ((data / "admin-password").stat().st_mode & 0o777, data.stat().st_mode & 0o777) == (0o600, 0o700)
        session = Session(f"http://127.0.0.1:{ports[0]}", cookies=tmp_path / "cookies.json")
        session.login(password)
        process.terminate()
        _, first = process.communicate(timeout=20)
    with running(data, ports) as process:
        overview = session.get("/overview", dict[str, object])
        session.close()
        process.terminate()
        _, second = process.communicate(timeout=20)
    assert overview["trust_ready"] is False
    assert (password in first, password in second) == (True, False)


def test_systemd_hears_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(address)
        notify.settimeout(20)
        with running(tmp_path / "data", free_ports(4), NOTIFY_SOCKET=address) as process:
            ready = notify.recv(1000).decode()
            process.terminate()
            stopping = notify.recv(1000).decode()
            process.communicate(timeout=20)
    assert (ready.startswith("READY=1\nSTATUS=console at http://"), stopping.startswith("STOPPING=1")) == (True, True)


def test_a_taken_port_is_said_in_words_and_nothing_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "fleet_server", "serve", "--data", str(tmp_path / "data")]
        command += ["--console", f"127.0.0.1:{port}", "--devices", "127.0.0.1:0", "--broker", "127.0.0.1:0"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, f"cannot listen on 127.0.0.1:{port}" in ended.stderr) == (1, True)
    assert not (tmp_path / "data" / "broker").exists()
