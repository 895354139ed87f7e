"""gRPC: each wrong request has its status and a sentence, and the server is none the worse for it."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc
from inference_parts import IMAGE, engine, servable
from protocol_world import World, world

from agent.channel import CANDIDATE
from agent.inference.grpc_server import descriptor
from agent.inference.grpc_server.messages import message
from agent.inference.grpc_server.server import MAX_STREAMS, GrpcServer
from agent.inference.repository import FLEET_DECIDES, Repository
from agent.inference.service import Service
from agent.listening import CannotListen

INFER = "/inference.GRPCInferenceService/ModelInfer"
REQUEST = message("ModelInferRequest")
Change = Callable[[object], object]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as one:
        yield one


@pytest.fixture(scope="module")
def channel(plane: World) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(plane.grpc) as one:
        yield one


def good() -> object:
    request = REQUEST(model_name="digits", id="r", raw_input_contents=[IMAGE])
    request.inputs.add(name="image", datatype="INT8", shape=[1, 8, 8, 1])
    return request


def ask(channel: grpc.Channel, data: bytes, method: str = INFER) -> tuple[str, str | bytes]:
    """Return the status' name, and the details or the answer."""
    try:
        return "OK", channel.unary_unary(method)(data, timeout=10)
    except grpc.RpcError as error:
        return error.code().name, error.details()


def changed(change: Change) -> bytes:
    request = good()
    change(request)
    return request.SerializeToString()


def typed(**contents: list[object]) -> Change:
    def change(request: object) -> None:
        del request.raw_input_contents[:]
        for name, values in contents.items():
            getattr(request.inputs[0].contents, name).extend(values)

    return change


def twice(request: object) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(IMAGE)


def classify(value: object, field: str = "int64_param") -> Change:
    return lambda request: setattr(request.outputs.add(name="scores").parameters["classification"], field, value)


WRONG = "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("data", "status", "said"),
    [
        pytest.param(b"\xff\xff\xff", WRONG, "this is no ModelInferRequest", id="no-message"),
        pytest.param(b"", "NOT_FOUND", "model '' is not served", id="empty"),
        pytest.param(
            changed(lambda r: setattr(r, "model_name", "x")), "NOT_FOUND", "models that are: digits", id="model"
        ),
        pytest.param(changed(lambda r: setattr(r, "model_version", "9")), "NOT_FOUND", "version 1 is", id="version"),
        pytest.param(changed(lambda r: setattr(r, "id", "i" * 129)), WRONG, "id has 129", id="id"),
        pytest.param(changed(lambda r: setattr(r.inputs[0], "name", "x")), WRONG, "unknown input", id="input"),
        pytest.param(
            changed(lambda r: setattr(r.inputs[0], "datatype", "FP32")), WRONG, "INT8 is expected", id="type"
        ),
        pytest.param(
            changed(lambda r: r.inputs[0].shape.append(1)), WRONG, "is expected, got [1, 8, 8, 1, 1]", id="shape"
        ),
        pytest.param(changed(lambda r: r.inputs[0].shape.insert(0, -1)), WRONG, "is expected, got [-1", id="minus"),
        pytest.param(changed(twice), WRONG, "stands twice", id="twice"),
        pytest.param(changed(lambda r: r.inputs.pop()), WRONG, "1 entries for 0 inputs", id="raw-without-input"),
        pytest.param(
            changed(lambda r: r.raw_input_contents.append(b"")), WRONG, "2 entries for 1", id="raw-too-many"
        ),
        pytest.param(changed(lambda r: r.raw_input_contents.pop()), WRONG, "neither data nor", id="no-data"),
        pytest.param(
            changed(lambda r: r.inputs[0].contents.int_contents.append(1)), WRONG, "must not stand beside", id="both"
        ),
        pytest.param(changed(typed(int_contents=[1] * 63)), WRONG, "64 elements are expected", id="typed-few"),
        pytest.param(changed(typed(int_contents=[999] * 64)), WRONG, "outside of INT8", id="typed-range"),
        pytest.param(changed(typed(fp32_contents=[1.0] * 64)), WRONG, "64 elements are expected", id="typed-field"),
        pytest.param(changed(lambda r: r.outputs.add(name="x")), WRONG, "unknown output", id="output"),
        pytest.param(
            changed(lambda r: (r.outputs.add(name="scores"), r.outputs.add(name="scores"))),
            WRONG,
            "twice",
            id="outputs",
        ),
        pytest.param(changed(classify(0)), WRONG, "above 0", id="classes-0"),
        pytest.param(changed(classify(-1)), WRONG, "above 0", id="classes-negative"),
        pytest.param(changed(classify(True, "bool_param")), WRONG, "above 0", id="classes-bool"),
        pytest.param(changed(classify("3", "string_param")), WRONG, "above 0", id="classes-text"),
        pytest.param(
            changed(lambda r: setattr(r.parameters["timeout"], "string_param", "x")),
            WRONG,
            "timeout is",
            id="timeout",
        ),
        pytest.param(changed(lambda r: r.raw_input_contents.__setitem__(0, b"")), WRONG, "got 0", id="raw-empty"),
    ],
)
def test_each_wrong_request_has_its_status_and_says_why(
    channel: grpc.Channel, data: bytes, status: str, said: str
) -> None:
    code, answer = ask(channel, data)
    assert (status, True) == (code, said in str(answer)), answer
    assert "OK" == ask(channel, good().SerializeToString())[0]


def test_a_message_over_the_cap_is_refused(channel: grpc.Channel) -> None:
    big = changed(lambda request: request.raw_input_contents.__setitem__(0, bytes(9 * 2**20)))
    assert "RESOURCE_EXHAUSTED" == ask(channel, big)[0]


def test_calls_that_are_not_offered_are_unimplemented(plane: World) -> None:
    with tritonclient.grpc.InferenceServerClient(plane.grpc) as client:
        for call in (
            client.get_system_shared_memory_status,
            client.get_cuda_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(tritonclient.grpc.InferenceServerException, match="UNIMPLEMENTED"):
                call()


def test_streams_are_bounded_and_leave_room_for_calls(channel: grpc.Channel) -> None:
    open_streams, held = [], []
    method = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    for _ in range(MAX_STREAMS):
        requests, release = _held(good().SerializeToString())
        open_streams.append(method(requests, timeout=10))
        held.append(release)
        next(open_streams[-1])
    with pytest.raises(grpc.RpcError) as refused:
        next(method(iter([good().SerializeToString()]), timeout=10))
    assert "RESOURCE_EXHAUSTED" == refused.value.code().name
    assert "OK" == ask(channel, good().SerializeToString())[0]
    for release in held:
        release()
    for stream in open_streams:
        assert [] == list(stream)


def _held(data: bytes) -> tuple[Iterator[bytes], Callable[[], None]]:
    import threading

    done = threading.Event()

    def requests() -> Iterator[bytes]:
        yield data
        done.wait(10)

    return requests(), done.set


def test_under_a_fleet_loading_is_refused_with_the_reason(plane: World) -> None:
    service = Service(plane.engine, Repository(plane.engine, forbidden=FLEET_DECIDES))
    server = GrpcServer(service, "127.0.0.1", 0, max_body=2**20, shared=False)
    server.start()
    try:
        with (
            tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://")) as client,
            pytest.raises(tritonclient.grpc.InferenceServerException, match=r"FAILED_PRECONDITION.*by the fleet"),
        ):
            client.unload_model("digits")
    finally:
        server.begin_stop()
        server.finish()


def test_metadata_lists_every_version_that_serves_and_only_the_one_that_is_asked_for(tmp_path: Path) -> None:
    serving = engine()
    serving.serve(servable(tmp_path, "v1", 1))
    serving.serve(servable(tmp_path, "v2", 2), CANDIDATE)
    server = GrpcServer(Service(serving, Repository(serving)), "127.0.0.1", 0, max_body=2**20, shared=False)
    server.start()
    with tritonclient.grpc.InferenceServerClient(server.address.removeprefix("grpc://")) as client:
        asked = {version: list(client.get_model_metadata("digits", version).versions) for version in ("", "1", "2")}
    server.begin_stop()
    server.finish()
    serving.close()
    assert asked == {"": ["1", "2"], "1": ["1"], "2": ["2"]}


def test_an_address_that_is_taken_says_so(plane: World) -> None:
    host, port = plane.grpc.split(":")
    with pytest.raises(CannotListen, match="choose another port"):
        GrpcServer(Service(plane.engine, plane.repository), host, int(port), max_body=1, shared=False)


def test_old_and_new_may_share_an_address_during_a_hand_over() -> None:
    serving = engine()
    service = Service(serving, Repository(serving))
    first = GrpcServer(service, "127.0.0.1", 0, max_body=1, shared=True)
    first.start()
    host, port = first.address.removeprefix("grpc://").split(":")
    second = GrpcServer(service, host, int(port), max_body=1, shared=True)
    second.start()
    first.begin_stop()
    first.finish()
    with tritonclient.grpc.InferenceServerClient(f"{host}:{port}") as client:
        assert client.is_server_live()
    second.finish()
    serving.close()


def test_without_the_extra_serving_says_what_to_install() -> None:
    """A None in sys.modules is how Python says that a module cannot be imported."""
    source = (
        "import sys; sys.modules['grpc'] = None\n"
        "from agent.inference.__main__ import main\n"
        "sys.exit(main(['serve', 'examples/digits/v1', '--http', '127.0.0.1:0', '--grpc', '127.0.0.1:0']))"
    )
    root = Path(descriptor.__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=False)
    assert (2, True) == (ended.returncode, "pip install 'edgewarden[grpc]'" in ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_compiled_messages_are_those_of_the_proto_file() -> None:
    """A tool of another version may compile differently, so the meaning is compared, not the bytes."""
    import base64

    from google.protobuf import descriptor_pb2

    script = Path(descriptor.__file__).parents[3] / "scripts" / "make_grpc_messages.py"
    spec = importlib.util.spec_from_file_location("make_grpc_messages", script)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    fresh = descriptor_pb2.FileDescriptorSet.FromString(made.compiled())
    assert fresh == descriptor_pb2.FileDescriptorSet.FromString(base64.b64decode(descriptor.DESCRIPTOR_SET))


def test_every_field_has_the_number_that_stock_clients_use() -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    theirs = {
        name: kind
        for module in (service_pb2, model_config_pb2)
        for name, kind in module.DESCRIPTOR.message_types_by_name.items()
    }
    file = message("ModelInferRequest").DESCRIPTOR.file
    for name, kind in file.message_types_by_name.items():
        _same_numbers(kind, theirs[name])
    enum = {one.name: one.number for one in model_config_pb2.DataType.DESCRIPTOR.values}
    assert enum == {one.name: one.number for one in file.enum_types_by_name["DataType"].values}


def _same_numbers(ours: object, theirs: object) -> None:
    for field in ours.fields:
        match = theirs.fields_by_name[field.name]
        assert (match.number, match.type, match.is_repeated) == (field.number, field.type, field.is_repeated), (
            field.full_name
        )
    for name, nested in ours.nested_types_by_name.items():
        _same_numbers(nested, theirs.nested_types_by_name[name])
