"""Content codings: what is taken, what is given, and that nothing is inflated beyond its cap."""

import gzip
import json
import socket
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
from protocol_world import World, world

from agent.inference.encoding import accepted_coding, coding_of, inflated
from agent.inference.parsing import HttpError

TEXT = b'{"inputs": []}'


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, "identity"),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("br, deflate;q=0.5", "deflate"),
        ("gzip;q=0.2, deflate;q=0.9", "deflate"),
        ("GZIP", "gzip"),
        ("gzip;q=0", "identity"),
        ("gzip;q=nonsense", "identity"),
        ("identity", "identity"),
        ("*", "identity"),
        (",;,=;q", "identity"),
    ],
)
def test_the_client_chooses_the_answers_coding(header: str | None, expected: str) -> None:
    headers = {} if header is None else {"accept-encoding": header}
    assert expected == accepted_coding(headers)


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "zstd", "x-gzip", ""])
def test_other_codings_are_415(coding: str) -> None:
    with pytest.raises(HttpError) as refused:
        coding_of({"content-encoding": coding})
    assert 415 == refused.value.status


@pytest.mark.parametrize(
    ("body", "coding", "status", "said"),
    [
        pytest.param(b"junk", "gzip", 400, "not gzip", id="no-gzip"),
        pytest.param(zlib.compress(TEXT), "gzip", 400, "not gzip", id="deflate-as-gzip"),
        pytest.param(gzip.compress(TEXT), "deflate", 400, "not deflate", id="gzip-as-deflate"),
        pytest.param(gzip.compress(TEXT)[:-1], "gzip", 400, "one whole", id="cut-short"),
        pytest.param(gzip.compress(TEXT) + b"x", "gzip", 400, "one whole", id="more-behind"),
        pytest.param(gzip.compress(TEXT) * 2, "gzip", 400, "one whole", id="two-members"),
        pytest.param(gzip.compress(bytes(1001)), "gzip", 413, "more than 1000 bytes", id="one-over-the-cap"),
        pytest.param(zlib.compress(bytes(10**7)), "deflate", 413, "more than 1000 bytes", id="bomb"),
    ],
)
def test_each_bad_body_is_refused(body: bytes, coding: str, status: int, said: str) -> None:
    with pytest.raises(HttpError, match=said) as refused:
        inflated(memoryview(body), coding, 1000)
    assert status == refused.value.status


def test_a_body_of_exactly_the_cap_passes() -> None:
    assert bytes(1000) == bytes(inflated(memoryview(gzip.compress(bytes(1000))), "gzip", 1000))


def test_a_bomb_takes_no_more_memory_than_the_cap() -> None:
    bomb = memoryview(gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    with pytest.raises(HttpError):
        inflated(bomb, "gzip", 100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# ---------------------------------------------------------------- over the wire
@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as one:
        yield one


def ask(plane: World, path: str, body: bytes, *headers: str) -> tuple[dict[str, str], bytes]:
    host, port = plane.http.split(":")
    lines = "".join(f"{header}\r\n" for header in headers)
    with socket.create_connection((host, int(port)), timeout=10) as sock, sock.makefile("rb") as stream:
        verb = "POST" if body else "GET"
        sock.sendall(f"{verb} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode())
        sock.sendall(body)
        found = {"status": stream.readline().split()[1].decode()}
        while (line := stream.readline().decode().strip()) != "":
            name, _, value = line.partition(":")
            found[name.lower()] = value.strip()
        return found, stream.read(int(found["content-length"]))


SMALL = json.dumps({"inputs": [{"name": "image", "shape": [1, 8, 8, 1], "datatype": "INT8", "data": [0] * 64}]})


def large(plane: World) -> bytes:
    """Return a request whose answer is over the size from which answers are compressed: its id is long."""
    specs = plane.engine.find("every-type").signature.inputs
    tensors = [
        {"name": s.name, "shape": s.shape, "datatype": s.dtype, "data": [s.dtype == "BOOL"] * 6}
        if s.dtype == "BOOL"
        else {"name": s.name, "shape": s.shape, "datatype": s.dtype, "data": [1] * 6}
        for s in specs
    ]
    return json.dumps({"inputs": tensors}).encode()


@pytest.mark.parametrize(("coding", "inflate"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_a_large_answer_is_compressed_for_who_accepts_it(plane: World, coding: str, inflate: object) -> None:
    path, body = "/v2/models/every-type/infer", large(plane)
    plain_headers, plain = ask(plane, path, body)
    headers, data = ask(plane, path, body, f"Accept-Encoding: {coding}")
    assert (None, coding) == (plain_headers.get("content-encoding"), headers.get("content-encoding"))
    assert len(data) < len(plain)
    assert json.loads(plain)["outputs"] == json.loads(inflate(data))["outputs"]


def test_small_answers_errors_and_descriptions_stay_as_they_are(plane: World) -> None:
    for path, body in (
        ("/v2/models/digits/infer", SMALL.encode()),
        ("/v2/models/digits/infer", b"{}" * 2000),
        ("/v2/models/every-type", b""),
        ("/metrics", b""),
    ):
        headers, _ = ask(plane, path, body, "Accept-Encoding: gzip, deflate")
        assert "content-encoding" not in headers, path


def test_a_coded_body_over_the_models_cap_is_413_and_the_connection_lives(plane: World) -> None:
    headers, body = ask(plane, "/v2/models/digits/infer", gzip.compress(bytes(10**6)), "Content-Encoding: gzip")
    assert ("413", True) == (headers["status"], "inflated" in json.loads(body)["error"])
    assert "connection" not in headers


def test_small_endpoints_take_coded_bodies_too(plane: World) -> None:
    headers, body = ask(plane, "/v2/repository/index", gzip.compress(b'{"ready": true}'), "Content-Encoding: gzip")
    assert "200" == headers["status"]
    assert ["digits", "every-type", "rgb", "typed"] == [one["name"] for one in json.loads(body)]
