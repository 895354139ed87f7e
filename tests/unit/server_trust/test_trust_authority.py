"""Certificates: who gets one, and that they open what they should and nothing else."""

import socket
import ssl
import threading
from datetime import datetime, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from trust_world import DAY, World, make_csr, now_ms

from fleet_server.adapters.authority import CertificateAuthority, TlsFiles
from fleet_server.enrolment import BadRequest
from protocol.device_api import pin_of

P256 = ec.SECP256R1()


def test_a_device_certificate_names_the_device_and_lives_a_year(world: World) -> None:
    now = now_ms()
    certificate = x509.load_pem_x509_certificate(world.authority.sign(make_csr("cam-1"), "cam-1", now).encode())
    assert [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["cam-1"]
    assert certificate.not_valid_after_utc == datetime.fromtimestamp((now + 365 * DAY) // 1000, timezone.utc)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(world.authority.ca_certificate()))


def forged() -> str:
    """A CSR that was signed, then changed."""
    request = x509.load_pem_x509_csr(make_csr("cam-1").encode())
    der = request.public_bytes(Encoding.DER).replace(b"cam-1", b"cam-2")
    import base64

    return (
        "-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(der).decode()
        + "-----END CERTIFICATE REQUEST-----\n"
    )


BAD = [
    ("another name", make_csr("cam-2"), "cam-1", "common name"),
    ("two names", make_csr("", names=("cam-1", "cam-2")), "cam-1", "common name"),
    ("a slash, as if it were a topic", make_csr("cam-1/up"), "cam-1/up", "not legal"),
    ("a wildcard", make_csr("+"), "+", "not legal"),
    ("the server's own name", make_csr("server"), "server", "reserved"),
    ("capital letters", make_csr("Cam"), "Cam", "not legal"),
    ("another curve", make_csr("cam-1", key=ec.generate_private_key(ec.SECP384R1())), "cam-1", "P-256"),
    ("RSA", make_csr("cam-1", key=rsa.generate_private_key(65537, 2048)), "cam-1", "P-256"),
    ("changed after signing", forged(), "cam-2", "not signed by its own key"),
    ("no CSR", "hello", "cam-1", "cannot be read"),
    ("far too long", "x" * 100_000, "cam-1", "over the cap"),
]


@pytest.mark.parametrize(("csr", "device", "reason"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_csr_that_is_not_that_devices_is_refused(world: World, csr: str, device: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        world.authority.sign(csr, device, now_ms())


def test_the_authority_stays_the_same_over_a_restart(world: World) -> None:
    before = (world.authority.ca_certificate(), world.authority.ca_key_sha256())
    world.restart()
    assert (world.authority.ca_certificate(), world.authority.ca_key_sha256()) == before


def test_the_pin_is_the_hash_of_the_public_key_info(world: World) -> None:
    from cryptography.hazmat.primitives.serialization import PublicFormat

    ca = x509.load_pem_x509_certificate(world.authority.ca_certificate())
    spki = ca.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert world.authority.ca_key_sha256() == pin_of(spki)


def test_server_certificates_are_renewed_when_a_third_of_their_life_is_left_or_a_host_is_new(tmp_path: Path) -> None:
    now = now_ms()
    authority = CertificateAuthority(tmp_path, hosts=("a.example",), now=now)
    first = authority.server_files().certificate.read_bytes()
    assert not authority.renew(now + 240 * DAY)
    assert authority.server_files().certificate.read_bytes() == first
    assert authority.renew(now + 245 * DAY)
    assert authority.server_files().certificate.read_bytes() != first
    CertificateAuthority(tmp_path, hosts=("a.example", "10.0.0.7"), now=now + 245 * DAY)
    names = x509.load_pem_x509_certificate(authority.server_files().certificate.read_bytes())
    san = names.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(san.get_values_for_type(x509.DNSName)) == {"a.example", "localhost"}
    assert {str(a) for a in san.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "127.0.0.1", "::1"}


def test_a_damaged_server_certificate_is_made_anew_at_start(world: World) -> None:
    path = world.authority.server_files().certificate
    path.write_text("damaged")
    world.restart()
    x509.load_pem_x509_certificate(path.read_bytes())


# ---------------------------------------------------------------- over real TLS
def device_files(world: World, folder: Path) -> TlsFiles:
    key = ec.generate_private_key(P256)
    files = TlsFiles(certificate=folder / "d.pem", key=folder / "d.key", ca=folder / "authority/device-ca.pem")
    files.certificate.write_text(world.authority.sign(make_csr("cam-1", key=key), "cam-1", now_ms()))
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def shake_hands(server: TlsFiles, client: TlsFiles, name: str) -> str:
    """Return "ok" or the reason why one of the two hung up."""
    accept = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(server.ca))
    accept.verify_mode = ssl.CERT_REQUIRED
    accept.load_cert_chain(server.certificate, server.key)
    connect = ssl.create_default_context(cafile=str(client.ca))
    connect.load_cert_chain(client.certificate, client.key)
    ours, theirs = socket.socketpair()
    outcome: list[str] = []

    def serve() -> None:
        try:
            with accept.wrap_socket(ours, server_side=True) as tls:
                tls.recv(1)
                outcome.append("ok")
        except OSError as error:
            outcome.append(getattr(error, "verify_message", None) or str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with connect.wrap_socket(theirs, server_hostname=name) as tls:
            tls.send(b"x")
    except ssl.SSLCertVerificationError as error:
        outcome.insert(0, error.verify_message)
    except OSError:
        pass  # the server's side says why
    finally:
        thread.join()
        ours.close()
        theirs.close()
    return outcome[0]


def test_a_device_and_the_server_trust_each_other(world: World) -> None:
    device = device_files(world, world.folder)
    for name in ("fleet.example", "localhost", "127.0.0.1"):
        assert shake_hands(world.authority.server_files(), device, name) == "ok", name
    assert "mismatch" in shake_hands(world.authority.server_files(), device, "elsewhere.example")


def test_a_device_certificate_neither_opens_the_admin_listener_nor_passes_for_a_server(world: World) -> None:
    device = device_files(world, world.folder)
    admin = world.authority.broker_admin_files()
    onto_admin = TlsFiles(certificate=device.certificate, key=device.key, ca=admin.ca)
    assert shake_hands(admin, onto_admin, "localhost") != "ok"
    assert "purpose" in shake_hands(device, device, "localhost")
    assert shake_hands(admin, world.authority.admin_client_files(), "127.0.0.1") == "ok"
