"""An identity that changes: generations on the disk, cuts between any two writes, and the requests to the server."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from device_pki import Authority
from https_server import Book, Request, https_server

from agent.adapters import identity as identity_adapter
from agent.adapters.device_api import HttpsMembership
from agent.adapters.https import HttpsServer
from agent.adapters.identity import IdentityFolder
from agent.ports import ShutOut, Trouble, Weather
from protocol.device_api import DeviceApiError, RenewRequest, RenewResponse, Standing


class PowerCut(Exception):
    """The machine is off."""


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> IdentityFolder:
    made = IdentityFolder(tmp_path / "identity")
    made.accept("cam-7", "https://fleet:8443", authority.response(made.request("cam-7")))
    return made


def renewal(authority: Authority, files: IdentityFolder, *, ca: str = "") -> RenewResponse:
    return RenewResponse(certificate=authority.sign(files.request("cam-7")), ca=ca or authority.pem)


def test_a_renewal_has_a_fresh_key_and_keeps_the_rest(files: IdentityFolder, authority: Authority) -> None:
    before = files.load()
    files.renew(renewal(authority, files))
    after = files.load()
    assert before.key.public_key() != after.key.public_key() == after.certificate.public_key()
    assert (before.image_root, before.director_root) == (after.image_root, after.director_root)
    assert (after.settings.server, after.settings.labels) == (before.settings.server, before.settings.labels)
    after.broker_tls()


def test_the_same_key_is_asked_for_until_its_certificate_is_stored(
    files: IdentityFolder, authority: Authority
) -> None:
    first = renewal(authority, files)  # the answer to this one gets lost
    second = renewal(authority, files)
    files.renew(second)
    files.load()
    with pytest.raises(Trouble, match="another key"):
        files.renew(first)  # which comes late: the next key is another one by now


def test_what_counts_no_more_is_removed_and_the_next_key_is_kept(
    files: IdentityFolder, authority: Authority, tmp_path: Path
) -> None:
    for _ in range(3):
        files.renew(renewal(authority, files))
    files.request("cam-7")
    files.tidy()
    names = {path.name for path in (tmp_path / "identity").iterdir()}
    third = {"key-3.pem", "cert-3.pem", "ca-3.pem", "image_root-3.json", "director_root-3.json"}
    assert names == third | {"identity.json", "key-4.pem"}
    files.load()


BAD: list[tuple[str, Callable[[Authority, IdentityFolder], RenewResponse], str]] = [
    (
        "for another device",
        lambda a, f: RenewResponse(certificate=a.sign(f.request("x"), device="x"), ca=a.pem),
        "'x'",
    ),
    ("from another CA", lambda a, f: renewal(Authority(), f, ca=a.pem), "not issued"),
    ("no certificate", lambda a, _: RenewResponse(certificate="hello", ca=a.pem), "not a certificate"),
    ("no CA", lambda a, f: renewal(a, f, ca="hello"), "not a certificate"),
]


@pytest.mark.parametrize(("answer", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_an_answer_that_does_not_fit_changes_nothing(
    files: IdentityFolder,
    authority: Authority,
    answer: Callable[[Authority, IdentityFolder], RenewResponse],
    says: str,
) -> None:
    before = files.load().certificate
    with pytest.raises(Trouble, match=says):
        files.renew(answer(authority, files))
    assert before == files.load().certificate


def test_a_cut_before_any_write_leaves_one_whole_identity(
    files: IdentityFolder, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the request for the CSR to the last file: whatever is cut off, `load` finds the old or the new one."""
    place, outcomes = tmp_path / "identity", []
    copy = shutil.copytree(place, tmp_path / "copy")
    write = identity_adapter.write_atomically
    for cut_at in range(20):
        shutil.rmtree(place)
        shutil.copytree(copy, place)
        old = files.load().certificate
        left = iter(range(cut_at))

        def writing(path: Path, data: bytes, *, mode: int = 0o600) -> None:
            if next(left, None) is None:  # noqa: B023 - called in this turn of the loop only
                raise PowerCut
            write(path, data, mode=mode)

        monkeypatch.setattr(identity_adapter, "write_atomically", writing)
        try:
            files.renew(renewal(authority, files))
        except PowerCut:
            pass
        else:
            outcomes.append(files.load().certificate != old)
            break
        finally:
            monkeypatch.setattr(identity_adapter, "write_atomically", write)
        assert files.load().certificate == old
        files.load().broker_tls()
        files.renew(renewal(authority, files))  # told again from the beginning
        outcomes.append(files.load().certificate != old)
    assert outcomes == [True] * 7  # the key, four files, identity.json, and once without a cut


def test_two_cas_are_both_trusted_and_then_only_the_new_one(
    files: IdentityFolder, authority: Authority, tmp_path: Path
) -> None:
    following = Authority(name="Next CA")
    assert files.holds(authority.pem)
    assert not files.holds(authority.pem + following.pem)
    files.renew(renewal(following, files, ca=authority.pem + following.pem))
    assert files.holds(following.pem + authority.pem)
    for shown in (authority, following):
        with https_server(shown.server_tls(tmp_path / shown.name)) as book:
            book.answer = lambda request: request.reply(200, b"hello")
            assert fetch(book, files) == b"hello"
    files.renew(renewal(following, files, ca=following.pem))
    with https_server(authority.server_tls(tmp_path / "again")) as book:
        with pytest.raises(Weather, match="CERTIFICATE_VERIFY_FAILED"):
            fetch(book, files)
        assert book.seen == []


def fetch(book: Book, files: IdentityFolder) -> bytes:
    context = files.load().server_tls()
    server = HttpsServer(book.url, tls=lambda: context)
    try:
        with server.open("/") as response:
            return server.read(response, 100, "it")
    finally:
        server.close()


# ---------------------------------------------------------------- requests
@pytest.fixture(scope="module")
def book(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with https_server(authority.server_tls(tmp_path_factory.mktemp("tls"))) as running:
        yield running


@pytest.fixture
def server(book: Book, files: IdentityFolder) -> Iterator[HttpsServer]:
    book.seen.clear()
    identity = files.load()
    context = identity.server_tls()
    made = HttpsServer(book.url, tls=lambda: context, authorise=lambda: str(made.time_there))
    yield made
    made.close()


def answering(book: Book, status: int, body: msgspec.Struct | bytes, **headers: str) -> None:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    book.answer = lambda request: request.reply(status, data, **headers)


def test_the_server_says_how_a_device_stands_and_signs_its_request(book: Book, server: HttpsServer) -> None:
    standing, renewed = Standing(ca="CA", expires=1), RenewResponse(certificate="C", ca="CA")
    answering(book, 200, standing)
    assert HttpsMembership(server).standing() == standing
    bodies: list[bytes] = []

    def renew(request: Request) -> None:
        bodies.append(request.read_body())
        request.reply(200, msgspec.json.encode(renewed))

    book.answer = renew
    assert HttpsMembership(server).renew(RenewRequest(csr="CSR")) == renewed
    assert bodies == [b'{"csr":"CSR"}']


Said = tuple[int, msgspec.Struct | bytes]
ANSWERS: list[tuple[str, Said, type[Exception], str]] = [
    ("revoked", (403, DeviceApiError(error="this device was revoked")), ShutOut, "revoked"),
    (
        "unknown to a restored server",
        (401, DeviceApiError(error="unknown", remedy="reopen it")),
        ShutOut,
        "reopen it",
    ),
    ("refused without words", (403, b"<html>"), ShutOut, "403"),
    ("a CSR that is not granted", (400, DeviceApiError(error="for a fresh key")), Trouble, "fresh key"),
    ("busy", (503, b""), Weather, "503"),
    ("a server of before", (404, b""), Weather, "404"),
    ("something else", (200, b"<html>"), Weather, "cannot be read"),
]


@pytest.mark.parametrize(("said", "error", "words"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
def test_a_refusal_is_told_from_bad_weather(
    book: Book, server: HttpsServer, said: Said, error: type[Exception], words: str
) -> None:
    answering(book, *said)
    with pytest.raises(error, match=words):
        HttpsMembership(server).standing()


@pytest.mark.parametrize("years", [-10, 10])
def test_a_token_of_a_wrong_clock_is_signed_again_by_the_servers_time(
    book: Book, files: IdentityFolder, years: int
) -> None:
    """The time comes over TLS that was verified; it is good for nothing but tokens."""
    wrong, tokens = time.time() + years * 365 * 24 * 3600, []
    context = files.load().server_tls()
    server = HttpsServer(book.url, tls=lambda: context, authorise=lambda: str(server.time_there or int(1000 * wrong)))

    def answer(request: Request) -> None:
        tokens.append(int(request.headers["Authorization"].removeprefix("Bearer ")) / 1000)
        status = 200 if abs(tokens[-1] - time.time()) < 60 else 401
        request.reply(status, b'{"ca":"CA","expires":1}')

    book.answer = answer
    assert HttpsMembership(server).standing().ca == "CA"
    assert len(tokens) == 2
    HttpsMembership(server).standing()
    assert len(tokens) == 3
    server.close()
