import stat
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from device_pki import Authority, key_pem
from https_server import https_server

from agent.adapters.https import HttpsServer
from agent.adapters.identity import IdentityFolder
from agent.ports import Trouble, Weather
from protocol.device_api import AUDIENCE, MAX_TOKEN_LIFE

NOW = 1_790_000_000_000


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "identity"


def enrolled(folder: Path, authority: Authority) -> IdentityFolder:
    files = IdentityFolder(folder)
    files.accept("cam-7", "https://fleet:8443", authority.response(files.request("cam-7")))
    return files


def test_the_key_is_made_once_and_only_its_owner_reads_it(folder: Path) -> None:
    files = IdentityFolder(folder)
    first = x509.load_pem_x509_csr(files.request("cam-7").encode())
    key = (folder / "key.pem").read_bytes()
    second = x509.load_pem_x509_csr(files.request("cam-7").encode())

    assert (folder / "key.pem").read_bytes() == key
    assert first.public_key() == second.public_key()
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["key.pem"]


def test_the_request_names_the_device_and_proves_the_key(folder: Path) -> None:
    csr = x509.load_pem_x509_csr(IdentityFolder(folder).request("cam-7").encode())

    assert [name.value for name in csr.subject] == ["cam-7"]
    assert csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "cam-7"
    assert csr.is_signature_valid
    assert isinstance(csr.public_key(), ec.EllipticCurvePublicKey)


def test_what_was_accepted_is_loaded_again(folder: Path, authority: Authority) -> None:
    identity = enrolled(folder, authority).load()

    assert identity.device == "cam-7"
    assert (identity.settings.server, identity.settings.broker_port) == ("https://fleet:8443", 8883)
    assert identity.settings.labels == {"site": "oslo"}
    assert identity.image_root == b'{"signed": {"version": 1}}'
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.pem",
        "cert.pem",
        "director_root.json",
        "identity.json",
        "image_root.json",
        "key.pem",
    ]


def test_a_token_is_short_lived_and_signed_by_the_device(folder: Path, authority: Authority) -> None:
    identity = enrolled(folder, authority).load()

    claims = jwt.decode(
        identity.token(NOW),
        identity.key.public_key(),
        algorithms=["ES256"],
        audience=AUDIENCE,
        options={"verify_exp": False, "verify_iat": False},
    )

    issued = NOW // 1000
    assert claims == {"iss": "cam-7", "aud": AUDIENCE, "iat": issued, "exp": issued + MAX_TOKEN_LIFE}


# ---------------------------------------------------------------- certificates that are not accepted
def test_a_certificate_for_another_name_is_not_stored(folder: Path, authority: Authority) -> None:
    files = IdentityFolder(folder)
    csr = files.request("cam-7")

    with pytest.raises(Trouble, match="cam-8"):
        files.accept("cam-7", "https://x", authority.response(csr, certificate=authority.sign(csr, device="cam-8")))

    assert not files.enrolled()


def test_a_certificate_for_another_key_is_not_stored(folder: Path, tmp_path: Path, authority: Authority) -> None:
    other = IdentityFolder(tmp_path / "other").request("cam-7")
    files = IdentityFolder(folder)
    files.request("cam-7")

    with pytest.raises(Trouble, match="another key"):
        files.accept("cam-7", "https://x", authority.response(other))


def test_a_certificate_from_another_ca_is_not_stored(folder: Path, authority: Authority) -> None:
    files = IdentityFolder(folder)
    response = Authority().response(files.request("cam-7"), ca=authority.pem)

    with pytest.raises(Trouble, match="not issued"):
        files.accept("cam-7", "https://x", response)


# ---------------------------------------------------------------- folders that cannot be loaded
def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def open_to_all(folder: Path) -> None:
    (folder / "key.pem").chmod(0o644)


P384 = key_pem(ec.generate_private_key(ec.SECP384R1()))
OTHER_KEY = key_pem(ec.generate_private_key(ec.SECP256R1()))

FAULTS: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("never enrolled", remove("identity.json"), "not enrolled", "enroll"),
    ("key gone", remove("key.pem"), "key.pem is missing", "--force"),
    ("certificate gone", remove("cert.pem"), "cert.pem is missing", "--force"),
    ("root gone", remove("image_root.json"), "image_root.json is missing", "--force"),
    ("settings cut short", write("identity.json", b'{"device":'), "damaged", "--force"),
    ("certificate cut short", write("cert.pem", b"-----BEGIN"), "cert.pem is not a certificate", "--force"),
    ("CA is binary", write("ca.pem", b"\xff\xfe"), "ca.pem is not a certificate", "--force"),
    ("key is not a key", write("key.pem", b"secret"), "not a private key", "Move"),
    ("key of another kind", write("key.pem", P384), "P-256", "Move"),
    ("key of another device", write("key.pem", OTHER_KEY), "another key", "--force"),
    ("key for all to read", open_to_all, "other users", "chmod 600"),
]


@pytest.mark.parametrize(("spoil", "says", "remedy"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_folder_that_cannot_be_used_says_why_and_what_to_do(
    folder: Path, authority: Authority, spoil: Callable[[Path], None], says: str, remedy: str
) -> None:
    files = enrolled(folder, authority)
    spoil(folder)

    with pytest.raises(Trouble, match=says) as trouble:
        files.load()

    assert remedy in trouble.value.remedy


# ---------------------------------------------------------------- TLS
def test_an_expired_certificate_passes_only_while_the_clock_is_known_to_be_wrong(
    folder: Path, tmp_path: Path, authority: Authority
) -> None:
    identity = enrolled(folder, authority).load()
    with https_server(authority.server_tls(tmp_path / "tls", expired=True)) as server:
        server.answer = lambda request: request.reply(200, b"hello")
        lenient, strict = identity.server_tls(check_time=False), identity.server_tls()
        relaxed = HttpsServer(server.url, tls=lambda: lenient)
        with relaxed.open("/") as response:
            assert relaxed.read(response, 100, "it") == b"hello"
        relaxed.close()
        with pytest.raises(Weather, match="expired"), HttpsServer(server.url, tls=lambda: strict).open("/"):
            pass


def test_a_server_of_another_ca_is_not_talked_to_even_without_the_time(
    folder: Path, tmp_path: Path, authority: Authority
) -> None:
    identity = enrolled(folder, authority).load()
    context = identity.server_tls(check_time=False)
    with https_server(Authority().server_tls(tmp_path / "tls")) as server:
        stranger = HttpsServer(server.url, tls=lambda: context)
        with pytest.raises(Weather, match="CERTIFICATE_VERIFY_FAILED"), stranger.open("/"):
            pass
        assert server.seen == []
