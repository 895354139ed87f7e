"""Sources: real folders, programs, brokers, cameras. What breaks is said and tried again; the model never notices."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from pipelines_parts import IMAGES, eventually, lines, running

from agent.core.pipelines import DirectorySource
from agent.inference.pipelines.directory import DirectoryFrames

IMAGE = IMAGES.tobytes()
WRITER = "import sys,time\nfor k in range({n}):\n sys.stdout.buffer.write({frame})\n sys.stdout.flush()\n{then}"


def outlet(folder: Path) -> dict:
    return {"kind": "file", "path": str(folder / "out.jsonl")}


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


# ---------------------------------------------------------------- directory
@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def directory(inbox: Path, **more: object) -> dict:
    return {"kind": "directory", "path": str(inbox), "poll_seconds": 0.1, **more}


def test_files_are_answered_in_order_and_moved(tmp_path: Path, inbox: Path) -> None:
    for number in range(3):
        (inbox / f"{number}.raw").write_bytes(IMAGE)
    with running(tmp_path / "s", directory(inbox), outlet(tmp_path)) as pipeline:
        eventually(lambda: pipeline.deliveries[0].delivered == 3)
        (inbox / "late.raw").write_bytes(IMAGE)
        eventually(lambda: pipeline.deliveries[0].delivered == 4)
    written = lines(tmp_path / "out.jsonl")
    assert ["0.raw", "1.raw", "2.raw", "late.raw"] == [line["frame"] for line in written]
    assert {("digits", 1, "door")} == {(line["model"], line["version"], line["pipeline"]) for line in written}
    assert {"class", "name", "confidence", "id", "at", "took_us"} <= set(written[0])
    assert 4 == len(list((inbox / "done").iterdir()))
    assert [] == [path for path in inbox.iterdir() if path.is_file()]


def test_frames_count_in_the_models_statistics(tmp_path: Path, inbox: Path) -> None:
    (inbox / "a.raw").write_bytes(IMAGE)
    with running(tmp_path / "s", directory(inbox)) as pipeline:
        eventually(lambda: pipeline.answered == 1)
        [counters] = pipeline._asker._engine.statistics.all()
        assert 1 == counters.totals().success


@pytest.mark.parametrize(("after", "left"), [("delete", []), ("keep", ["a.raw"])])
def test_files_may_be_deleted_or_kept(tmp_path: Path, inbox: Path, after: str, left: list[str]) -> None:
    (inbox / "a.raw").write_bytes(IMAGE)
    with running(tmp_path / "s", directory(inbox, after=after)) as pipeline:
        eventually(lambda: pipeline.answered == 1)
        time.sleep(0.4)
        assert 1 == pipeline.answered
    assert left == [path.name for path in inbox.iterdir()]


def test_a_file_that_does_not_fit_is_put_aside_and_counted_for_the_model(tmp_path: Path, inbox: Path) -> None:
    (inbox / "bad.raw").write_bytes(b"too short")
    (inbox / "good.raw").write_bytes(IMAGE)
    with running(tmp_path / "s", directory(inbox)) as pipeline:
        eventually(lambda: (pipeline.bad, pipeline.answered) == (1, 1))
        eventually((inbox / "failed" / "bad.raw").exists)
        assert "64 bytes, the frame has 9" in pipeline.describe()["error"]
        [counters] = pipeline._asker._engine.statistics.all()
        assert (1, 1) == (counters.totals().success, counters.totals().failure)


def test_what_is_not_a_whole_regular_file_is_left_alone(tmp_path: Path, inbox: Path) -> None:
    (inbox / ".hidden").write_bytes(IMAGE)
    (inbox / "upload.part").write_bytes(IMAGE)
    (inbox / "link").symlink_to(tmp_path / "elsewhere")
    (inbox / "note.txt").write_bytes(IMAGE)
    with running(tmp_path / "s", directory(inbox, pattern="*.raw")) as pipeline:
        (inbox / "ok.raw").write_bytes(IMAGE)
        eventually(lambda: pipeline.answered == 1)
        assert 0 == pipeline.bad


def test_a_file_that_is_still_written_waits(tmp_path: Path, inbox: Path) -> None:
    with (
        running(tmp_path / "s", directory(inbox, poll_seconds=0.05)) as pipeline,
        (inbox / "slow").open("wb") as file,
    ):
        for _ in range(8):
            file.write(IMAGE[:8])
            file.flush()
            time.sleep(0.03)
        assert 0 == pipeline.bad
        file.close()
        eventually(lambda: pipeline.answered == 1)


def test_a_file_over_the_cap_is_not_read(tmp_path: Path, inbox: Path) -> None:
    (inbox / "huge").write_bytes(bytes(5000))
    with running(tmp_path / "s", directory(inbox), max_frame=4096) as pipeline:
        eventually(lambda: pipeline.bad == 1)
        assert "max_frame" in pipeline.error


def test_without_inotify_looking_is_enough(tmp_path: Path, inbox: Path) -> None:
    with running(tmp_path / "s", directory(inbox)) as pipeline:
        pipeline.finish()
    with running(tmp_path / "s2", directory(inbox)) as pipeline:
        pipeline._source._made = DirectoryFrames(
            DirectorySource(path=str(inbox), poll_seconds=0.1), 4096, watch=False
        )
        (inbox / "a.raw").write_bytes(IMAGE)
        eventually(lambda: pipeline.answered == 1)


def test_a_folder_that_vanishes_is_waited_for(tmp_path: Path, inbox: Path) -> None:
    with running(tmp_path / "s", directory(inbox)) as pipeline:
        eventually(lambda: pipeline.state == "running")
        shutil.rmtree(inbox)
        eventually(lambda: pipeline.state == "failing")
        assert pipeline.describe()["source"]["error"]
        inbox.mkdir()
        eventually(lambda: pipeline.state == "running")
        (inbox / "a.raw").write_bytes(IMAGE)
        eventually(lambda: pipeline.answered == 1)


def test_where_only_the_latest_counts_older_files_are_put_away_unread(tmp_path: Path, inbox: Path) -> None:
    for number in range(50):
        (inbox / f"{number:02}.raw").write_bytes(IMAGE)
    with running(tmp_path / "s", directory(inbox), policy="latest") as pipeline:
        eventually(lambda: pipeline.answered + pipeline.mailbox.dropped == 50)
        eventually(lambda: len(list((inbox / "done").iterdir())) == 50)
        assert pipeline.mailbox.dropped > 0


# ---------------------------------------------------------------- exec
def test_frames_of_a_program_are_split_by_their_length(tmp_path: Path) -> None:
    program = WRITER.format(n=5, frame="(64).to_bytes(4,'big')+bytes(64)", then="time.sleep(60)")
    source = {"kind": "exec", "command": python(program), "framing": "length"}
    with running(tmp_path / "s", source) as pipeline:
        eventually(lambda: pipeline.answered == 5)


def test_lines_of_a_program_are_frames(tmp_path: Path) -> None:
    program = WRITER.format(n=3, frame="str([0]*64).encode()+b'\\n'", then="time.sleep(60)")
    source = {"kind": "exec", "command": python(program)}
    with running(tmp_path / "s", source, preprocess={"kind": "json"}) as pipeline:
        eventually(lambda: pipeline.answered == 3)


ENDINGS = {
    "it ends": (python("raise SystemExit(3)"), "ended with code 3"),
    "it is not there": (["no-such-program-here"], "no such program"),
    "its line never ends": (
        python("import sys\nwhile True: sys.stdout.write('x'*999)"),
        "longer than the 4096 bytes",
    ),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_a_program_that_fails_is_started_again(tmp_path: Path, case: str) -> None:
    command, said = ENDINGS[case]
    with running(tmp_path / "s", {"kind": "exec", "command": command}, max_frame=4096) as pipeline:
        eventually(lambda: pipeline.health.restarts >= 2)
        assert said in pipeline.health.error


def test_a_frame_that_announces_too_much_ends_the_program(tmp_path: Path) -> None:
    program = WRITER.format(n=1, frame="b'\\xff\\xff\\xff\\xff'", then="time.sleep(60)")
    source = {"kind": "exec", "command": python(program), "framing": "length"}
    with running(tmp_path / "s", source, max_frame=4096) as pipeline:
        eventually(lambda: pipeline.health.restarts >= 1)
        assert "4294967295 bytes is over the 4096" in pipeline.health.error


def test_a_program_that_floods_is_read_no_faster_than_the_model_answers(tmp_path: Path) -> None:
    source = {"kind": "exec", "command": ["yes", str([0] * 64)]}
    with running(tmp_path / "s", source, preprocess={"kind": "json"}, policy="latest") as pipeline:
        eventually(lambda: pipeline.answered >= 20)
        assert pipeline.mailbox.dropped > 0
        assert len(pipeline.mailbox) <= 1


def test_a_program_ends_with_its_pipeline(tmp_path: Path) -> None:
    mark = f"sleep-{time.time_ns()}"
    with running(
        tmp_path / "s", {"kind": "exec", "command": python(f"import time; '{mark}'; time.sleep(60)")}
    ) as one:
        eventually(lambda: one.state == "running")
        eventually(lambda: mark in processes())
    assert mark not in processes()


def processes() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------- interval
def test_a_file_is_read_every_so_often(tmp_path: Path) -> None:
    (tmp_path / "now.raw").write_bytes(IMAGE)
    with running(
        tmp_path / "s", {"kind": "interval", "seconds": 0.05, "path": str(tmp_path / "now.raw")}
    ) as pipeline:
        eventually(lambda: pipeline.answered >= 3)
        (tmp_path / "now.raw").unlink()
        eventually(lambda: pipeline.bad >= 2)
        assert "No such file" in pipeline.error


def test_a_program_is_run_every_so_often(tmp_path: Path) -> None:
    source = {"kind": "interval", "seconds": 0.05, "command": ["echo", str([0] * 64)]}
    with running(tmp_path / "s", source, preprocess={"kind": "json"}) as pipeline:
        eventually(lambda: pipeline.answered >= 3)


def test_times_that_cannot_be_understood_are_said(tmp_path: Path) -> None:
    with running(tmp_path / "s", {"kind": "interval", "cron": "61 * * * *", "path": "/x"}) as pipeline:
        eventually(lambda: "61 * * * *" in pipeline.health.error)


# ---------------------------------------------------------------- camera
def test_a_video_is_read_picture_by_picture(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for number in range(10):
        writer.write(np.full((48, 64, 3), number * 20, np.uint8))
    writer.release()
    source = {"kind": "camera", "device": str(tmp_path / "v.avi")}
    with running(tmp_path / "s", source, preprocess={"kind": "image"}) as pipeline:
        eventually(lambda: pipeline.answered >= 10)
        eventually(lambda: "no more pictures" in pipeline.health.error)
        assert 0 == pipeline.bad


def test_a_camera_that_is_not_there_is_said(tmp_path: Path) -> None:
    with running(tmp_path / "s", {"kind": "camera", "device": "/dev/video99"}) as pipeline:
        eventually(lambda: pipeline.health.error)
        assert "cannot be opened" in pipeline.health.error or "edgewarden[camera]" in pipeline.health.error


# ---------------------------------------------------------------- mqtt
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def broker(folder: Path, port: int) -> Iterator[None]:
    (folder / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen(
        [shutil.which("mosquitto") or "/usr/sbin/mosquitto", "-c", str(folder / "mosquitto.conf")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: can_connect(port))
        yield
    finally:
        process.kill()
        process.wait()


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def client(port: int, topic: str | None = None) -> Iterator[tuple[mqtt.Client, list[bytes]]]:
    heard: list[bytes] = []
    ready: list[int] = []
    one = mqtt.Client(CallbackAPIVersion.VERSION2)
    one.on_message = lambda _c, _u, message: heard.append(message.payload)
    one.on_subscribe = lambda *_: ready.append(1)
    one.on_connect = lambda c, *_: c.subscribe(topic) if topic else ready.append(1)
    one.connect("127.0.0.1", port)
    one.loop_start()
    eventually(lambda: ready)
    try:
        yield one, heard
    finally:
        one.disconnect()
        one.loop_stop()


@pytest.mark.broker
def test_messages_of_a_topic_are_frames_and_results_go_to_another(tmp_path: Path) -> None:
    port = free_port()
    source = {"kind": "mqtt", "topic": "in/#", "port": port}
    sink = {"kind": "mqtt", "topic": "out", "port": port}
    with (
        broker(tmp_path, port),
        running(tmp_path / "s", source, sink) as pipeline,
        client(port, "out") as (one, heard),
    ):
        eventually(lambda: pipeline.state == "running")
        one.publish("in/a", IMAGE)
        one.publish("in/b", b"short")
        one.publish("in/c", IMAGE)
        eventually(lambda: len(heard) == 2)
        assert ["in/a", "in/c"] == [json.loads(line)["frame"] for line in heard]
        assert 1 == pipeline.bad


@pytest.mark.broker
def test_a_broker_that_is_down_is_tried_again_by_source_and_sink(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "now").write_bytes(IMAGE)
    source = {"kind": "mqtt", "topic": "in", "port": port}
    with running(tmp_path / "s", source) as pipeline:
        eventually(lambda: pipeline.health.restarts >= 2)
        assert f"127.0.0.1:{port}" in pipeline.health.error
        for _ in range(2):
            with broker(tmp_path, port):
                eventually(lambda: pipeline.state == "running")
                answered = pipeline.answered
                with client(port) as (one, _):
                    one.publish("in", IMAGE)
                    eventually(lambda before=answered: pipeline.answered > before)
            eventually(lambda: pipeline.state == "failing")
