"""gRPC as people and the agent start it: every call of stock `tritonclient.grpc`, hand-over, the fleet's word."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from dataplane_parts import PATIENCE, control_side, heldout, store
from tritonclient.utils import InferenceServerException


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    model, port = store(folder, "v2", 2), free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "agent.inference", "serve", model.folder),
            *("--unix", str(folder / "i.sock"), "--grpc", f"127.0.0.1:{port}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    lines = [process.stdout.readline()]
    while "try:" not in lines[-1]:
        assert process.poll() is None, process.communicate()
        lines.append(process.stdout.readline())
    assert f"  listens on grpc://127.0.0.1:{port}\n" in lines
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (0, False) == (process.returncode, "fault of this server" in errors), errors


def image_input(number: int = 0) -> triton.InferInput:
    tensor = triton.InferInput("image", [1, 8, 8, 1], "INT8")
    tensor.set_data_from_numpy(heldout()[0][number : number + 1])
    return tensor


def test_every_call_of_the_blocking_client(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        assert (True, True, True, False) == (
            client.is_server_live(),
            client.is_server_ready(),
            client.is_model_ready("digits", "2"),
            client.is_model_ready("faces"),
        )
        assert "edgewarden" == client.get_server_metadata().name
        assert [1, 8, 8, 1] == list(client.get_model_metadata("digits").inputs[0].shape)
        assert "INT8" == client.get_model_metadata("digits", as_json=True)["inputs"][0]["datatype"]
        config = client.get_model_config("digits").config
        assert (0, "tflite", [1, 8, 8, 1]) == (config.max_batch_size, config.backend, list(config.input[0].dims))
        assert "-128" == config.parameters["quantization.input.image.zero_point"].string_value
        assert ["READY"] == [one.state for one in client.get_model_repository_index().models]
        before = client.get_inference_statistics("digits").model_stats[0].inference_count
        answer = client.infer("digits", [image_input()], request_id="r", sequence_id=5, parameters={"mine": True})
        assert ("r", "2") == (answer.get_response().id, answer.get_response().model_version)
        assert heldout()[1][0] == answer.as_numpy("scores")[0].argmax()
        for coding in ("gzip", "deflate"):
            answer = client.infer("digits", [image_input()], compression_algorithm=coding)
            assert heldout()[1][0] == answer.as_numpy("scores")[0].argmax()
        best = client.infer("digits", [image_input()], outputs=[triton.InferRequestedOutput("scores", class_count=1)])
        assert [str(heldout()[1][0])] == [text.decode().split(":")[1] for text in best.as_numpy("scores")]
        after = client.get_inference_statistics().model_stats[0]
        assert (4, 4) == (after.inference_count - before, after.inference_stats.queue.count - before)
        client.unload_model("digits")
        assert not client.is_model_ready("digits")
        client.load_model("digits")
        assert client.is_model_ready("digits")


def test_async_calls_and_streams(address: str) -> None:
    done, got = threading.Semaphore(0), []

    def take(result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        got.append(error or result.as_numpy("scores").shape)
        done.release()

    with triton.InferenceServerClient(address) as client:
        for _ in range(4):
            client.async_infer("digits", [image_input()], take)
        client.start_stream(take)
        for _ in range(4):
            client.async_stream_infer("digits", [image_input()])
        for _ in range(8):
            assert done.acquire(timeout=PATIENCE)
        client.stop_stream()
    assert [(1, 10)] * 8 == got


def test_every_call_of_the_asyncio_client(address: str) -> None:
    asyncio.run(_every_call(address))


async def _every_call(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("digits")
        assert "edgewarden" == (await client.get_server_metadata()).name
        assert "digits" == (await client.get_model_metadata("digits")).name
        assert "digits" == (await client.get_model_config("digits")).config.name
        assert 1 == len((await client.get_model_repository_index()).models)
        await client.unload_model("digits")
        await client.load_model("digits")
        many = await asyncio.gather(*(client.infer("digits", [image_input()]) for _ in range(8)))
        assert [(1, 10)] * 8 == [one.as_numpy("scores").shape for one in many]
        assert (await client.get_inference_statistics("digits")).model_stats[0].inference_count >= 8

        async def requests() -> object:
            for number in range(3):
                yield {"model_name": "digits", "inputs": [image_input()], "request_id": str(number)}

        streamed = [result.get_response().id async for result, error in client.stream_infer(requests()) if not error]
        assert ["0", "1", "2"] == streamed


# ---------------------------------------------------------------- under a fleet
def wait_until_live(client: triton.InferenceServerClient) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client.is_server_live()
            return
        except InferenceServerException:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def infer_with_retry(client: triton.InferenceServerClient) -> triton.InferResult:
    """Ask once more when the server went away with the call on the wire: gRPC has no way to say "too late" sooner."""
    try:
        return client.infer("digits", [image_input()])
    except InferenceServerException as error:
        if error.status() not in ("StatusCode.CANCELLED", "StatusCode.UNAVAILABLE"):
            raise
        return client.infer("digits", [image_input()])


def test_a_planned_restart_hands_the_address_over(tmp_path: Path) -> None:
    port = free_port()
    with control_side(tmp_path, ("--grpc", f"127.0.0.1:{port}")) as control:
        control.serve(store(tmp_path, "v2", 2))
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            wait_until_live(client)
            old = control.supervisor.pid
            control.supervisor.restart_planned()
            answered = 0
            while control.supervisor.pid == old or answered < 50:
                assert (1, 10) == infer_with_retry(client).as_numpy("scores").shape
                answered += 1
            assert control.wait_for_end(old).planned
            assert (1, 10) == client.infer("digits", [image_input()]).as_numpy("scores").shape


def test_local_clients_may_load_and_unload_only_where_the_setting_says_so(tmp_path: Path) -> None:
    for name, options in (("closed", ()), ("open", ("--allow-repository-control",))):
        port, folder = free_port(), tmp_path / name
        folder.mkdir()
        with (
            control_side(folder, ("--grpc", f"127.0.0.1:{port}", *options)) as control,
            triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
        ):
            model = store(folder, "v2", 2)
            control.serve(model)
            wait_until_live(client)
            if not options:
                with pytest.raises(InferenceServerException, match=r"inference\.allow_repository_control"):
                    client.unload_model("digits")
                continue
            client.unload_model("digits")
            assert not client.is_model_ready("digits")
            client.load_model("digits")
            assert client.is_model_ready("digits", "2")
            client.unload_model("digits")
            control.withdraw("digits")
            with pytest.raises(InferenceServerException, match="not known here"):
                client.load_model("digits")


def test_an_address_that_is_taken_leaves_http_serving(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with control_side(tmp_path, ("--grpc", f"127.0.0.1:{taken.getsockname()[1]}")) as control:
            control.serve(store(tmp_path, "v2", 2))
            from dataplane_parts import UnixClient

            client = UnixClient(control.unix)
            status, body = client.infer(heldout()[0][0])
            client.close()
    assert (200, heldout()[1][0]) == (status, np.frombuffer(body[-10:], np.int8).argmax())
