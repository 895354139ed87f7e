"""Pipelines and capture in real data planes: under control, on their own, through swaps, restarts and kills."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from dataplane_parts import Control, UnixClient, control_side, heldout, store

from agent.channel import CANDIDATE, Configure, Shadow, ShadowDelta, Shadowing
from agent.config import AgentSettings, load_settings
from agent.inference.samples import SampleFolder
from runtime.interpreter import LoadedModel, open_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"
PATIENCE = 20.0


def eventually(question: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not question():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def settings(folder: Path, text: str) -> AgentSettings:
    """Read an agent.toml whose state and inbox are below the folder."""
    for name in ("state", "in"):
        (folder / name).mkdir(exist_ok=True)
    file = folder / "agent.toml"
    file.write_text(f'[device]\nstate = "{folder / "state"}"\n{text}')
    return load_settings(file)


def door(folder: Path, **more: object) -> str:
    extra = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return f"""
[[pipeline]]
name = "door"
model = "digits"
policy = "every"
{extra}
[pipeline.source]
kind = "directory"
path = "{folder / "in"}"
poll_seconds = 0.1
[[pipeline.sink]]
kind = "file"
path = "{folder / "out.jsonl"}"
"""


def results(folder: Path) -> list[dict]:
    file = folder / "out.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def drop(folder: Path, numbers: range) -> None:
    images = heldout()[0]
    for number in numbers:
        hidden = folder / "in" / f".{number:04}.raw"
        hidden.write_bytes(images[number % len(images)].tobytes())
        hidden.rename(folder / "in" / f"{number:04}.raw")


@contextmanager
def agent(folder: Path, text: str) -> Iterator[Control]:
    one = settings(folder, text)
    order = Configure(pipelines=one.pipelines, capture=one.capture, state=one.device.state)
    with control_side(folder, configuration=order, first_backoff=0.01) as control:
        yield control


def asked(control: Control, path: str) -> tuple[int, dict]:
    client = UnixClient(control.unix)
    try:
        return client.ask("GET", path)
    finally:
        client.close()


# ---------------------------------------------------------------- pipelines
def test_a_folder_is_answered_while_models_are_swapped_and_the_data_plane_is_replaced(tmp_path: Path) -> None:
    with agent(tmp_path, door(tmp_path)) as control:
        control.serve(store(tmp_path, "v1", 1))
        writer = threading.Thread(target=_drop_slowly, args=(tmp_path, 150))
        writer.start()
        eventually(lambda: len(results(tmp_path)) >= 20)
        control.serve(store(tmp_path, "v2", 2))
        control.supervisor.restart_planned()
        writer.join()
        eventually(lambda: len(results(tmp_path)) >= 150)
        status, said = asked(control, "/v2/pipelines")
    found = results(tmp_path)
    assert [f"{number:04}.raw" for number in range(150)] == sorted(line["frame"] for line in found)
    assert {1, 2} == {line["version"] for line in found}
    assert 150 == len(list((tmp_path / "in" / "done").iterdir()))
    assert (200, "running") == (status, said["pipelines"][0]["state"])
    assert 150 == control.requests_counted()


def _drop_slowly(folder: Path, count: int) -> None:
    for number in range(count):
        drop(folder, range(number, number + 1))
        time.sleep(0.01)


def test_a_data_plane_that_is_killed_goes_on_with_its_pipelines(tmp_path: Path) -> None:
    with agent(tmp_path, door(tmp_path)) as control:
        control.serve(store(tmp_path, "v1", 1))
        drop(tmp_path, range(5))
        eventually(lambda: len(results(tmp_path)) == 5)
        pid = control.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        control.wait_for_end(pid)
        drop(tmp_path, range(5, 10))
        eventually(lambda: len(results(tmp_path)) == 10)


def test_a_program_dies_with_the_data_plane_that_started_it(tmp_path: Path) -> None:
    text = door(tmp_path).replace(
        f'kind = "directory"\npath = "{tmp_path / "in"}"\npoll_seconds = 0.1',
        'kind = "exec"\ncommand = ["sleep", "54321"]',
    )
    with agent(tmp_path, text) as control:
        control.serve(store(tmp_path, "v1", 1))
        pid = control.supervisor.pid
        assert pid is not None
        eventually(lambda: _sleepers(pid))
        [sleeper] = _sleepers(pid)
        os.kill(pid, signal.SIGKILL)
        control.wait_for_end(pid)
        eventually(lambda: not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE)


def _sleepers(parent: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(parent).children() if one.cmdline() == ["sleep", "54321"]]


def test_frames_are_pushed_over_http_and_all_is_counted(tmp_path: Path) -> None:
    text = door(tmp_path, max_frame=64).replace(
        f'kind = "directory"\npath = "{tmp_path / "in"}"\npoll_seconds = 0.1', 'kind = "http"'
    )
    with agent(tmp_path, text) as control:
        control.serve(store(tmp_path, "v1", 1))
        client = UnixClient(control.unix)
        for body, expected in ((bytes(64), 202), (bytes(65), 413)):
            client.request("POST", "/v2/pipelines/door", body=body)
            response = client.getresponse()
            response.read()
            assert expected == response.status
            if expected == 413:
                client.close()
        assert (404, True) == _said(client.ask("POST", "/v2/pipelines/window"), "those that are: door")
        assert 405 == client.ask("DELETE", "/v2/pipelines")[0]
        eventually(lambda: len(results(tmp_path)) == 1)
        eventually(lambda: client.ask("GET", "/v2/pipelines/door")[1]["sinks"][0]["delivered"] == 1)
        client.request("GET", "/metrics")
        metrics = client.getresponse().read().decode()
        client.close()
    assert 'edgewarden_pipeline_answered{pipeline="door"} 1\n' in metrics
    assert 'edgewarden_pipeline_sink_delivered{pipeline="door",sink="0",kind="file"} 1\n' in metrics


def _said(answer: tuple[int, dict], words: str) -> tuple[int, bool]:
    status, body = answer
    return status, words in body["error"]


# ---------------------------------------------------------------- capture
CAPTURE = "[capture]\nenabled = true\nrandom = 1.0\nsamples_per_day = 4\n"


def test_samples_are_kept_inside_the_budget_through_a_kill_and_told_of_on_the_unix_socket_only(
    tmp_path: Path,
) -> None:
    images = heldout()[0]
    with agent(tmp_path, CAPTURE) as control:
        control.serve(store(tmp_path, "v1", 1))
        client = UnixClient(control.unix)
        for image in images[:3]:
            assert 200 == client.infer(image)[0]
        client.close()
        eventually(lambda: len(asked(control, "/v2/captures")[1]["captures"]) == 3)
        pid = control.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        control.wait_for_end(pid)
        client = UnixClient(control.unix)
        for image in images[3:9]:
            assert 200 == client.infer(image)[0]
        client.close()
        eventually(lambda: sum(asked(control, "/v2/captures")[1]["refused"].values()) == 5)
        status, listed = asked(control, "/v2/captures?status=held")
        assert (200, 4) == (status, len(listed["captures"]))
        one = listed["captures"][0]
        assert (200, one) == asked(control, f"/v2/captures/{one['id']}")
        assert 404 == asked(control, "/v2/captures/0190000000000-0000000000000000")[0]
        assert 400 == asked(control, "/v2/captures?status=stolen")[0]
        assert 0 == len(asked(control, "/v2/captures?status=released")[1]["captures"])
        assert 403 == _over_tcp(control, "/v2/captures")
    folder = SampleFolder(tmp_path / "state")
    kept = {folder.read(sample_id).inputs[0].data for sample_id, _ in folder.ids()}
    assert kept <= {image.tobytes() for image in images[:9]}
    assert 4 == len(kept)


def _labels(example: str, images: list[np.ndarray]) -> list[int]:
    with open_model(EXAMPLES / example / "model.tflite") as model:
        return [_label(model, image) for image in images]


def _label(model: LoadedModel, image: np.ndarray) -> int:
    model.fill(0, image.tobytes())
    model.invoke()
    return int(model.array(0).argmax())


@pytest.mark.parametrize(
    ("policy", "kept", "refused"),
    [
        pytest.param("", ["disagreement"] * 3, {}, id="only-what-they-disagree-on"),
        pytest.param("samples_per_day = 2", ["disagreement"] * 2, {"samples-per-day": 1}, id="inside-the-budget"),
        pytest.param("random = 1.0", ["random"] * 6, {}, id="nothing-twice"),
    ],
)
def test_what_candidate_and_stable_disagree_on_is_captured(
    tmp_path: Path, policy: str, kept: list[str], refused: dict[str, int]
) -> None:
    images = list(heldout()[0][:200])
    both = list(zip(images, _labels("v1", images), _labels("v3", images), strict=True))
    disputed = [(image, first) for image, first, other in both if first != other][:3]
    agreed = [(image, first) for image, first, other in both if first == other][:3]
    with agent(tmp_path, f"[capture]\nenabled = true\ndisagreement = true\n{policy}\n") as control:
        control.serve(store(tmp_path, "v1", 1))
        control.serve(store(tmp_path, "v3", 3), CANDIDATE)
        control.supervisor.shadow(Shadow(ticket=900, model="digits", share=1.0, cpu=1.0))
        control.wait_for(lambda event: isinstance(event, Shadowing))
        client = UnixClient(control.unix)
        for image, _ in (*disputed, *agreed):
            assert 200 == client.infer(image)[0]
        client.close()
        eventually(lambda: sum(e.counts.compared for e in control.heard if isinstance(e, ShadowDelta)) == 6)
        eventually(lambda: len(asked(control, "/v2/captures")[1]["captures"]) == len(kept))
        eventually(lambda: asked(control, "/v2/captures")[1]["refused"] == refused)
        _, listed = asked(control, "/v2/captures")
    assert kept == [one["trigger"] for one in listed["captures"]]
    if "disagreement" in kept:
        folder = SampleFolder(tmp_path / "state")
        samples = [folder.read(one["id"]) for one in listed["captures"]]
        found = {(one.inputs[0].data, one.head.label, one.head.version) for one in samples}
        assert len(found) == len(kept)
        assert found <= {(image.tobytes(), label, 1) for image, label in disputed}


def _over_tcp(control: Control, path: str) -> int:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(control.http + path) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_hook_that_cannot_be_had_stops_capture_and_not_serving(tmp_path: Path) -> None:
    with agent(tmp_path, CAPTURE + 'redact = "no.such:hook"\n') as control:
        control.serve(store(tmp_path, "v1", 1))
        client = UnixClient(control.unix)
        assert 200 == client.infer(heldout()[0][0])[0]
        client.close()
        assert (409, True) == _said(asked(control, "/v2/captures"), "no.such:hook")
        assert [] == list((tmp_path / "state" / "captures").glob("*.ewc"))


# ---------------------------------------------------------------- on its own
@contextmanager
def alone(folder: Path, *more: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "agent", "serve", str(EXAMPLES / "v1"), "--unix", str(folder / "s.sock"), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


def test_serve_runs_the_pipelines_of_a_settings_file(tmp_path: Path) -> None:
    settings(tmp_path, door(tmp_path) + CAPTURE)
    drop(tmp_path, range(3))
    with alone(tmp_path, "--config", str(tmp_path / "agent.toml")) as process:
        eventually(lambda: len(results(tmp_path)) == 3)
        eventually(lambda: len(list((tmp_path / "state" / "captures").glob("*.ewc"))) == 3)
    assert 0 == process.returncode


@pytest.mark.parametrize(("text", "said"), [("[capture]\ncolour = 1\n", "colour"), (None, "cannot be read")])
def test_serve_says_what_is_wrong_with_a_settings_file(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "agent.toml"
    if text is not None:
        file.write_text(text)
    command = [sys.executable, "-m", "agent", "serve", str(EXAMPLES / "v1"), "--config", str(file)]
    ended = subprocess.run(
        [*command, "--unix", str(tmp_path / "s")], capture_output=True, check=False, timeout=PATIENCE
    )
    assert (2, True) == (ended.returncode, said in ended.stderr.decode())
