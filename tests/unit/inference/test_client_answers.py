"""The Python client against a real server, and against peers that break off, stall or talk nonsense."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from inference_parts import EXAMPLES, engine, servable

from agent.client import Client, InferenceRefused, NotAnAnswer, Unreachable
from agent.inference.engine import Engine
from agent.inference.http import Limits
from agent.inference.routes import Routes
from agent.inference.server import Server
from agent.listening import ListeningSockets

NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    one = engine()
    one.serve(servable(tmp_path_factory.mktemp("model"), "v1", 7))
    yield one
    one.close()


@contextlib.contextmanager
def running(sockets: ListeningSockets, serving: Engine) -> Iterator[tuple[str, ...]]:
    """Serve on these sockets; yield their addresses as the client takes them."""
    server = Server(sockets, Routes(serving, managed=True, body_cap=2**20), Limits())
    thread = threading.Thread(target=server.run)
    thread.start()
    server.open()
    try:
        yield tuple(address.removeprefix("http://").removeprefix("unix:") for address in sockets.addresses())
    finally:
        server.drain()
        thread.join()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory, serving: Engine) -> Iterator[tuple[str, ...]]:
    unix = tmp_path_factory.mktemp("socket") / "i.sock"
    sockets = ListeningSockets.open(unix=unix, tcp=("127.0.0.1", 0))
    with running(sockets, serving) as found:
        yield found
    sockets.close()


@pytest.fixture(params=["tcp", "unix"])
def client(request: pytest.FixtureRequest, addresses: tuple[str, ...]) -> Iterator[Client]:
    with Client(addresses[request.param == "unix"]) as one:
        yield one


@pytest.fixture
def on_unix(addresses: tuple[str, ...]) -> Iterator[Client]:
    with Client(addresses[1]) as one:
        yield one


def five() -> np.ndarray:
    """Return the first held-out image that shows a five."""
    with np.load(EXAMPLES / "heldout.npz") as arrays:
        image = arrays["images"][list(arrays["truth"]).index(5)]
    return np.clip(np.rint(image / 16.0 * 255) - 128, -128, 127).astype(np.int8).reshape(1, 8, 8, 1)


# ---------------------------------------------------------------- a real server
def test_an_answer_has_outputs_version_and_the_id_that_was_given(client: Client) -> None:
    result = client.infer("digits", five(), request_id="five-1")
    assert ("digits", "7", "five-1") == (result.model, result.model_version, result.id)
    assert ["scores"] == list(result.outputs)
    assert (1, 10) == result.outputs["scores"].shape
    assert np.int8 == result.outputs["scores"].dtype


def test_classes_are_the_best_scores_best_first(client: Client) -> None:
    result = client.infer("digits", five())
    scores = result.outputs["scores"][0]
    assert ((5, int(scores[5])),) == result.classes()
    assert sorted(map(int, scores), reverse=True) == [score for _, score in result.classes(top=10)]


def test_without_an_id_the_server_makes_one_up_and_no_two_are_equal(client: Client) -> None:
    ids = {client.infer("digits", five()).id for _ in range(5)}
    assert len(ids) == 5
    assert "" not in ids


def test_an_id_may_hold_any_character(client: Client) -> None:
    assert 'a"\\\n é' == client.infer("digits", five(), request_id='a"\\\n é').id


def test_arrays_by_name_and_a_single_array_ask_the_same(client: Client) -> None:
    single, named = client.infer("digits", five()), client.infer("digits", {"image": five()})
    assert single.outputs["scores"].tolist() == named.outputs["scores"].tolist()


def test_an_array_that_is_not_contiguous_is_sent_in_the_order_it_has(client: Client) -> None:
    turned = np.asfortranarray(five())
    assert (
        client.infer("digits", turned).outputs["scores"].tolist()
        == client.infer("digits", five()).outputs["scores"].tolist()
    )


def test_the_arrays_of_an_answer_stay_what_they_were(client: Client) -> None:
    first = client.infer("digits", five()).outputs["scores"]
    kept = first.copy()
    client.infer("digits", np.zeros((1, 8, 8, 1), np.int8))
    assert kept.tolist() == first.tolist()


def test_a_request_that_cannot_be_in_time_is_refused_and_the_next_one_is_not(client: Client) -> None:
    with pytest.raises(InferenceRefused, match="deadline") as refused:
        client.infer("digits", five(), priority=1, timeout_us=1)
    assert (503, 1) == (refused.value.status, refused.value.retry_after)
    assert 5 == client.infer("digits", five(), priority=10, timeout_us=20_000_000).classes()[0][0]
    assert 5 == client.infer("digits", five()).classes()[0][0]


def test_metadata_says_what_the_model_takes_and_gives(client: Client) -> None:
    metadata = client.metadata("digits")
    assert ("7",) == metadata.versions
    assert [("image", "INT8", (1, 8, 8, 1))] == [(one.name, one.datatype, one.shape) for one in metadata.inputs]
    assert [("scores", "INT8", (1, 10))] == [(one.name, one.datatype, one.shape) for one in metadata.outputs]


def test_metadata_says_how_the_numbers_are_quantised(client: Client, serving: Engine) -> None:
    metadata, signature = client.metadata("digits"), serving.find("digits").signature
    for told, known in ((metadata.inputs, signature.inputs), (metadata.outputs, signature.outputs)):
        assert [(one.scale, one.zero_point) for one in told] == [(one.scale, one.zero_point) for one in known]
    assert metadata.inputs[0].scale == pytest.approx(1 / 255)
    assert metadata.inputs[0].zero_point == -128


@pytest.mark.parametrize(("model", "is_ready"), [("", True), ("digits", True), ("faces", False)])
def test_ready_asks_for_the_server_or_for_a_model(client: Client, model: str, is_ready: bool) -> None:
    assert is_ready == client.ready(model)


def test_truth_is_told_by_index_or_name_and_counts_once(on_unix: Client) -> None:
    on_unix.feedback("digits", on_unix.infer("digits", five()).id, 5)
    told = on_unix.infer("digits", five()).id
    on_unix.feedback("digits", told, "5")
    with pytest.raises(InferenceRefused, match="counts once") as refused:
        on_unix.feedback("digits", told, 5)
    assert 409 == refused.value.status


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        pytest.param(("faces", {"image": np.zeros(1, np.int8)}, None), 404, "models that are: digits", id="model"),
        pytest.param(("digits", np.zeros((1, 8, 8, 1), np.int8), 3), 404, "version 7 is served", id="version"),
        pytest.param(("digits", np.zeros((8, 8), np.int8), None), 400, "shape [1, 8, 8, 1] is expected", id="shape"),
        pytest.param(("digits", np.zeros((1, 8, 8, 1), np.uint8), None), 400, "INT8 is expected", id="type"),
        pytest.param(("digits", {"picture": np.zeros(1, np.int8)}, None), 400, "takes image", id="name"),
        pytest.param(("digits", {}, None), 400, "image is missing", id="none"),
    ],
)
def test_what_the_server_refuses_is_raised_with_its_words(
    client: Client, asked: tuple[str, object, int | None], status: int, said: str
) -> None:
    model, inputs, version = asked
    with pytest.raises(InferenceRefused) as refused:
        client.infer(model, inputs, version=version)
    assert status == refused.value.status
    assert said in refused.value.message
    assert client.ready(), "the connection goes on after a refusal"


def test_an_array_of_a_type_the_protocol_lacks_is_not_sent(client: Client) -> None:
    with pytest.raises(ValueError, match="type complex128 cannot be sent"):
        client.infer("digits", np.zeros((1, 8, 8, 1), complex))


def test_a_server_that_was_replaced_between_two_requests_is_asked_again(tmp_path: Path, serving: Engine) -> None:
    sockets = ListeningSockets.open(unix=tmp_path / "i.sock")
    with contextlib.closing(sockets), Client(str(tmp_path / "i.sock")) as client:
        for _ in range(2):
            again = ListeningSockets.inherited([sock.dup().detach() for sock in sockets])
            with running(again, serving):
                assert "digits" == client.infer("digits", five()).model


# ---------------------------------------------------------------- peers that misbehave
Script = Callable[[socket.socket], None]
ONE = {"x": np.zeros(4, np.int8)}


def answer(blob: bytes = b"\x01\xff", *, shape: str = "[2]", size: int = 2, fields: str = "") -> bytes:
    """Return a whole response with one INT8 output."""
    described = f'{{"name":"y","shape":{shape},"datatype":"INT8","parameters":{{"binary_data_size":{size}}}}}'
    body = f'{{"model_name":"m","model_version":"1","id":"a","outputs":[{described}]}}'.encode()
    head = f"HTTP/1.1 200 OK\r\n{fields}Content-Length: {len(body) + len(blob)}\r\n"
    return f"{head}Inference-Header-Content-Length: {len(body)}\r\n\r\n".encode() + body + blob


@contextlib.contextmanager
def peer(tmp_path: Path, *scripts: Script) -> Iterator[str]:
    """Accept a connection per script, one after the other; yield the address."""
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def play() -> None:
            for script in scripts:
                sock, _ = listener.accept()
                with sock:
                    script(sock)

        thread = threading.Thread(target=play)
        thread.start()
        yield str(path)
        thread.join()


def says(*answers: bytes) -> Script:
    """Read a request before each answer; then hang up."""

    def script(sock: socket.socket) -> None:
        for one in answers:
            sock.recv(65536)
            sock.sendall(one)

    return script


def says_slowly(data: bytes) -> Script:
    def script(sock: socket.socket) -> None:
        sock.recv(65536)
        for k in range(0, len(data), 7):
            sock.sendall(data[k : k + 7])
            time.sleep(0.0005)

    return script


def stalls(sock: socket.socket) -> None:
    """Take the request, and say nothing until the client gives up."""
    while sock.recv(65536):
        pass


def test_an_answer_in_pieces_is_put_together(tmp_path: Path) -> None:
    with peer(tmp_path, says_slowly(answer())) as address, Client(address) as client:
        assert [1, -1] == client.infer("m", ONE).outputs["y"].tolist()


def test_an_answer_larger_than_the_buffer_is_read_whole(tmp_path: Path) -> None:
    blob = bytes(range(256)) * 400
    large = answer(blob, shape=f"[{len(blob)}]", size=len(blob))
    with peer(tmp_path, says(large)) as address, Client(address) as client:
        assert blob == client.infer("m", ONE).outputs["y"].tobytes()


def test_a_connection_that_ended_between_two_requests_is_made_anew(tmp_path: Path) -> None:
    with peer(tmp_path, says(answer()), says(answer())) as address, Client(address) as client:
        assert ["a", "a"] == [client.infer("m", ONE).id for _ in range(2)]


def test_a_connection_that_is_announced_to_end_is_not_used_again(tmp_path: Path) -> None:
    last = answer(fields="Connection: close\r\n")
    with peer(tmp_path, says(last), says(last)) as address, Client(address) as client:
        assert ["a", "a"] == [client.infer("m", ONE).id for _ in range(2)]


def test_a_request_that_ends_two_connections_is_not_sent_a_third_time(tmp_path: Path) -> None:
    with peer(tmp_path, says(answer(), b""), says(b"")) as address, Client(address) as client:
        client.infer("m", ONE)
        with pytest.raises(Unreachable, match="ended before the answer"):
            client.infer("m", ONE)


def test_an_answer_that_breaks_off_is_not_asked_for_again(tmp_path: Path) -> None:
    with peer(tmp_path, says(answer(), answer()[:40])) as address, Client(address) as client:
        client.infer("m", ONE)
        with pytest.raises(Unreachable, match="ended before the answer"):
            client.infer("m", ONE)


def test_a_server_that_does_not_answer_in_time_is_unreachable_and_its_late_answer_lost(tmp_path: Path) -> None:
    with peer(tmp_path, stalls, says(answer())) as address, Client(address, timeout=0.05) as client:
        with pytest.raises(Unreachable, match=r"no answer within 0\.05 s"):
            client.infer("m", ONE)
        assert "a" == client.infer("m", ONE).id


@pytest.mark.parametrize("address", [NOBODY, "/nowhere/i.sock"])
def test_where_nobody_listens_is_unreachable_and_not_ready(address: str) -> None:
    with Client(address) as client:
        with pytest.raises(Unreachable, match=address):
            client.infer("m", ONE)
        assert not client.ready()


def test_a_refusal_says_when_to_come_again(tmp_path: Path) -> None:
    body = b'{"error":"m 1: 64 requests are waiting already"}'
    refusal = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with peer(tmp_path, says(refusal)) as address, Client(address) as client:
        with pytest.raises(InferenceRefused) as refused:
            client.infer("m", ONE)
        assert (503, 3) == (refused.value.status, refused.value.retry_after)
        assert "m 1: 64 requests are waiting already" == refused.value.message


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"220 mail.example ESMTP\r\n\r\n", id="another-protocol"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", id="no-length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n", id="length-over-the-cap"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000, id="head-over-the-cap"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", id="another-json"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", id="no-json"),
        pytest.param(answer(b"\x01"), id="blob-too-short"),
        pytest.param(answer(size=-1, shape="[-1]"), id="size-below-zero"),
        pytest.param(answer(shape="[3]"), id="shape-and-size-differ"),
        pytest.param(answer().replace(b"INT8", b"INT9"), id="unknown-type"),
        pytest.param(answer().replace(b"binary_data_size", b"binary_data_sise"), id="no-size"),
    ],
)
def test_what_cannot_be_read_is_not_an_answer(tmp_path: Path, said: bytes) -> None:
    with peer(tmp_path, says(said)) as address, Client(address) as client, pytest.raises(NotAnAnswer):
        client.infer("m", ONE)
