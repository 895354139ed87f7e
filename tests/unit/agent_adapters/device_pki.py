"""A fleet's certificate authority for tests: its CA, server certificates for 127.0.0.1, device certificates."""

import datetime as dt
import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protocol.device_api import EnrolResponse

_TODAY = dt.datetime.now(dt.timezone.utc)
_DAY = dt.timedelta(days=1)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@dataclass
class Authority:
    """A CA with a key of its own."""

    name: str = "Test fleet CA"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        builder = self._builder(_name(self.name), self.key.public_key(), _TODAY - _DAY, _TODAY + 3650 * _DAY)
        self.certificate = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True).sign(
            self.key, hashes.SHA256()
        )

    @property
    def pem(self) -> str:
        return _pem(self.certificate)

    def server_files(
        self, folder: Path, *, host: str = "127.0.0.1", expired: bool = False, starts_in_days: int = -30
    ) -> tuple[Path, Path]:
        """Write certificate and key of a server; return their paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        start = _TODAY + starts_in_days * _DAY
        end = _TODAY - _DAY if expired else start + 60 * _DAY
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        certificate = (
            self._builder(_name("server"), key.public_key(), start, end)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "server.pem").write_text(_pem(certificate))
        (folder / "server.key").write_bytes(key_pem(key))
        return folder / "server.pem", folder / "server.key"

    def server_tls(self, folder: Path, **changes: object) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server_files(folder, **changes))  # type: ignore[arg-type]  # passed on as given
        return context

    def client_tls(self, folder: Path, name: str, server_ca: str) -> ssl.SSLContext:
        """Return a TLS context for a client of this CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(_name(name)).sign(key, hashes.SHA256())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "client.pem").write_text(self.sign(csr.public_bytes(serialization.Encoding.PEM).decode()))
        (folder / "client.key").write_bytes(key_pem(key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=server_ca)
        context.load_cert_chain(folder / "client.pem", folder / "client.key")
        return context

    def sign(self, csr: str, *, device: str | None = None) -> str:
        """Return a device's certificate; ``device`` overrides the name that the CSR asks for."""
        request = x509.load_pem_x509_csr(csr.encode())
        assert request.is_signature_valid
        subject = _name(device) if device else request.subject
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        certificate = (
            self._builder(subject, request.public_key(), _TODAY - _DAY, _TODAY + 365 * _DAY)
            .add_extension(usage, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _pem(certificate)

    def response(self, csr: str, **changes: object) -> EnrolResponse:
        parts: dict[str, object] = {
            "certificate": self.sign(csr),
            "ca": self.pem,
            "image_root": b'{"signed": {"version": 1}}',
            "director_root": b'{"signed": {"version": 1, "of": "director"}}',
            "broker_host": "127.0.0.1",
            "broker_port": 8883,
            "labels": {"site": "oslo"},
        }
        return EnrolResponse(**{**parts, **changes})  # type: ignore[arg-type]  # a test's table of changes

    def _builder(
        self, subject: x509.Name, key: object, start: dt.datetime, end: dt.datetime
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(_name(self.name))
            .public_key(key)  # type: ignore[arg-type]  # the library's own union of key types
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
