"""Who this device is: its key, its certificate, and what it trusts, in one folder.

Keys are made here, never leave, and are never overwritten. An identity is a *generation* of files: of the first,
``key.pem``, ``cert.pem`` and so on, those of generation 2 ``key-2.pem`` …. ``identity.json`` says which generation
counts, and is replaced in one step after all of the others are on the disk: whenever the power goes, the device has
one whole identity, the old or the new. The next generation's key is made before anybody is asked to sign it and is
kept until its certificate is there, so a request can be made again with the same key.

From these files come the CSR, the short-lived tokens of the device's HTTPS requests, and the TLS contexts, which
trust the fleet's own CAs and nobody else. How they got here is told by `agent/enrolment.py` and `agent/renewing.py`.
"""

import hashlib
import os
import re
import secrets
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

from agent.adapters.atomic_file import flush_folder, read_capped, remove_durably, remove_leftovers, write_atomically
from agent.core.renewal import Lease
from agent.ports import Trouble
from protocol.device_api import AUDIENCE, JWT_ALGORITHM, MAX_TOKEN_LIFE, EnrolResponse, RenewResponse

KEY, CERTIFICATE, CA, SETTINGS = "key.pem", "cert.pem", "ca.pem", "identity.json"
IMAGE_ROOT, DIRECTOR_ROOT = "image_root.json", "director_root.json"
_FILES = (KEY, CERTIFICATE, CA, IMAGE_ROOT, DIRECTOR_ROOT)  # of a generation

_MAX_FILE = 512_000  # bytes; python-tuf's own cap on a root, the largest of these files
_PUBLIC = 0o644
_READABLE_BY_OTHERS = 0o077
_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL; the ssl module has no name for it
_ENROL = "Enrol this device with `edgewarden-agent enroll`"
_AGAIN = "Let an operator open this id, then enrol again with `edgewarden-agent enroll --force`"
_PEM = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
_GENERATION = re.compile(r"(?:key|cert|ca|image_root|director_root)(?:-([0-9]{1,9}))?\.(?:pem|json)")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``identity.json``: what is neither key nor certificate."""

    device: str
    server: str  # https://host:port
    broker_host: str
    broker_port: int
    labels: dict[str, str] = {}
    generation: int = 0  # of the other files


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A completed enrolment, loaded and checked."""

    settings: Settings
    image_root: bytes
    director_root: bytes
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    ca: str  # PEM of every CA that is trusted
    folder: Path

    @property
    def device(self) -> str:
        """Return the device id: certificate CN, MQTT user and client id."""
        return self.settings.device

    @property
    def lease(self) -> Lease:
        """Return from when until when the certificate counts."""
        return Lease(
            start=int(self.certificate.not_valid_before_utc.timestamp()) * 1000,
            end=int(self.certificate.not_valid_after_utc.timestamp()) * 1000,
            chance=int.from_bytes(self.certificate.fingerprint(hashes.SHA256())[:4], "big") / 2**32,
        )

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
        generation = self.settings.generation
        context.load_cert_chain(self.folder / _name(CERTIFICATE, generation), self.folder / _name(KEY, generation))
        return context

    def server_tls(self, *, check_time: bool = True) -> ssl.SSLContext:
        """Return the context for the HTTPS port; see `broker_tls` for ``check_time``."""
        context = context_for(self.ca)
        return context if check_time else without_time(context)


class IdentityFolder:
    """The files (port `Credentials`). Private ones are readable by the agent's user only."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made when the first file is written."""
        self._folder = folder

    def enrolled(self) -> bool:
        return (self._folder / SETTINGS).exists()

    def request(self, device: str) -> str:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        key = self._own_key(self._next_generation())
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        return csr.public_bytes(serialization.Encoding.PEM).decode()

    def pinned(self, ca: str, pin: str) -> str | None:
        found = [
            pem for pem in _PEM.findall(ca) or [ca] if key_pin(_parse_certificate(pem, "the server's CA")) == pin
        ]
        return found[0] if found else None

    def holds(self, ca: str) -> bool:
        return _certificates(ca, "the server's CAs") == _certificates(self.load().ca, CA)

    def accept(self, device: str, server: str, response: EnrolResponse) -> None:
        settings = Settings(
            device=device,
            server=server,
            broker_host=response.broker_host,
            broker_port=response.broker_port,
            labels=response.labels,
            generation=self._next_generation(),
        )
        self._store(settings, response.certificate, response.ca, response.image_root, response.director_root)

    def renew(self, response: RenewResponse) -> None:
        now = self.load()
        settings = msgspec.structs.replace(now.settings, generation=self._next_generation())
        self._store(settings, response.certificate, response.ca, now.image_root, now.director_root)

    def tidy(self) -> None:
        """Remove files of generations that count no more; the next one's key may be waiting for its certificate."""
        current = self._settings().generation
        for path in self._folder.iterdir():
            if (generation := _generation_of(path.name)) is not None and generation < current:
                remove_durably(path)

    def load(self) -> Identity:
        """Return the identity; raise `Trouble` when there is none, or when its files do not fit each other."""
        if not self.enrolled():
            raise Trouble(f"this device is not enrolled: there is no {self._folder / SETTINGS}", remedy=_ENROL)
        settings = self._settings()
        key_name, certificate_name, ca_name, *roots = (_name(name, settings.generation) for name in _FILES)
        key = _parse_key(self._read_private(key_name), self._folder / key_name)
        certificate = _parse_certificate(self._read(certificate_name).decode("ascii", "replace"), certificate_name)
        ca = self._read(ca_name).decode("ascii", "replace")
        _check_certificate(certificate, ca, key, settings.device)
        image_root, director_root = (self._read_root(name) for name in roots)
        return Identity(
            settings=settings,
            image_root=image_root,
            director_root=director_root,
            key=key,
            certificate=certificate,
            ca=ca,
            folder=self._folder,
        )

    def _store(self, settings: Settings, certificate: str, ca: str, image_root: bytes, director_root: bytes) -> None:
        """Store a generation whose key is there already, and then let it count."""
        key = self._own_key(settings.generation)
        _check_certificate(
            _parse_certificate(certificate, "the certificate from the server"), ca, key, settings.device
        )
        remove_leftovers(self._folder)  # of an enrolment or renewal that was cut short
        for name, data in (
            (CERTIFICATE, certificate.encode()),
            (CA, ca.encode()),
            (IMAGE_ROOT, image_root),
            (DIRECTOR_ROOT, director_root),
        ):
            self._write(_name(name, settings.generation), data)
        self._write(SETTINGS, msgspec.json.format(msgspec.json.encode(settings), indent=2))

    def _next_generation(self) -> int:
        """Return the generation after the one that counts; if none is known to, after all with a certificate."""
        if not self.enrolled():
            return 0  # with the key of an enrolment that was cut short, if there is one
        with suppress(Trouble):
            return self._settings().generation + 1
        names = [path.name for path in self._folder.glob("cert*.pem")]
        return max((known for name in names if (known := _generation_of(name)) is not None), default=-1) + 1

    def _settings(self) -> Settings:
        try:
            return msgspec.json.decode(self._read(SETTINGS), type=Settings)
        except msgspec.DecodeError as error:
            raise Trouble(f"{self._folder / SETTINGS} is damaged: {error}", remedy=_AGAIN) from error

    def _own_key(self, generation: int) -> ec.EllipticCurvePrivateKey:
        path = self._folder / _name(KEY, generation)
        if not path.exists():
            self._make_key(path)
        return _parse_key(self._read_private(path.name), path)

    def _make_key(self, path: Path) -> None:
        _make_folder(self._folder)
        pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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

    def _read_root(self, name: str) -> bytes:
        data = self._read(name)
        try:
            msgspec.json.decode(data)  # what it says is for TUF to judge
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Trouble(f"{self._folder / name} is damaged: {error}", remedy=_AGAIN) from error
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


def without_time(context: ssl.SSLContext) -> ssl.SSLContext:
    """Have a context believe certificates whatever their dates say; for a clock that is known to be wrong."""
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    return context


def key_pin(certificate: x509.Certificate) -> str:
    """Return the SHA-256 (hex) of a certificate's SubjectPublicKeyInfo, DER."""
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def _name(file: str, generation: int) -> str:
    """Return the name of a generation's file."""
    stem, dot, kind = file.rpartition(".")
    return f"{stem}-{generation}{dot}{kind}" if generation else file


def _generation_of(name: str) -> int | None:
    """Return the generation of a file of ours."""
    match = _GENERATION.fullmatch(name)
    return None if match is None else int(match[1] or 0)


def _check_certificate(certificate: x509.Certificate, ca: str, key: ec.EllipticCurvePrivateKey, device: str) -> None:
    names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device]:
        raise Trouble(f"the certificate is for {names}, this device is {device!r}", remedy=_AGAIN)
    if certificate.public_key() != key.public_key():
        raise Trouble("the certificate is for another key than this device's", remedy=_AGAIN)
    if not any(_issued(certificate, one) for one in _certificates(ca, CA)):
        raise Trouble("the certificate was not issued by the server's CA", remedy=_AGAIN)


def _issued(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _certificates(pem: str, what: str) -> frozenset[x509.Certificate]:
    """Return every certificate of a text; raise `Trouble` when there is none."""
    return frozenset(_parse_certificate(one, what) for one in _PEM.findall(pem) or [pem])


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
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in missing:
            flush_folder(place.parent)
    except OSError as error:
        raise Trouble(f"cannot make {folder}: {error}", remedy="Check who owns the folder above it") from error
