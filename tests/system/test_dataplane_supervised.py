"""The data plane as control runs it: real processes, real sockets, real models."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from dataplane_parts import PATIENCE, UnixClient, control_side, heldout, load, store

from agent.channel import Refused, Serving, StatisticsDelta
from agent.ports import DataPlaneExit


def test_a_served_model_answers_and_its_statistics_arrive(tmp_path: Path) -> None:
    images, truth = heldout()
    model = store(tmp_path, "v2", 2)
    with control_side(tmp_path) as control:
        serving = control.serve(model)
        assert isinstance(serving, Serving)
        client = UnixClient(control.unix)
        right = 0
        for image, true in zip(images[:50], truth[:50], strict=True):
            status, body = client.infer(image)
            assert status == 200
            right += int(np.frombuffer(body[-10:], np.int8).argmax()) == true
        client.close()
        assert right >= 45
    models = [one for delta in control.deltas() for one in delta.models]
    assert sum(one.requests for one in models) == 50
    assert {one.digest for one in models} == {model.digest[:16]}
    assert sum(sum(one.classes) for one in models) == 50
    assert sum(sum(one.confidence) for one in models) == 50
    assert sum(one.latency.count for one in models) == 50


def test_feedback_becomes_truth_of_the_prediction_once(tmp_path: Path) -> None:
    images, truth = heldout()
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v2", 2))
        client = UnixClient(control.unix)
        request = {
            "id": "r-1",
            "inputs": [
                {"name": "image", "datatype": "INT8", "shape": [1, 8, 8, 1], "data": images[0].ravel().tolist()}
            ],
        }
        status, answer = client.ask("POST", "/v2/models/digits/infer", request)
        assert (status, answer["id"]) == (200, "r-1")
        feedback = {"id": "r-1", "truth": int(truth[0])}
        assert client.ask("POST", "/v2/models/digits/feedback", feedback)[0] == 200
        assert client.ask("POST", "/v2/models/digits/feedback", feedback)[0] == 409
        assert client.ask("POST", "/v2/models/digits/feedback", {"id": "never", "truth": 1})[0] == 404
        client.close()
    cells = [cell for delta in control.deltas() for one in delta.truth for cell in one.confusion]
    predicted = int(np.argmax(answer["outputs"][0]["data"]))
    assert cells == [(int(truth[0]), predicted, 1)]
    assert sum(delta.unknown_truth for delta in control.deltas()) == 1


def test_fifty_swaps_under_load_lose_no_request_and_split_the_statistics(tmp_path: Path) -> None:
    first, second = store(tmp_path, "v1", 1), store(tmp_path, "v2", 2)
    with control_side(tmp_path) as control:
        control.serve(first)
        with load(control.unix, clients=2) as clients:
            for k in range(50):
                answer = control.serve(second if k % 2 == 0 else first)
                assert isinstance(answer, Serving)
            clients.wait_for(20)
        assert clients.failures == []
        control.supervisor.stop()
        assert control.requests_counted() == clients.answered
    served = {one.digest for delta in control.deltas() for one in delta.models}
    assert served == {first.digest[:16], second.digest[:16]}


def test_a_bundle_that_cannot_serve_is_refused_and_the_old_one_serves_on(tmp_path: Path) -> None:
    good, bad = store(tmp_path, "v1", 1), store(tmp_path, "v2", 2)
    model_file = Path(bad.folder) / "model.tflite"
    model_file.write_bytes(model_file.read_bytes()[:4000])
    with control_side(tmp_path) as control, load(control.unix) as clients:
        control.serve(good)
        refused = control.serve(bad)
        assert isinstance(refused, Refused)
        assert "cannot load" in refused.reason
        failures = len(clients.failures)  # from before anything served
        clients.wait_for(20)
        assert len(clients.failures) == failures


def test_a_kill_under_load_refuses_no_connection_and_the_same_models_serve_again(tmp_path: Path) -> None:
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v2", 2))
        gaps = []
        with load(control.unix, clients=4, keep_alive=False) as clients:
            for _ in range(3):
                clients.wait_for(50)
                pid, heard = control.supervisor.pid, len(control.heard)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
                control.wait_for(lambda event: isinstance(event, Serving) and event.ticket == 0, since=heard)
                clients.wait_for(4)
                gaps.append(time.monotonic() - killed)
        assert clients.refused == 0
        assert len(clients.failures) <= 3 * 4  # at most what was in flight, per kill
        assert not [failure for failure in clients.failures if "404" in failure]
        assert max(gaps) < 5.0
        exits = [event for event in control.heard if isinstance(event, DataPlaneExit)]
        assert [(event.returncode, event.planned) for event in exits] == [(-signal.SIGKILL, False)] * 3


@pytest.mark.parametrize("keep_alive", [True, False])
def test_a_planned_restart_loses_no_request(tmp_path: Path, keep_alive: bool) -> None:
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v2", 2))
        with load(control.unix, clients=3, keep_alive=keep_alive) as clients:
            for _ in range(3):
                clients.wait_for(30)
                old = control.supervisor.pid
                assert old is not None
                control.supervisor.restart_planned()
                assert control.wait_for_end(old).planned
                clients.wait_for(30)
                assert control.supervisor.pid != old
        assert clients.failures == []
        control.supervisor.stop()
        assert control.requests_counted() == clients.answered


def test_connections_made_while_no_data_plane_lives_are_served_by_the_next(tmp_path: Path) -> None:
    image = heldout()[0][0]
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v1", 1))
        pid = control.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        statuses: list[int] = []

        def ask() -> None:
            client = UnixClient(control.unix)
            statuses.append(client.infer(image)[0])
            client.close()

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert statuses == [200] * 40


def test_a_withdrawn_model_is_unknown_also_after_a_restart(tmp_path: Path) -> None:
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v1", 1))
        control.withdraw("digits")
        client = UnixClient(control.unix)
        assert client.ask("GET", "/v2/models/digits")[0] == 404
        client.close()
        pid = control.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        client = UnixClient(control.unix)
        status, answer = client.ask("GET", "/v2/models/digits")
        client.close()
        assert status == 404
        assert "not served here" in answer["error"]


def test_the_fleet_alone_loads_and_unloads(tmp_path: Path) -> None:
    with control_side(tmp_path) as control:
        client = UnixClient(control.unix)
        status, answer = client.ask("POST", "/v2/repository/models/digits/load", {})
        client.close()
        assert status == 400
        assert "fleet" in answer["error"]


def test_the_data_plane_dies_with_its_control(tmp_path: Path) -> None:
    """A control process is killed: its child must not live on and hold the sockets."""
    story = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dataplane_parts import control_side, store\n"
        "folder = Path(sys.argv[1])\n"
        "with control_side(folder) as control:\n"
        "    control.serve(store(folder, 'v1', 1))\n"
        "    print(control.supervisor.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", story, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
    ) as control:
        assert control.stdout
        data_plane = int(control.stdout.readline())
        control.kill()
        control.wait()
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{data_plane}/exe").exists() or _is_live(tmp_path / "inference.sock"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_live(unix: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(unix))
        except ConnectionRefusedError:
            return False
        return True


def test_stopping_an_idle_data_plane_is_clean(tmp_path: Path) -> None:
    with control_side(tmp_path) as control:
        control.serve(store(tmp_path, "v1", 1))
        pid = control.supervisor.pid
        assert pid is not None
    ended = [event for event in control.heard if isinstance(event, DataPlaneExit)]
    assert [(event.pid, event.returncode, event.planned) for event in ended] == [(pid, 0, True)]
    assert not [event for event in control.heard if isinstance(event, StatisticsDelta)]
