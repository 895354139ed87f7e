"""Every call of stock `tritonclient.http`, blocking and asyncio, against a server as people start it."""

import asyncio
import hashlib
import io
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from dataplane_parts import PATIENCE, heldout, manifest_of, members
from PIL import Image
from tritonclient.utils import InferenceServerException

from protocol.manifest import MANIFEST_NAME, Preprocess, encode_manifest

NOT_OFFERED = (
    "get_system_shared_memory_status",
    "get_cuda_shared_memory_status",
    "get_trace_settings",
    "get_log_settings",
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def picture_bundle(root: Path) -> Path:
    """Lay out the digits as a model that takes pictures too: a white pixel is 1.0, as in training."""
    folder = root / "digits"
    folder.mkdir()
    manifest = msgspec.structs.replace(
        manifest_of("v2", 2), preprocess=Preprocess(mean=(0.0,), scale=(1 / 255,), resize="stretch")
    )
    content = members("v2")
    assert {name: hashlib.sha256(data).hexdigest() for name, data in content.items()} == dict(manifest.members)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return folder


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    folder = picture_bundle(tmp_path_factory.mktemp("serve"))
    process = subprocess.Popen(
        [sys.executable, "-m", "agent.inference", "serve", str(folder), "--http", f"127.0.0.1:{port}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    while "try:" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    yield f"127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (0, False) == (process.returncode, "fault of this server" in errors), errors


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as one:
        yield one


def image_input(*, binary: bool = True, number: int = 0) -> triton.InferInput:
    tensor = triton.InferInput("image", [1, 8, 8, 1], "INT8")
    tensor.set_data_from_numpy(heldout()[0][number : number + 1], binary_data=binary)
    return tensor


def picture_input() -> triton.InferInput:
    """Return held-out image 0 as a PNG of its pixels, four times as large."""
    pixels = (heldout()[0][0].astype(int) + 128).astype(np.uint8).reshape(8, 8)
    target = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(target, "PNG")
    tensor = triton.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([target.getvalue()], object))
    return tensor


def test_health_metadata_config_index_and_statistics(client: triton.InferenceServerClient) -> None:
    assert (True, True, True) == (client.is_server_live(), client.is_server_ready(), client.is_model_ready("digits"))
    assert (True, False) == (client.is_model_ready("digits", "2"), client.is_model_ready("digits", "1"))
    extensions = client.get_server_metadata()["extensions"]
    assert {"binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"} <= set(
        extensions
    )
    assert "INT8" == client.get_model_metadata("digits", "2")["inputs"][0]["datatype"]
    config = client.get_model_config("digits", "2")
    assert (0, "tflite", [1, 8, 8, 1], "TYPE_INT8") == (
        config["max_batch_size"],
        config["backend"],
        config["input"][0]["dims"],
        config["input"][0]["data_type"],
    )
    told = {name: one["string_value"] for name, one in config["parameters"].items()}
    scale, zero = (told[f"quantization.input.image.{name}"] for name in ("scale", "zero_point"))
    assert np.array_equal(np.rint(np.array([0, 1]) / float(scale)) + int(zero), [-128, 127])
    assert {"quantization.output.scores.scale", "quantization.output.scores.zero_point"} <= set(told)
    assert [{"name": "digits", "version": "2", "state": "READY", "reason": ""}] == client.get_model_repository_index()


def test_statistics_have_every_field_and_count_exactly(client: triton.InferenceServerClient) -> None:
    before = client.get_inference_statistics("digits", "2")["model_stats"][0]
    for number in range(5):
        client.infer("digits", [image_input(number=number)])
    with pytest.raises(InferenceServerException):
        client.infer("digits", [triton.InferInput("image", [1], "INT8")])
    after = client.get_inference_statistics()["model_stats"][0]
    assert 5 == after["inference_count"] - before["inference_count"]
    assert 5 == after["execution_count"] - before["execution_count"]
    assert before["last_inference"] <= after["last_inference"]
    parts = after["inference_stats"]
    assert {
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_hit",
        "cache_miss",
    } == set(parts)
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert 5 == parts[name]["count"] - before["inference_stats"][name]["count"], name
        assert parts[name]["ns"] > before["inference_stats"][name]["ns"], name
    steps = ("queue", "compute_input", "compute_infer", "compute_output")
    assert parts["success"]["ns"] == sum(parts[name]["ns"] for name in steps)
    assert 1 == parts["fail"]["count"] - before["inference_stats"]["fail"]["count"]


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_infer_in_every_encoding(client: triton.InferenceServerClient, coding: str | None, binary: bool) -> None:
    options = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    outputs = [triton.InferRequestedOutput("scores", binary_data=binary)]
    answer = client.infer("digits", [image_input(binary=binary)], outputs=outputs, request_id="r", **options)
    assert heldout()[1][0] == answer.as_numpy("scores")[0].argmax()
    assert "r" == answer.get_response()["id"]


def test_reserved_and_own_parameters_are_taken(client: triton.InferenceServerClient) -> None:
    answer = client.infer(
        "digits",
        [image_input()],
        sequence_id=3,
        sequence_start=True,
        sequence_end=True,
        parameters={"camera": "north", "gain": 1.5, "night": False, "try": 2},
        query_params={"a": "b"},
        headers={"X-Mine": "yes"},
    )
    assert (1, 10) == answer.as_numpy("scores").shape


@pytest.mark.parametrize("binary", [True, False])
def test_classification_names_the_classes(client: triton.InferenceServerClient, binary: bool) -> None:
    plain = client.infer("digits", [image_input()]).as_numpy("scores")[0]
    outputs = [triton.InferRequestedOutput("scores", binary_data=binary, class_count=3)]
    texts = client.infer("digits", [image_input()], outputs=outputs).as_numpy("scores")
    best = np.argsort(-plain.astype(int), kind="stable")[:3]
    found = [text.decode() if isinstance(text, bytes) else text for text in texts]
    assert [f"{plain[k]}:{k}:{manifest_of('v2', 2).classes[k]}" for k in best] == found


def test_a_picture_gets_the_answer_that_its_pixels_get(client: triton.InferenceServerClient) -> None:
    picture = client.infer("digits", [picture_input()]).as_numpy("scores")[0]
    assert heldout()[1][0] == picture.argmax()


def test_async_requests_and_bodies_made_by_hand(client: triton.InferenceServerClient, address: str) -> None:
    pending = [client.async_infer("digits", [image_input()]) for _ in range(8)]
    assert [(1, 10)] * 8 == [one.get_result().as_numpy("scores").shape for one in pending]
    body, length = client.generate_request_body([image_input()])
    import urllib3

    answer = urllib3.request(
        "POST",
        f"http://{address}/v2/models/digits/infer",
        body=body,
        headers={"Inference-Header-Content-Length": str(length)},
    )
    parsed = client.parse_response_body(
        answer.data, header_length=int(answer.headers["Inference-Header-Content-Length"])
    )
    assert (1, 10) == parsed.as_numpy("scores").shape


def test_unload_and_load(client: triton.InferenceServerClient) -> None:
    client.unload_model("digits", unload_dependents=True)
    assert not client.is_model_ready("digits")
    assert "UNAVAILABLE" == client.get_model_repository_index()[0]["state"]
    with pytest.raises(InferenceServerException, match=r"\[404\]"):
        client.infer("digits", [image_input()])
    client.load_model("digits")
    assert heldout()[1][0] == client.infer("digits", [image_input()]).as_numpy("scores")[0].argmax()
    with pytest.raises(InferenceServerException, match=r"\[400\].*'config' is not offered"):
        client.load_model("digits", config="{}")
    with pytest.raises(InferenceServerException, match=r"\[404\].*not known here"):
        client.load_model("faces")


@pytest.mark.parametrize("call", NOT_OFFERED)
def test_what_is_not_advertised_is_refused_in_words(client: triton.InferenceServerClient, call: str) -> None:
    with pytest.raises(InferenceServerException, match="not offered"):
        getattr(client, call)()


def test_every_call_works_with_asyncio_too(address: str) -> None:
    asyncio.run(_every_call(address))


async def _every_call(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("digits")
        assert not await client.is_model_ready("digits", "7")
        assert "edgewarden" == (await client.get_server_metadata())["name"]
        assert "digits" == (await client.get_model_metadata("digits"))["name"]
        assert "digits" == (await client.get_model_config("digits"))["name"]
        assert ["digits"] == [one["name"] for one in await client.get_model_repository_index()]
        await client.unload_model("digits")
        assert not await client.is_model_ready("digits")
        await client.load_model("digits")
        for coding in (None, "gzip", "deflate"):
            answer = await client.infer(
                "digits",
                [image_input(binary=coding is not None)],
                request_compression_algorithm=coding,
                response_compression_algorithm=coding,
            )
            assert heldout()[1][0] == answer.as_numpy("scores")[0].argmax()
        many = await asyncio.gather(*(client.infer("digits", [image_input()]) for _ in range(8)))
        assert [(1, 10)] * 8 == [one.as_numpy("scores").shape for one in many]
        statistics = await client.get_inference_statistics("digits")
        assert statistics["model_stats"][0]["inference_count"] >= 11
        with pytest.raises(InferenceServerException, match="faces"):
            await client.infer("faces", [image_input()])
