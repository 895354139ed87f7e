import hashlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from device_pki import Authority
from https_server import Book, Request, https_server

from agent.adapters.device_api import HttpsMetadata
from agent.adapters.download import BundleDownloads
from agent.adapters.https import HttpsServer
from agent.adapters.identity import context_for
from agent.core.downloading import RESERVE
from agent.ports import Refusal, Target, Trouble, Weather
from protocol.manifest import Needs, TensorSpec
from protocol.release import Assignment, Release
from protocol.states import RejectReason

BODY = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
TENSOR = TensorSpec(name="x", dtype="INT8", shape=(1, 4))


def target(length: int = len(BODY), sha256: str = SHA) -> Target:
    release = Release(
        model="digits", version=1, variant="int8", inputs=(TENSOR,), outputs=(TENSOR,), needs=Needs(memory=1)
    )
    return Target(release=release, assignment=Assignment(rollout="r-1"), sha256=sha256, length=length)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def running(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with https_server(authority.server_tls(tmp_path_factory.mktemp("tls"))) as book:
        yield book


@pytest.fixture
def server(running: Book) -> Book:
    running.seen.clear()
    running.answer = ranges
    return running


@pytest.fixture
def https(server: Book, authority: Authority) -> Iterator[HttpsServer]:
    context = context_for(authority.pem)
    https = HttpsServer(server.url, tls=lambda: context, authorise=lambda: "a.jwt.token", read_timeout=0.5)
    yield https
    https.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def downloads(https: HttpsServer, folder: Path) -> BundleDownloads:
    return BundleDownloads(https, folder)


def fetch(downloads: BundleDownloads, wanted: Target | None = None) -> str:
    return downloads.fetch(wanted or target(), lambda count: None, lambda: False)


def part_of(folder: Path) -> Path:
    return folder / f"{SHA}.part"


def leave_part(folder: Path, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    part_of(folder).write_bytes(data)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix(SHA) for path in folder.iterdir())


# ---------------------------------------------------------------- what servers answer
def ranges(request: Request) -> None:
    """A server that does ranges."""
    said = request.headers.get("Range")
    if said is None:
        request.reply(200, BODY)
        return
    start = int(said.removeprefix("bytes=").removesuffix("-"))
    request.reply(206, BODY[start:], Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")


def whole(request: Request) -> None:
    request.reply(200, BODY)


def breaks_off(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(BODY)))
    request.end_headers()
    request.wfile.write(BODY[:200_000])
    request.close_connection = True


def shorter(request: Request) -> None:
    request.reply(200, BODY[:-1])


def longer(request: Request) -> None:
    request.reply(200, BODY + b"!")


def endless(request: Request) -> None:
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    for _ in range(1000):
        request.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def other_bytes(request: Request) -> None:
    request.reply(200, bytes(len(BODY)))


def other_range(request: Request) -> None:
    request.reply(206, BODY[5:], Content_Range=f"bytes 5-{len(BODY) - 1}/{len(BODY)}")


def redirect(request: Request) -> None:
    request.reply(302, Location="https://127.0.0.1:1/elsewhere")


def silent(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(BODY)))
    request.end_headers()
    time.sleep(1)
    request.close_connection = True


def drip(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(BODY)))
    request.end_headers()
    for index in range(8):
        request.wfile.write(BODY[index : index + 1])
        time.sleep(0.2)
    request.close_connection = True


def status(code: int, **headers: str) -> Callable[[Request], None]:
    return lambda request: request.reply(code, b"no", **headers)


# ---------------------------------------------------------------- bundles
def test_a_bundle_arrives_whole_under_its_digest(downloads: BundleDownloads, folder: Path, server: Book) -> None:
    progress: list[int] = []

    path = downloads.fetch(target(), progress.append, lambda: False)

    assert Path(path).read_bytes() == BODY
    assert left_in(folder) == [".ewb"]
    assert progress == sorted(progress)
    assert progress[-1] == len(BODY)
    asked, headers = server.seen[0]
    assert asked == f"/device/v1/bundles/{SHA}"
    assert headers["Authorization"] == "Bearer a.jwt.token"


def test_a_bundle_that_is_here_is_not_asked_for_again(downloads: BundleDownloads, server: Book) -> None:
    assert fetch(downloads) == fetch(downloads)
    assert len(server.seen) == 1


def test_a_bundle_that_was_damaged_on_disk_is_fetched_again(downloads: BundleDownloads, server: Book) -> None:
    path = Path(fetch(downloads))
    path.write_bytes(bytes(len(BODY)))

    assert Path(fetch(downloads)).read_bytes() == BODY


def test_a_download_goes_on_where_it_broke_off(downloads: BundleDownloads, folder: Path, server: Book) -> None:
    server.answer = breaks_off
    with pytest.raises(Weather):
        fetch(downloads)
    assert part_of(folder).stat().st_size == 200_000
    server.answer = ranges

    assert Path(fetch(downloads)).read_bytes() == BODY
    assert server.seen[1][1]["Range"] == "bytes=200000-"


def test_a_download_starts_over_where_the_server_does_no_ranges(
    downloads: BundleDownloads, folder: Path, server: Book
) -> None:
    leave_part(folder, BODY[:1000])
    server.answer = whole

    assert Path(fetch(downloads)).read_bytes() == BODY


def test_a_whole_part_is_checked_without_asking(downloads: BundleDownloads, folder: Path, server: Book) -> None:
    leave_part(folder, BODY)

    assert Path(fetch(downloads)).read_bytes() == BODY
    assert server.seen == []


@pytest.mark.parametrize("size", [1000, len(BODY), len(BODY) + 5], ids=["short", "whole", "too long"])
def test_a_part_with_holes_is_fetched_afresh_and_blames_nobody(
    downloads: BundleDownloads, folder: Path, size: int
) -> None:
    """A power cut can leave a file of the right size with zeros where the data should be."""
    leave_part(folder, bytes(size))

    assert Path(fetch(downloads)).read_bytes() == BODY


WEATHER: list[tuple[str, Callable[[Request], None], str]] = [
    ("breaks off", breaks_off, "broke off"),
    ("shorter", shorter, "1 bytes before the end"),
    ("silent", silent, "broke off"),
    ("drips", drip, "sends only"),
    ("redirect", redirect, "302"),
    ("busy", status(503), "503"),
    ("not authorised", status(401), "401"),
    ("broken", status(500), "500"),
]


@pytest.mark.parametrize(("answer", "says"), [row[1:] for row in WEATHER], ids=[row[0] for row in WEATHER])
def test_weather_passes_and_keeps_what_came(
    downloads: BundleDownloads, server: Book, answer: Callable[[Request], None], says: str
) -> None:
    server.answer = answer
    with pytest.raises(Weather, match=says):
        fetch(downloads)
    server.answer = ranges

    assert Path(fetch(downloads)).read_bytes() == BODY


REFUSALS: list[tuple[str, Callable[[Request], None], RejectReason]] = [
    ("other bytes", other_bytes, RejectReason.HASH_MISMATCH),
    ("longer than signed", longer, RejectReason.HASH_MISMATCH),
    ("endless", endless, RejectReason.HASH_MISMATCH),
    ("not found", status(404), RejectReason.UNREACHABLE),
    ("gone", status(410), RejectReason.UNREACHABLE),
]


@pytest.mark.parametrize(("answer", "reason"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_a_refused_bundle_leaves_nothing(
    downloads: BundleDownloads, folder: Path, server: Book, answer: Callable[[Request], None], reason: RejectReason
) -> None:
    server.answer = answer

    with pytest.raises(Refusal) as refused:
        fetch(downloads)

    assert refused.value.reason is reason
    assert left_in(folder) == []


def test_another_range_than_asked_for_is_not_appended(downloads: BundleDownloads, folder: Path, server: Book) -> None:
    leave_part(folder, BODY[:1000])
    server.answer = other_range
    with pytest.raises(Weather, match="another range"):
        fetch(downloads)
    server.answer = ranges

    assert Path(fetch(downloads)).read_bytes() == BODY


RETRIES = [
    ("7", None, 7.0),
    ("Tue, 01 Sep 2026 10:00:30 GMT", "Tue, 01 Sep 2026 10:00:00 GMT", 30.0),
    ("999999999", None, 86400.0),
    ("soon", None, None),
]


@pytest.mark.parametrize(("said", "date", "seconds"), RETRIES)
def test_the_server_may_ask_for_patience(
    downloads: BundleDownloads, server: Book, said: str, date: str | None, seconds: float | None
) -> None:
    def answer(request: Request) -> None:
        request.send_response_only(429)
        request.send_header("Retry-After", said)
        if date:
            request.send_header("Date", date)
        request.send_header("Content-Length", "0")
        request.end_headers()

    server.answer = answer

    with pytest.raises(Weather) as weather:
        fetch(downloads)

    assert weather.value.retry_after == seconds


def test_a_cancelled_download_keeps_its_part(downloads: BundleDownloads, folder: Path) -> None:
    with pytest.raises(Weather, match="cancelled"):
        downloads.fetch(target(), lambda count: None, lambda: True)

    assert left_in(folder) == [".part"]
    downloads.discard(SHA)
    assert left_in(folder) == []


def test_a_disk_without_room_is_not_even_asked_to_take_it(https: HttpsServer, folder: Path, server: Book) -> None:
    downloads = BundleDownloads(https, folder, free=lambda path: RESERVE + 2 * len(BODY) - 1)

    with pytest.raises(Refusal) as refused:
        fetch(downloads)

    assert refused.value.reason is RejectReason.NO_SPACE
    assert server.seen == []


def test_a_disk_that_fills_up_on_the_way_is_no_space(downloads: BundleDownloads, folder: Path) -> None:
    folder.mkdir()
    part_of(folder).symlink_to("/dev/full")  # every write there fails with ENOSPC

    with pytest.raises(Refusal) as refused:
        fetch(downloads)

    assert refused.value.reason is RejectReason.NO_SPACE
    assert left_in(folder) == []


def test_a_server_that_is_not_there_is_weather(folder: Path, authority: Authority) -> None:
    https = HttpsServer("https://127.0.0.1:1", tls=lambda: context_for(authority.pem))

    with pytest.raises(Weather, match="did not answer"):
        fetch(BundleDownloads(https, folder))


@pytest.mark.parametrize("url", ["http://fleet:8443", "fleet:8443", "https://", "https://u@fleet", "https://f/path"])
def test_only_an_https_address_is_a_server(url: str) -> None:
    with pytest.raises(Trouble, match="not a server's address"):
        HttpsServer(url, tls=lambda: context_for(""))


# ---------------------------------------------------------------- metadata
def test_image_metadata_come_by_name_and_a_missing_one_is_none(https: HttpsServer, server: Book) -> None:
    files = {"/device/v1/image/metadata/timestamp.json": b"{}"}

    def answer(request: Request) -> None:
        body = files.get(request.path)
        request.reply(404) if body is None else request.reply(200, body)

    server.answer = answer
    metadata = HttpsMetadata(https)

    assert metadata.image("timestamp.json", 100) == b"{}"
    assert metadata.image("2.root.json", 100) is None


def test_metadata_over_the_cap_are_refused_while_they_come(https: HttpsServer, server: Book) -> None:
    server.answer = endless

    with pytest.raises(Refusal) as refused:
        HttpsMetadata(https).image("targets.json", 200_000)

    assert refused.value.reason is RejectReason.MALFORMED


def test_metadata_of_a_server_in_trouble_are_weather(https: HttpsServer, server: Book) -> None:
    server.answer = status(503, Retry_After="9")

    with pytest.raises(Weather) as weather:
        HttpsMetadata(https).image("timestamp.json", 100)

    assert weather.value.retry_after == 9.0


def test_the_desired_state_comes_over_https_too(https: HttpsServer, server: Book) -> None:
    files = {
        f"/device/v1/director/metadata/{n}": n.encode() for n in ("3.root.json", "4.root.json", "timestamp.json")
    }
    files["/device/v1/director/metadata/snapshot.json"] = b"s"

    def answer(request: Request) -> None:
        body = files.get(request.path)
        request.reply(404) if body is None else request.reply(200, body)

    server.answer = answer
    message = HttpsMetadata(https).desired_state(director_root=2)

    assert message.root == (b"3.root.json", b"4.root.json")
    assert (message.timestamp, message.snapshot, message.targets) == (b"timestamp.json", b"s", b"")
