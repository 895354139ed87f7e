"""Stock clients on both transports get back what the model gives, in every datatype and encoding."""

from collections.abc import Iterator
from queue import SimpleQueue
from types import ModuleType

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from protocol_world import EVERY_TYPE, TYPED, World, world
from tritonclient.grpc import service_pb2

from protocol.manifest import TensorSpec
from runtime.interpreter import DTYPES


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as one:
        yield one


def values() -> dict[str, np.ndarray]:
    """Return two rows of telling values for every input."""
    rows = {}
    for spec in EVERY_TYPE:
        dtype = DTYPES[spec.dtype]
        if dtype.kind == "b":
            row = [True, False, False, True, True, False]
        elif dtype.kind == "f":
            row = [0.5, -1.25, 3.0, 0.0, float(np.finfo(dtype).max), float(np.finfo(dtype).tiny)]
        else:
            row = [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max), 0, 1, 2, 3]
        rows[spec.name] = np.array(row, dtype).reshape(spec.shape)
    return rows


def inputs(client: ModuleType, **options: bool) -> list[object]:
    made = []
    for spec in EVERY_TYPE:
        tensor = client.InferInput(spec.name, list(spec.shape), spec.dtype)
        binary = (
            options if spec.dtype != "FP16" or client is tritonclient.grpc else {}
        )  # the client refuses it in JSON
        tensor.set_data_from_numpy(values()[spec.name], **binary)
        made.append(tensor)
    return made


def check(answer: object) -> None:
    for name, row in values().items():
        got = answer.as_numpy(f"{name}_out")
        assert (row.dtype, row.reshape(1, 6).tolist()) == (got.dtype, got.tolist()), name


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_http_carries_every_datatype_in_every_encoding(plane: World, coding: str | None, binary_in: bool) -> None:
    with tritonclient.http.InferenceServerClient(plane.http) as client:
        for outputs in (None, [requested(f"{spec.name}_out") for spec in EVERY_TYPE]):
            check(
                client.infer(
                    "every-type",
                    inputs(tritonclient.http, binary_data=binary_in),
                    outputs=outputs,
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                    parameters={"mine": 3, "other": "x"},
                    sequence_id=7,
                    sequence_start=True,
                )
            )


def requested(name: str) -> tritonclient.http.InferRequestedOutput:
    return tritonclient.http.InferRequestedOutput(name, binary_data=False)


def test_grpc_carries_every_datatype_raw(plane: World) -> None:
    with tritonclient.grpc.InferenceServerClient(plane.grpc) as client:
        check(client.infer("every-type", inputs(tritonclient.grpc), parameters={"mine": 3.5}))


def typed(model: str, specs: tuple[TensorSpec, ...]) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model)
    for spec in specs:
        tensor = request.inputs.add(name=spec.name, datatype=spec.dtype, shape=spec.shape)
        field = TYPED_FIELDS.get(spec.dtype, "uint_contents" if spec.dtype.startswith("U") else "int_contents")
        getattr(tensor.contents, field).extend(values()[spec.name].ravel().tolist())
    return request


TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def test_grpc_takes_typed_contents(plane: World) -> None:
    with tritonclient.grpc.InferenceServerClient(plane.grpc) as client:
        answer = client._client_stub.ModelInfer(typed("typed", TYPED))
    for spec, blob in zip(TYPED, answer.raw_output_contents, strict=True):
        assert values()[spec.name].tobytes() == blob, spec.name


def test_only_the_wanted_outputs_come_each_in_its_form(plane: World) -> None:
    with tritonclient.http.InferenceServerClient(plane.http) as client:
        outputs = [
            tritonclient.http.InferRequestedOutput("int16_out", binary_data=True),
            tritonclient.http.InferRequestedOutput("bool_out", binary_data=False),
        ]
        answer = client.infer("every-type", inputs(tritonclient.http), outputs=outputs)
    listed = answer.get_response()["outputs"]
    assert [("int16_out", {"binary_data_size": 12}), ("bool_out", None)] == [
        (one["name"], one.get("parameters")) for one in listed
    ]
    assert answer.as_numpy("int16_out").tolist() == values()["int16"].reshape(1, 6).tolist()
    assert answer.as_numpy("bool_out").tolist() == values()["bool"].reshape(1, 6).tolist()


def test_both_transports_classify_alike(plane: World) -> None:
    found = []
    for client_module, address, options in (
        (tritonclient.http, plane.http, {"binary_data": True}),
        (tritonclient.http, plane.http, {"binary_data": False}),
        (tritonclient.grpc, plane.grpc, {}),
    ):
        with client_module.InferenceServerClient(address) as client:
            image = client_module.InferInput("image", [1, 8, 8, 1], "INT8")
            image.set_data_from_numpy(np.full((1, 8, 8, 1), -128, np.int8))
            outputs = [client_module.InferRequestedOutput("scores", class_count=3, **options)]
            plain = client.infer("digits", [image]).as_numpy("scores")[0]
            texts = client.infer("digits", [image], outputs=outputs).as_numpy("scores")
            found.append([text.decode() if isinstance(text, bytes) else text for text in texts])
            order = np.argsort(-plain.astype(int), kind="stable")[:3]
            assert [f"{plain[k]}:{k}:{k}" for k in order] == found[-1]
    assert found == [found[0]] * 3


def test_classes_of_a_model_without_names_are_numbers(plane: World) -> None:
    with tritonclient.http.InferenceServerClient(plane.http) as client:
        outputs = [tritonclient.http.InferRequestedOutput("fp64_out", class_count=99)]
        texts = client.infer("every-type", inputs(tritonclient.http), outputs=outputs).as_numpy("fp64_out")
    assert texts.shape == (6,)
    assert [text.decode() for text in texts][1:3] == ["3.000000:2", "0.500000:0"]


def test_a_stream_answers_each_request_and_outlives_a_wrong_one(plane: World) -> None:
    answers: SimpleQueue[tuple[object, object]] = SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(plane.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        image = tritonclient.grpc.InferInput("image", [1, 8, 8, 1], "INT8")
        image.set_data_from_numpy(np.zeros((1, 8, 8, 1), np.int8))
        for model, request_id in (("digits", "a"), ("faces", "b"), ("digits", "c")):
            client.async_stream_infer(model, [image], request_id=request_id)
        got = [answers.get(timeout=10) for _ in range(3)]
        client.stop_stream()
    assert [result.get_response().id for result, error in got if error is None] == ["a", "c"]
    assert "model 'faces' is not served here" in str(got[1][1])
    assert got[0][0].get_response().parameters["triton_final_response"].bool_param
