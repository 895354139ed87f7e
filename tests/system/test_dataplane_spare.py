"""The spare with the real thing: it waits with everything imported, steps in, and ends with its control."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dataplane_parts import PATIENCE, Control, UnixClient, control_side, heldout, load, store

from agent.channel import Ready, Serving
from agent.ports import DataPlaneExit

LIBRARIES = {"litert": "/ai_edge_litert/", "tflite-runtime": "/tflite_runtime/"}


def eventually(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}/exe").exists()  # a zombie has none


def waiting_spare(control: Control, library: str = "interpreter_wrapper") -> int:
    """Wait until there is a spare that has imported the runtime; return its process id."""
    eventually(lambda: control.supervisor.spare_pid)
    pid = control.supervisor.spare_pid
    assert pid is not None
    eventually(lambda: library in proc(pid, "maps"))
    return pid


@pytest.mark.parametrize("runtime", LIBRARIES)
def test_after_a_kill_the_spare_answers_and_only_what_was_in_flight_fails(tmp_path: Path, runtime: str) -> None:
    scores = Path("/proc/self/oom_score_adj").read_text()
    with control_side(tmp_path, ("--runtime", runtime), spare=True, spare_calm_seconds=0.1) as control:
        model = store(tmp_path, "v2", 2)
        control.serve(model)
        first, spare = control.supervisor.pid, waiting_spare(control, LIBRARIES[runtime])
        assert first is not None
        assert model.folder not in proc(spare, "maps")
        eventually(lambda: proc(spare, "oom_score_adj") == "1000\n")
        with load(control.unix, clients=4, keep_alive=False) as clients:
            clients.wait_for(40)
            os.kill(first, signal.SIGKILL)
            control.wait_for_end(first)
            control.wait_for(lambda event: isinstance(event, Ready) and event.pid == spare)
            clients.wait_for(40)
        assert control.supervisor.pid == spare
        assert clients.refused == 0
        assert len(clients.failures) <= 4
        assert not [failure for failure in clients.failures if "404" in failure]
        eventually(lambda: proc(spare, "oom_score_adj") == scores)
        second = waiting_spare(control, LIBRARIES[runtime])
        assert second not in {first, spare}
    assert is_gone(spare)
    assert is_gone(second)
    ends = [(event.pid, event.planned) for event in control.heard if isinstance(event, DataPlaneExit)]
    assert ends == [(first, False), (spare, True)]


def test_clients_are_never_answered_by_a_spare_and_do_not_notice_its_end(tmp_path: Path) -> None:
    image = heldout()[0][0]
    with control_side(tmp_path, spare=True, spare_calm_seconds=0.1) as control:
        control.serve(store(tmp_path, "v1", 1))
        serving, spare = control.supervisor.pid, waiting_spare(control)
        with load(control.unix, clients=2, keep_alive=False) as clients:
            clients.wait_for(50)
            os.kill(spare, signal.SIGKILL)
            eventually(lambda: control.supervisor.spare_pid != spare)
            clients.wait_for(50)
        assert clients.failures == []
        client = UnixClient(control.unix)
        assert client.infer(image)[0] == 200
        client.close()
        assert control.supervisor.pid == serving
        assert [event.pid for event in control.heard if isinstance(event, Ready)] == [serving]
        assert not [event for event in control.heard if isinstance(event, DataPlaneExit)]


def test_a_planned_restart_takes_a_new_process_and_a_new_spare(tmp_path: Path) -> None:
    with control_side(tmp_path, spare=True, spare_calm_seconds=0.1) as control:
        control.serve(store(tmp_path, "v1", 1))
        first, spare = control.supervisor.pid, waiting_spare(control)
        assert first is not None
        with load(control.unix, clients=2) as clients:
            clients.wait_for(20)
            control.supervisor.restart_planned()
            assert control.wait_for_end(first).planned
            clients.wait_for(20)
        assert clients.failures == []
        eventually(lambda: is_gone(spare))
        assert control.supervisor.pid not in {first, spare}
        assert waiting_spare(control) not in {first, spare}
        reloads = [event for event in control.heard if isinstance(event, Serving) and event.ticket == 0]
        assert len(reloads) == 1


def test_the_spare_dies_with_its_control(tmp_path: Path) -> None:
    story = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dataplane_parts import control_side, store\n"
        "folder = Path(sys.argv[1])\n"
        "with control_side(folder, spare=True, spare_calm_seconds=0.1) as control:\n"
        "    control.serve(store(folder, 'v1', 1))\n"
        "    while control.supervisor.spare_pid is None:\n"
        "        time.sleep(0.01)\n"
        "    print(control.supervisor.spare_pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", story, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    ) as control:
        assert control.stdout
        spare = int(control.stdout.readline())
        control.kill()
        control.wait()
    eventually(lambda: is_gone(spare))
