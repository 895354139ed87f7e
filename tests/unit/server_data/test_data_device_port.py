"""The HTTPS port for devices: enrolment with real keys, requests signed by the device, bundles in ranges."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import jwt
import msgspec
import pytest
from typer.testing import CliRunner
from web_world import Key, Web, running_web

from fleet_server.adapters.deltas import DeltaFolder
from fleet_server.api_types import TokenCreated, TokenRequest
from fleet_server.cli.__main__ import app as cli
from fleet_server.cli.session import Session
from fleet_server.web.bodies import UnsatisfiableRange, range_of
from protocol.device_api import (
    BUNDLES_PATH,
    CA_PATH,
    DIRECTOR_METADATA_PATH,
    ENROL_PATH,
    IMAGE_METADATA_PATH,
    DeviceApiError,
    EnrolRequest,
    EnrolResponse,
    parse_token,
)
from protocol.release import NO_BASE, ZSTD, ZSTD_PATCH

BUNDLE = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(BUNDLE).hexdigest()
OLDER = BUNDLE[::-1]
OLDER_DIGEST = hashlib.sha256(OLDER).hexdigest()


@dataclass
class Enrolled:
    web: Web
    key: Key
    answer: EnrolResponse

    def get(self, path: str, **headers: str) -> object:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.web.device_request("GET", path, headers=self.key.bearer("cam-1") | named)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("devices")
    with running_web(folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEWARDEN_PASSWORD", "correct horse")
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        made = CliRunner().invoke(
            cli, ["keys", "init", "--dir", str(folder / "keys"), "--server", running.url, "--no-passphrase"]
        )
        assert made.exit_code == 0, made.output
        yield running


def token_of(web: Web) -> str:
    session = Session(web.url)
    try:
        return session.post("/tokens", TokenRequest(labels={"site": "oslo"}), TokenCreated).token
    finally:
        session.close()


def enrol_request(web: Web, name: str, key: Key) -> bytes:
    token = parse_token(token_of(web))
    return msgspec.json.encode(EnrolRequest(token_id=token.id, secret=token.secret, device=name, csr=key.csr(name)))


@pytest.fixture(scope="module")
def enrolled(web: Web) -> Enrolled:
    key = Key()
    answer = web.device_request(
        "POST", ENROL_PATH, body=enrol_request(web, "cam-1", key), headers={"Content-Type": "application/json"}
    )
    assert answer.status == 200, answer.data
    web.parts.artifacts.add(iter([BUNDLE]), DIGEST, cap=10**7)
    return Enrolled(web=web, key=key, answer=msgspec.json.decode(answer.data, type=EnrolResponse))


def test_enrolment_gives_certificate_roots_and_labels_and_lets_the_device_in(web: Web, enrolled: Enrolled) -> None:
    answer = enrolled.answer
    assert (answer.labels, answer.broker_host, answer.broker_port) == ({"site": "oslo"}, "localhost", 8883)
    assert (b'"root"' in answer.image_root, b'"root"' in answer.director_root) == (True, True)
    assert answer.ca.encode() == web.device_request("GET", CA_PATH).data
    assert ("cam-1" in web.uplink.admitted, "cam-1" in web.uplink.wants) == (True, True)


def test_a_device_reads_its_own_director_metadata_and_the_image_repository(web: Web, enrolled: Enrolled) -> None:
    desire = web.parts.desired.desired("cam-1")
    assert desire is not None
    for name, expected in {
        f"{DIRECTOR_METADATA_PATH}/timestamp.json": desire.timestamp,
        f"{DIRECTOR_METADATA_PATH}/{desire.version}.targets.json": desire.targets,
        f"{DIRECTOR_METADATA_PATH}/1.root.json": enrolled.answer.director_root,
        f"{IMAGE_METADATA_PATH}/1.root.json": enrolled.answer.image_root,
        f"{IMAGE_METADATA_PATH}/timestamp.json": web.parts.image.metadata("timestamp.json"),
    }.items():
        assert enrolled.get(name).data == expected, name  # type: ignore[attr-defined]  # urllib3's


@pytest.mark.parametrize(
    "path",
    [
        f"{DIRECTOR_METADATA_PATH}/2.root.json",
        f"{DIRECTOR_METADATA_PATH}/99.targets.json",
        f"{DIRECTOR_METADATA_PATH}/nonsense",
        f"{IMAGE_METADATA_PATH}/9.root.json",
        f"{BUNDLES_PATH}/{'0' * 64}",
        f"{BUNDLES_PATH}/..%2f..%2fadmin-password",
    ],
)
def test_what_is_not_there_is_404(enrolled: Enrolled, path: str) -> None:
    answer = enrolled.get(path)
    assert answer.status == 404  # type: ignore[attr-defined]  # urllib3's


# ---------------------------------------------------------------- who may ask
def test_requests_need_the_devices_own_fresh_signature(web: Web, enrolled: Enrolled) -> None:
    good, stranger = enrolled.key, Key()
    none = jwt.encode({"iss": "cam-1"}, None, algorithm="none")
    shared = jwt.encode({"iss": "cam-1"}, "x" * 32, algorithm="HS256")
    headers = {
        "no token": {},
        "nonsense": {"Authorization": "Bearer nonsense"},
        "another scheme": {"Authorization": "Basic Y2FtLTE6eA=="},
        "unsigned": {"Authorization": f"Bearer {none}"},
        "signed with a shared secret": {"Authorization": f"Bearer {shared}"},
        "another's key": stranger.bearer("cam-1"),
        "an unknown device": stranger.bearer("cam-9"),
        "no device id": stranger.bearer("../x"),
        "expired": good.bearer("cam-1", at=-200),
        "of tomorrow": good.bearer("cam-1", at=86_400),
        "too long a life": good.bearer("cam-1", life=3600),
        "for another audience": good.bearer("cam-1", audience="somebody"),
        "without end": {"Authorization": "Bearer " + "x" * 5000},
    }
    statuses = {
        name: web.device_request("GET", f"{BUNDLES_PATH}/{DIGEST}", headers=header).status
        for name, header in headers.items()
    }
    assert statuses == dict.fromkeys(headers, 401)
    assert enrolled.get(f"{BUNDLES_PATH}/{DIGEST}").status == 200  # type: ignore[attr-defined]  # urllib3's


def test_a_revoked_device_is_refused_at_once(web: Web) -> None:
    key = Key()
    body = enrol_request(web, "cam-7", key)
    assert (
        web.device_request("POST", ENROL_PATH, body=body, headers={"Content-Type": "application/json"}).status == 200
    )
    path = f"{DIRECTOR_METADATA_PATH}/timestamp.json"
    assert web.device_request("GET", path, headers=key.bearer("cam-7")).status == 200
    with web.engine.begin() as connection:
        connection.exec_driver_sql("update device set revoked = 1 where id = 'cam-7'")
    assert web.device_request("GET", path, headers=key.bearer("cam-7")).status == 403


BAD_ENROLMENTS = {
    "bad JSON": (b"{", 400),
    "not UTF-8": (b'{"device": "\xff"}', 400),
    "missing fields": (b'{"device": "cam-2"}', 400),
    "wrong types": (b'{"token_id": 1, "secret": [], "device": {}, "csr": 2}', 400),
    "over the cap": (b" " * 70_000, 413),
    "an unknown token": (b'{"token_id": "0123456789abcdef", "secret": "s", "device": "cam-2", "csr": "CSR"}', 403),
    "a reserved name": (b'{"token_id": "0123456789abcdef", "secret": "s", "device": "admin", "csr": ""}', 400),
}


@pytest.mark.parametrize(("body", "status"), BAD_ENROLMENTS.values(), ids=BAD_ENROLMENTS.keys())
def test_a_bad_enrolment_is_refused_in_words(web: Web, body: bytes, status: int) -> None:
    if b"CSR" in body:
        body = body.replace(b'"CSR"', msgspec.json.encode(Key().csr("cam-2")))
    answer = web.device_request("POST", ENROL_PATH, body=body, headers={"Content-Type": "application/json"})
    assert answer.status == status, answer.data
    assert msgspec.json.decode(answer.data, type=DeviceApiError).error


def test_an_id_that_is_taken_is_refused(web: Web, enrolled: Enrolled) -> None:
    body = enrol_request(web, "cam-1", Key())
    answer = web.device_request("POST", ENROL_PATH, body=body, headers={"Content-Type": "application/json"})
    assert (answer.status, b"enrolled already" in answer.data) == (409, True)


# ---------------------------------------------------------------- ranges
def test_a_bundle_comes_whole_or_from_where_it_was_cut(enrolled: Enrolled) -> None:
    path = f"{BUNDLES_PATH}/{DIGEST}"
    whole = enrolled.get(path)
    assert (whole.status, whole.headers["Content-Length"], whole.data) == (200, str(len(BUNDLE)), BUNDLE)  # type: ignore[attr-defined]  # urllib3's
    rest = enrolled.get(path, Range="bytes=1000000-")
    assert (rest.status, rest.headers["Content-Range"]) == (206, f"bytes 1000000-{len(BUNDLE) - 1}/{len(BUNDLE)}")  # type: ignore[attr-defined]  # urllib3's
    assert rest.data == BUNDLE[1_000_000:]  # type: ignore[attr-defined]  # urllib3's
    other = enrolled.get(path, Range="bytes=5-9", If_Range='"another"')
    assert (other.status, other.data) == (200, BUNDLE)  # type: ignore[attr-defined]  # urllib3's
    beyond = enrolled.get(path, Range=f"bytes={len(BUNDLE)}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(BUNDLE)}")  # type: ignore[attr-defined]  # urllib3's


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", (0, 0)),
        ("bytes=3-", (3, 9)),
        ("bytes=3-99", (3, 9)),
        ("bytes=-4", (6, 9)),
        ("bytes=-99", (0, 9)),
        ("bytes=5-3", None),
        ("bytes=-", None),
        ("bytes=1-2,4-5", None),
        ("rows=1-2", None),
        ("bytes=1e3-", None),
    ],
)
def test_a_range_is_read_as_the_standard_says(header: str | None, expected: tuple[int, int] | None) -> None:
    assert range_of(header, 10) == expected


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=11-12", "bytes=-0"])
def test_a_range_outside_of_the_file_is_refused(header: str) -> None:
    with pytest.raises(UnsatisfiableRange):
        range_of(header, 10)


# ---------------------------------------------------------------- deltas
@pytest.fixture(scope="module")
def deltas(enrolled: Enrolled) -> Iterator[DeltaFolder]:
    deltas = enrolled.web.parts.deltas
    assert isinstance(deltas, DeltaFolder)
    enrolled.web.parts.artifacts.add(iter([OLDER]), OLDER_DIGEST, cap=10**7)
    deltas.start()
    yield deltas
    deltas.stop()


@pytest.mark.parametrize("base", [OLDER_DIGEST, NO_BASE])
def test_a_delta_is_made_when_it_is_first_asked_for_and_answered_in_ranges(
    enrolled: Enrolled, deltas: DeltaFolder, base: str
) -> None:
    method = ZSTD if base == NO_BASE else ZSTD_PATCH
    path = f"{BUNDLES_PATH}/{DIGEST}?from={base}&method={method}"
    first = enrolled.get(path)
    assert first.status == 404
    assert "fetch the bundle itself" in msgspec.json.decode(first.data, type=DeviceApiError).error
    assert deltas.settle(60)

    whole, rest = enrolled.get(path), enrolled.get(path, Range="bytes=5-")
    offer = deltas.offer(base, DIGEST, [method])
    assert offer is not None
    assert (whole.status, rest.status) == (200, 206)
    assert (len(whole.data), hashlib.sha256(whole.data).hexdigest()) == (offer.length, offer.sha256)
    assert rest.data == whole.data[5:]
    assert rest.headers["Content-Range"] == f"bytes 5-{offer.length - 1}/{offer.length}"


@pytest.mark.parametrize("query", ["from=", "from=none", "from=../x&method=zstd", "from=none&method=../../x"])
def test_what_names_no_delta_is_not_found(enrolled: Enrolled, deltas: DeltaFolder, query: str) -> None:
    assert enrolled.get(f"{BUNDLES_PATH}/{DIGEST}?{query}").status == 404


def test_a_delta_takes_a_token_as_everything_does(enrolled: Enrolled) -> None:
    path = f"{BUNDLES_PATH}/{DIGEST}?from={NO_BASE}&method={ZSTD}"
    assert enrolled.web.device_request("GET", path).status == 401
