"""Who this device is: its key, its certificate, and what it trusts, in one folder.

``key.pem`` is made here, never leaves, and is never overwritten. ``identity.json`` is written last: where it stands,
enrolment was completed. From these files come the CSR, the short-lived tokens of the device's HTTPS requests, and the
TLS contexts, which trust the fleet's own CA and nobody else. How the files got here is `agent/enrolment.py`'s story.
"""

import hashlib
import os
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import jwt
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.adapters.atomic_file import flush_folder, read_capped, remove_durably, write_atomically
from agent.ports import Trouble
from protocol.device_api import AUDIENCE, JWT_ALGORITHM, MAX_TOKEN_LIFE, EnrolResponse

KEY, CERTIFICATE, CA, SETTINGS = "key.pem", "cert.pem", "ca.pem", "identity.json"
IMAGE_ROOT, DIRECTOR_ROOT = "image_root.json", "director_root.json"

_MAX_FILE = 512_000  # bytes; python-tuf's own cap on a root, the largest of these files
_PUBLIC = 0o644
_READABLE_BY_OTHERS = 0o077
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL; the ssl module has no name for it
_ENROL = "Enrol this device with `edgewarden-agent enroll`"
_AGAIN = "Enrol again with `edgewarden-agent enroll --force`; the key is kept"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``identity.json``: what is neither key nor certificate."""

    device: str
    server: str  # https://host:port
    broker_host: str
    broker_port: int
    labels: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A completed enrolment, loaded and checked."""

    settings: Settings
    image_root: bytes
    director_root: bytes
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    ca: str  # PEM
    folder: Path

    @property
    def device(self) -> str:
        """Return the device id: certificate CN, MQTT user and client id."""
        return self.settings.device

    def token(self, now: int) -> str:
        """Return the bearer token for a request made at ``now`` (UTC ms)."""
        issued = now // 1000
        claims = {"iss": self.device, "aud": AUDIENCE, "iat": issued, "exp": issued + MAX_TOKEN_LIFE}
        return jwt.encode(claims, self.key, algorithm=JWT_ALGORITHM)

    def broker_tls(self, *, check_time: bool = True) -> ssl.SSLContext:
        """Return the context for the broker: mutual TLS.

        ``check_time=False`` is for a clock that is known to be wrong: the pinned CA is checked as ever, but not the
        days between which its certificates count.
        """
        context = self.server_tls(check_time=check_time)
        context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        return context

    def server_tls(self, *, check_time: bool = True) -> ssl.SSLContext:
        """Return the context for the HTTPS port; see `broker_tls` for ``check_time``."""
        context = context_for(self.ca)
        if not check_time:
            context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
        return context


class IdentityFolder:
    """The files (port `Credentials`). Private ones are readable by the agent's user only."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when the first file is written."""
        self._folder = folder

    def enrolled(self) -> bool:
        return (self._folder / SETTINGS).exists()

    def request(self, device: str) -> str:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(self._own_key(), hashes.SHA256())
        return csr.public_bytes(serialization.Encoding.PEM).decode()

    def key_pin(self, certificate: str) -> str:
        return key_pin(_parse_certificate(certificate, "the server's CA"))

    def accept(self, device: str, server: str, response: EnrolResponse) -> None:
        certificate = _parse_certificate(response.certificate, "the certificate from the server")
        ca = _parse_certificate(response.ca, "the server's CA")
        _check_certificate(certificate, ca, self._own_key(), device)
        settings = Settings(
            device=device,
            server=server,
            broker_host=response.broker_host,
            broker_port=response.broker_port,
            labels=response.labels,
        )
        # Without identity.json the folder counts as not enrolled, so a power cut cannot leave old and new mixed.
        remove_durably(self._folder / SETTINGS)
        self._write(CERTIFICATE, response.certificate.encode())
        self._write(CA, response.ca.encode())
        self._write(IMAGE_ROOT, response.image_root)
        self._write(DIRECTOR_ROOT, response.director_root)
        self._write(SETTINGS, msgspec.json.format(msgspec.json.encode(settings), indent=2))

    def load(self) -> Identity:
        """Return the identity; raise `Trouble` when there is none, or when its files do not fit each other."""
        if not self.enrolled():
            raise Trouble(f"this device is not enrolled: there is no {self._folder / SETTINGS}", remedy=_ENROL)
        settings = self._settings()
        key = _parse_key(self._read_private(KEY), self._folder / KEY)
        certificate = _parse_certificate(self._read(CERTIFICATE).decode("ascii", "replace"), CERTIFICATE)
        ca = self._read(CA).decode("ascii", "replace")
        _check_certificate(certificate, _parse_certificate(ca, CA), key, settings.device)
        return Identity(
            settings=settings,
            image_root=self._read(IMAGE_ROOT),
            director_root=self._read(DIRECTOR_ROOT),
            key=key,
            certificate=certificate,
            ca=ca,
            folder=self._folder,
        )

    def _settings(self) -> Settings:
        try:
            return msgspec.json.decode(self._read(SETTINGS), type=Settings)
        except msgspec.DecodeError as error:
            raise Trouble(f"{self._folder / SETTINGS} is damaged: {error}", remedy=_AGAIN) from error

    def _own_key(self) -> ec.EllipticCurvePrivateKey:
        path = self._folder / KEY
        if not path.exists():
            self._make_key(path)
        return _parse_key(self._read_private(KEY), path)

    def _make_key(self, path: Path) -> None:
        _make_folder(self._folder)
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fresh = path.with_name(f"{KEY}.new")
        write_atomically(fresh, pem)
        try:
            with suppress(FileExistsError):  # another process was faster: its key stands
                os.link(fresh, path)  # unlike a rename, this never replaces
            fresh.unlink()
            flush_folder(self._folder)
        except OSError as error:
            raise Trouble(f"cannot make {path}: {error}", remedy="Check the disk of the identity folder") from error

    def _write(self, name: str, data: bytes) -> None:
        _make_folder(self._folder)
        write_atomically(self._folder / name, data, mode=_PUBLIC)

    def _read(self, name: str) -> bytes:
        data = read_capped(self._folder / name, _MAX_FILE)
        if data is None:
            raise Trouble(f"{self._folder / name} is missing", remedy=_AGAIN)
        return data

    def _read_private(self, name: str) -> bytes:
        data = self._read(name)
        path = self._folder / name
        if path.stat().st_mode & _READABLE_BY_OTHERS:
            raise Trouble(f"{path} can be read by other users", remedy=f"Run `chmod 600 {path}`")
        return data


def context_for(ca: str) -> ssl.SSLContext:
    """Return a TLS client context that trusts this CA (PEM) and no other, and checks the host's name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError) as error:
        raise Trouble(f"the server's CA is not a certificate in PEM: {error}", remedy=_AGAIN) from error
    return context


def key_pin(certificate: x509.Certificate) -> str:
    """Return the SHA-256 (hex) of a certificate's SubjectPublicKeyInfo, DER."""
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def _check_certificate(
    certificate: x509.Certificate, ca: x509.Certificate, key: ec.EllipticCurvePrivateKey, device: str
) -> None:
    names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise Trouble(f"the certificate is for {names}, this device is {device!r}", remedy=_AGAIN)
    if certificate.public_key() != key.public_key():
        raise Trouble("the certificate is for another key than this device's", remedy=_AGAIN)
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise Trouble("the certificate was not issued by the server's CA", remedy=_AGAIN) from error


def _parse_certificate(pem: str, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise Trouble(f"{what} is not a certificate in PEM: {error}", remedy=_AGAIN) from error


def _parse_key(pem: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise Trouble(f"{path} is not a private key: {error}", remedy=_new_key(path)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Trouble(f"{path} is not an EC P-256 key", remedy=_new_key(path))
    return key


def _new_key(path: Path) -> str:
    return f"Move {path} away and enrol again with `edgewarden-agent enroll --force`: a new key will be made"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Trouble(f"cannot make {folder}: {error}", remedy="Check who owns the folder above it") from error
