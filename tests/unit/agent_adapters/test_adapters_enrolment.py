from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from device_pki import Authority
from https_server import Book, Request, https_server

from agent.adapters.device_api import HttpsEnrolment
from agent.adapters.identity import IdentityFolder, key_pin
from agent.enrolment import enrol
from agent.ports import Trouble, Weather
from protocol.device_api import CA_PATH, ENROL_PATH, DeviceApiError, EnrolmentToken, EnrolRequest, pin_of

IMAGE_ROOT = b'{"signed": {"version": 1}}'


class FleetServer:
    """The open part of a fleet server's device API, over real TLS."""

    def __init__(self, book: Book, authority: Authority) -> None:
        self.book = book
        self.authority = authority
        self.requests: list[EnrolRequest] = []
        self.ca = authority.pem.encode()
        self.refusal: tuple[int, bytes] | None = None
        self.changes: dict[str, object] = {}
        book.seen.clear()
        book.answer = self.answer

    def answer(self, request: Request) -> None:
        if request.path == CA_PATH:
            request.reply(200, self.ca)
            return
        assert request.path == ENROL_PATH
        asked = msgspec.json.decode(request.read_body(), type=EnrolRequest)
        self.requests.append(asked)
        if self.refusal is not None:
            request.reply(*self.refusal)
        else:
            response = self.authority.response(asked.csr, image_root=IMAGE_ROOT, **self.changes)
            request.reply(200, msgspec.json.encode(response))

    def token(self, *, image_root: bytes = IMAGE_ROOT, authority: Authority | None = None) -> str:
        pin = key_pin((authority or self.authority).certificate)
        return str(
            EnrolmentToken(id="0a1b2c3d", secret="s" * 24, ca_key_sha256=pin, image_root_sha256=pin_of(image_root))
        )


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def running(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Book]:
    with https_server(authority.server_tls(tmp_path_factory.mktemp("tls"))) as book:
        yield book


@pytest.fixture
def fleet(running: Book, authority: Authority) -> FleetServer:
    return FleetServer(running, authority)


@pytest.fixture
def files(tmp_path: Path) -> IdentityFolder:
    return IdentityFolder(tmp_path / "identity")


def try_enrol(
    fleet: FleetServer, files: IdentityFolder, *, token: str = "", device: str = "cam-7", force: bool = False
) -> None:
    enrol(
        token=token or fleet.token(),
        device=device,
        server=HttpsEnrolment(fleet.book.url, read_timeout=2.0),
        credentials=files,
        force=force,
    )


def test_a_device_with_a_good_token_becomes_a_member(fleet: FleetServer, files: IdentityFolder) -> None:
    try_enrol(fleet, files)

    identity = files.load()
    assert (identity.device, identity.settings.server, identity.image_root) == ("cam-7", fleet.book.url, IMAGE_ROOT)
    assert [(asked.token_id, asked.device) for asked in fleet.requests] == [("0a1b2c3d", "cam-7")]


@pytest.mark.parametrize("device", ["server", "Cam-7", "cam/7", ""])
def test_an_illegal_name_is_found_before_anything_is_sent(
    fleet: FleetServer, files: IdentityFolder, device: str
) -> None:
    with pytest.raises(Trouble, match="device id"):
        try_enrol(fleet, files, device=device)

    assert fleet.book.seen == []


def test_a_token_that_was_not_copied_whole_is_found_before_anything_is_sent(
    fleet: FleetServer, files: IdentityFolder
) -> None:
    with pytest.raises(Trouble, match="copy it whole"):
        try_enrol(fleet, files, token=fleet.token()[:-1])

    assert fleet.book.seen == []


def test_a_wrong_ca_pin_says_so_before_the_secret_is_sent(fleet: FleetServer, files: IdentityFolder) -> None:
    with pytest.raises(Trouble, match="Somebody may be between"):
        try_enrol(fleet, files, token=fleet.token(authority=Authority()))

    assert fleet.requests == []


def test_a_man_in_the_middle_who_shows_the_true_ca_gets_no_secret(
    authority: Authority, files: IdentityFolder, tmp_path: Path
) -> None:
    """The CA is public: whoever is in the middle can pass it on, but cannot speak TLS in its name."""
    with https_server(Authority().server_tls(tmp_path / "tls")) as book:
        middle = FleetServer(book, authority)

        with pytest.raises(Weather, match="CERTIFICATE_VERIFY_FAILED"):
            try_enrol(middle, files)

    assert middle.requests == []


def test_a_wrong_image_root_is_not_stored(fleet: FleetServer, files: IdentityFolder) -> None:
    with pytest.raises(Trouble, match="Image repository"):
        try_enrol(fleet, files, token=fleet.token(image_root=b"another"))

    assert not files.enrolled()


def test_another_ca_in_the_answer_is_not_stored(fleet: FleetServer, files: IdentityFolder) -> None:
    fleet.changes = {"ca": Authority().pem}

    with pytest.raises(Trouble, match="CA is not the one"):
        try_enrol(fleet, files)

    assert not files.enrolled()


def said(error: str, remedy: str = "") -> bytes:
    return msgspec.json.encode(DeviceApiError(error=error, remedy=remedy))


REFUSALS: list[tuple[str, tuple[int, bytes], str, str]] = [
    ("no trust roots yet", (409, b"conflict"), "409", "keys init"),
    ("the id exists", (409, said("cam-7 exists", "open it first")), "cam-7 exists", "open it first"),
    ("token used up", (403, said("the token is used up")), "used up", "new token"),
    ("token unknown", (401, b""), "401", "new token"),
    ("not the device port", (404, b"<html>"), "404", "device port"),
    ("answer of another kind", (200, b"<html>"), "something else", "device port"),
    ("endless answer", (200, b" " * 70_000), "over the cap", "device port"),
]


@pytest.mark.parametrize(("answer", "says", "remedy"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_a_refusal_says_what_to_do(
    fleet: FleetServer, files: IdentityFolder, answer: tuple[int, bytes], says: str, remedy: str
) -> None:
    fleet.refusal = answer

    with pytest.raises(Trouble, match=says) as trouble:
        try_enrol(fleet, files)

    assert remedy in trouble.value.remedy


def test_a_ca_that_is_no_certificate_is_trouble(fleet: FleetServer, files: IdentityFolder) -> None:
    fleet.ca = b"hello"

    with pytest.raises(Trouble, match="not a certificate"):
        try_enrol(fleet, files)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_weather(fleet: FleetServer, files: IdentityFolder, status: int) -> None:
    fleet.refusal = (status, b"")

    with pytest.raises(Weather, match=str(status)):
        try_enrol(fleet, files)


def test_an_unreachable_server_is_weather(fleet: FleetServer, files: IdentityFolder) -> None:
    with pytest.raises(Weather, match="did not answer"):
        enrol(token=fleet.token(), device="cam-7", server=HttpsEnrolment("https://127.0.0.1:1"), credentials=files)


def test_a_half_done_enrolment_is_repeated_with_the_same_key(fleet: FleetServer, files: IdentityFolder) -> None:
    fleet.refusal = (503, b"")
    with pytest.raises(Weather):
        try_enrol(fleet, files)
    fleet.refusal = None

    try_enrol(fleet, files)

    first, second = (request.csr for request in fleet.requests)
    assert key_of(first) == key_of(second)


def key_of(csr: str) -> object:
    from cryptography import x509

    return x509.load_pem_x509_csr(csr.encode()).public_key()


def test_an_enrolled_device_is_left_alone_unless_forced(fleet: FleetServer, files: IdentityFolder) -> None:
    try_enrol(fleet, files)
    with pytest.raises(Trouble, match="already enrolled"):
        try_enrol(fleet, files)
    assert len(fleet.requests) == 1

    try_enrol(fleet, files, force=True)

    assert key_of(fleet.requests[0].csr) != key_of(fleet.requests[1].csr)
    assert files.load().key.public_key() == key_of(fleet.requests[1].csr)


def test_a_power_cut_in_mid_store_leaves_the_old_identity_whole(
    fleet: FleetServer, files: IdentityFolder, tmp_path: Path
) -> None:
    """New and old files are never taken for one identity, and the request is made again with the same new key."""
    try_enrol(fleet, files)
    blocked = tmp_path / "identity" / "director_root-1.json"
    blocked.mkdir()  # the write of this file fails, as if the power went

    with pytest.raises(Trouble):
        try_enrol(fleet, files, force=True)

    assert files.load().key.public_key() == key_of(fleet.requests[0].csr)
    blocked.rmdir()
    try_enrol(fleet, files, force=True)
    assert files.load().key.public_key() == key_of(fleet.requests[1].csr) == key_of(fleet.requests[2].csr)


# ---------------------------------------------------------------- attacks on an enrolment, and accidents
def test_a_man_in_the_middle_who_puts_a_ca_of_his_own_beside_the_true_one_gets_no_secret(
    authority: Authority, files: IdentityFolder, tmp_path: Path
) -> None:
    """A list of CAs may hold the pinned one; that makes the others no better."""
    liar = Authority()
    with https_server(liar.server_tls(tmp_path / "tls")) as book:
        middle = FleetServer(book, authority)
        middle.ca = (authority.pem + liar.pem).encode()

        with pytest.raises(Weather, match="CERTIFICATE_VERIFY_FAILED"):
            try_enrol(middle, files)

    assert middle.requests == []


def test_a_device_learns_the_next_ca_at_its_enrolment(fleet: FleetServer, files: IdentityFolder) -> None:
    following = Authority(name="Next CA")
    fleet.ca = (fleet.authority.pem + following.pem).encode()
    fleet.changes = {"ca": fleet.ca.decode()}

    try_enrol(fleet, files)

    assert files.holds(following.pem + fleet.authority.pem)


def test_a_clock_ten_years_behind_does_not_hinder_an_enrolment(
    authority: Authority, files: IdentityFolder, tmp_path: Path
) -> None:
    """For such a clock, the server's certificate is of the future; the pinned CA dates nothing ahead."""
    with https_server(authority.server_tls(tmp_path / "tls", starts_in_days=3650)) as book:
        try_enrol(FleetServer(book, authority), files)

    assert files.enrolled()


def test_a_clock_ten_years_ahead_is_named_and_nothing_is_sent(
    authority: Authority, files: IdentityFolder, tmp_path: Path
) -> None:
    """For such a clock the server's certificate has expired, and nobody can tell that from one that has."""
    with https_server(authority.server_tls(tmp_path / "tls", expired=True)) as book:
        server = FleetServer(book, authority)

        with pytest.raises(Weather, match="By the clock of this device it is"):
            try_enrol(server, files)

    assert server.requests == []


def test_a_fleet_token_with_the_pin_of_another_fleet_is_worth_nothing(
    fleet: FleetServer, files: IdentityFolder
) -> None:
    with pytest.raises(Trouble, match="token is of another server"):
        try_enrol(fleet, files, token=fleet.token(authority=Authority(name="another fleet's")))

    assert fleet.requests == []
