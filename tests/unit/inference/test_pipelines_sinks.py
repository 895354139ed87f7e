"""Sinks: real files, programs, HTTP servers. A slow or broken one holds up neither the model nor its neighbours."""

import hashlib
import hmac
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pipelines_parts import IMAGES, eventually, lines, running

from agent.core.pipelines import FileSink
from agent.inference.pipelines.file_lines import FileDelivery
from agent.inference.pipelines.flow import SinkFailed, ready_frame
from agent.inference.pipelines.pipeline import Pipeline

IMAGE = IMAGES.tobytes()
PUSHED = {"kind": "http"}


def push(pipeline: Pipeline, count: int = 1) -> None:
    eventually(lambda: pipeline.state == "running")
    for _ in range(count):
        eventually(lambda: pipeline.offer(ready_frame("pushed", IMAGE)))


# ---------------------------------------------------------------- file
def test_a_file_is_rotated_and_only_so_many_are_kept(tmp_path: Path) -> None:
    sink = FileDelivery(FileSink(path=str(tmp_path / "out"), max_bytes=4096, keep=2))
    for number in range(40):
        sink.deliver(json.dumps({"n": number, "pad": "x" * 500}).encode())
    sink.close()
    assert {"out", "out.1", "out.2"} == {path.name for path in tmp_path.iterdir()}
    assert all(path.stat().st_size <= 4096 for path in tmp_path.iterdir())
    numbers = [line["n"] for name in ("out.2", "out.1", "out") for line in lines(tmp_path / name)]
    assert list(range(numbers[0], 40)) == numbers


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    sink = FileDelivery(FileSink(path=str(tmp_path / "out")))
    sink.deliver(b"1")
    (tmp_path / "out").rename(tmp_path / "taken")
    sink.deliver(b"2")
    sink.close()
    assert ("1\n", "2\n") == ((tmp_path / "taken").read_text(), (tmp_path / "out").read_text())


UNWRITABLE = {"the disk is full": "/dev/full", "the folder is not there": "/no/such/folder/out"}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_a_file_that_cannot_be_written_is_a_failure_that_is_told(tmp_path: Path, case: str) -> None:
    other = tmp_path / "other.jsonl"
    sinks = ({"kind": "file", "path": UNWRITABLE[case]}, {"kind": "file", "path": str(other)})
    with running(tmp_path / "s", PUSHED, *sinks) as pipeline:
        broken, well = pipeline.deliveries
        push(pipeline, 3)
        eventually(lambda: broken.dropped >= 1 and well.delivered == 3)
        assert ("failing", "running") == (broken.health.state, well.health.state)
        assert UNWRITABLE[case] in broken.health.error
        assert "running" == pipeline.state


def test_half_a_line_never_stays(tmp_path: Path) -> None:
    import resource

    sink = FileDelivery(FileSink(path=str(tmp_path / "out")))
    sink.deliver(b'{"whole": 1}')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(SinkFailed):
            sink.deliver(b'{"cut off": "in the middle"}')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sink.deliver(b'{"whole": 2}')
    sink.close()
    assert [{"whole": 1}, {"whole": 2}] == lines(tmp_path / "out")


# ---------------------------------------------------------------- exec
def test_a_program_reads_a_line_per_result(tmp_path: Path) -> None:
    program = f"import sys\nfor line in sys.stdin: open({str(tmp_path / 'got')!r}, 'a').write(line)"
    with running(tmp_path / "s", PUSHED, {"kind": "exec", "command": [sys.executable, "-uc", program]}) as pipeline:
        push(pipeline, 3)
        eventually(lambda: len(lines(tmp_path / "got")) == 3)


def test_a_program_that_ends_is_started_again(tmp_path: Path) -> None:
    program = f"import sys\nopen({str(tmp_path / 'got')!r}, 'a').write(sys.stdin.readline())"
    with running(tmp_path / "s", PUSHED, {"kind": "exec", "command": [sys.executable, "-c", program]}) as pipeline:
        for number in range(1, 4):
            push(pipeline)
            eventually(lambda n=number: len(lines(tmp_path / "got")) >= n)
            time.sleep(0.1)
        assert pipeline.deliveries[0].failures >= 1


def test_a_program_that_never_reads_holds_up_nobody(tmp_path: Path) -> None:
    sleeper = {"kind": "exec", "command": ["sleep", "60"], "queue": 2}
    other = {"kind": "file", "path": str(tmp_path / "out")}
    with running(tmp_path / "s", PUSHED, sleeper, other, outputs=True) as pipeline:
        pipeline.deliveries[0]._sink._make = _stuck
        push(pipeline, 10)
        eventually(lambda: pipeline.deliveries[1].delivered == 10)
        eventually(lambda: pipeline.deliveries[0].dropped >= 5)


def _stuck() -> object:
    from agent.core.pipelines import ExecSink
    from agent.inference.pipelines.children import ExecDelivery

    class Filled(ExecDelivery):
        def deliver(self, record: bytes) -> None:
            super().deliver(record * 1000)  # more than a pipe holds

    return Filled(ExecSink(command=("sleep", "60")), take_seconds=0.3)


# ---------------------------------------------------------------- webhook
@contextmanager
def receiver(answer: Callable[[BaseHTTPRequestHandler, int], None]) -> Iterator[tuple[str, list[tuple[dict, bytes]]]]:
    got: list[tuple[dict, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((dict(self.headers), body))
            answer(self, len(got))

        def log_message(self, *_: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            return  # clients that cut the connection are the point of some tests

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler, int], None]:
    def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def hook(url: str, **more: object) -> dict:
    return {"kind": "webhook", "url": url, "timeout_seconds": 0.5, **more}


def test_results_are_posted_and_signed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    with (
        receiver(status(204)) as (url, got),
        running(tmp_path / "s", PUSHED, hook(url, secret_file=str(tmp_path / "secret"))) as pipeline,
    ):
        push(pipeline, 2)
        eventually(lambda: pipeline.deliveries[0].delivered == 2)
    headers, body = got[0]
    assert "digits" == json.loads(body)["model"]
    signed = headers["X-Edgewarden-Timestamp"].encode() + b"." + body
    assert "sha256=" + hmac.new(b"s3cret", signed, hashlib.sha256).hexdigest() == headers["X-Edgewarden-Signature"]


def test_a_server_that_fails_at_first_gets_the_result_later(tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        status(503 if number < 3 else 200)(handler, number)

    with receiver(answer) as (url, got), running(tmp_path / "s", PUSHED, hook(url)) as pipeline:
        push(pipeline)
        eventually(lambda: pipeline.deliveries[0].delivered == 1)
        assert 3 == len(got)
        assert (2, 0) == (pipeline.deliveries[0].failures, pipeline.deliveries[0].dropped)


FINAL = {
    "refused": (status(400), "answers 400"),
    "redirected": (status(307, Location="/elsewhere"), "redirects (307)"),
}


@pytest.mark.parametrize("case", FINAL)
def test_what_the_server_does_not_want_is_not_sent_again(tmp_path: Path, case: str) -> None:
    answer, said = FINAL[case]
    with receiver(answer) as (url, got), running(tmp_path / "s", PUSHED, hook(url)) as pipeline:
        push(pipeline)
        eventually(lambda: pipeline.deliveries[0].dropped == 1)
        assert 1 == len(got)
        assert said in pipeline.deliveries[0].health.error


def silent(_: BaseHTTPRequestHandler, __: int) -> None:
    time.sleep(2.0)


def trickling(handler: BaseHTTPRequestHandler, _: int) -> None:
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(30):
            handler.wfile.write(b"X: y\r\n")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        return


@pytest.mark.parametrize("answer", [silent, trickling])
def test_a_slow_server_costs_an_attempt_its_time_and_no_more(tmp_path: Path, answer: Callable) -> None:
    with receiver(answer) as (url, _), running(tmp_path / "s", PUSHED, hook(url, queue=1)) as pipeline:
        started = time.monotonic()
        push(pipeline, 4)
        eventually(lambda: pipeline.answered == 4)
        assert time.monotonic() - started < 1.5
        eventually(lambda: pipeline.deliveries[0].failures >= 1)
        assert "no answer within 0.5 s" in pipeline.deliveries[0].health.error
        assert pipeline.deliveries[0].dropped >= 2


def test_a_secret_that_cannot_be_read_sends_nothing_unsigned(tmp_path: Path) -> None:
    with (
        receiver(status(200)) as (url, got),
        running(tmp_path / "s", PUSHED, hook(url, secret_file=str(tmp_path / "none"))) as pipeline,
    ):
        push(pipeline)
        eventually(lambda: pipeline.deliveries[0].dropped == 1)
        assert [] == got
