"""The server's two certificate authorities, made at first start, and what they sign.

The *device CA* signs devices and the server's own certificate for HTTPS and the broker: it is what a device pins.
The *admin CA* signs both ends of the broker's loopback listener, so that no device certificate opens it.
All keys are EC P-256, files 0600. Knows X.509; who may enrol is decided by `fleet_server.enrolment`.

The device CA can be replaced: `make_next_ca` puts a *next* one beside it. From then on devices are signed by the next
and told of both, both are believed, and the server goes on showing the certificate of the first, which every device
knows. `retire_ca` makes the next one the first and only. Processes read files when they start, so each step is for a
server that does not run.
"""

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleet_server.adapters.durable import (
    PUBLIC,
    SECRET,
    flush_folder,
    make_private_folder,
    read_capped,
    write_atomically,
)
from fleet_server.enrolment import BadRequest
from fleet_server.ports import CertificateFacts
from protocol.names import IllegalName, check_device_id

CA_LIFE = timedelta(days=20 * 365)
LEAF_LIFE = timedelta(days=365)
RENEW_WHEN_LEFT = LEAF_LIFE / 3
BACKDATED = timedelta(days=1)  # clocks in the field run behind
ADMIN_NAME = "server"  # the server's user on the broker; reserved, so that no device can have it
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MAX_PEM = 16 * 1024
_CURRENT, _NEXT, _RETIRED = "device-ca", "device-ca-next", "device-ca-retired"
_TRUSTED = "device-cas"  # file of every device CA in force, for the broker


class RotationRefused(Exception):
    """A step of replacing the CA cannot be taken now; the text says why."""


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Paths of one end of a TLS connection."""

    certificate: Path
    key: Path
    ca: Path  # what the other end is verified with


class CertificateAuthority:
    """`ports.Authority` on a folder, with the server's own certificates beside it."""

    def __init__(self, folder: Path, *, hosts: Sequence[str], now: int, keep_leaves: bool = True) -> None:
        """Load or make everything. ``hosts`` are the names and addresses that devices may use for this server.

        Without ``keep_leaves`` the server's own certificates are left to whoever knows the hosts.
        """
        self._folder = make_private_folder(folder)
        self._hosts = tuple(dict.fromkeys([*hosts, *LOOPBACK]))
        _finish_retirement(folder)
        self._devices = _Ca.load_or_make(folder, _CURRENT, "Edgewarden devices", now)
        self._next = _Ca.load(folder, _NEXT)
        self._admin = _Ca.load_or_make(folder, "admin-ca", "Edgewarden broker administration", now)
        self._write_trusted()
        if keep_leaves:
            self.renew(now)

    def ca_certificate(self) -> bytes:
        return b"".join(ca.pem for ca in self._in_force())

    def ca_key_sha256(self) -> str:
        return _key_sha256(self._devices.certificate)

    def ca_ids(self) -> Sequence[str]:
        """Return the key identifier of every CA in force, as `facts` names them; the one that signs comes last."""
        return [ca.id for ca in self._in_force()]

    def facts(self, certificate: str) -> CertificateFacts:
        return facts_of(certificate)

    def revocation_list(self, retired: Sequence[str], now: int) -> bytes:
        """Return one CRL (PEM) per CA in force: a verifier that has a list for one CA wants one for each."""
        entries = [x509.load_pem_x509_certificate(pem.encode()) for pem in retired]
        return b"".join(ca.revocation_list(entries, now) for ca in self._in_force())

    # ------------------------------------------------------------ replacing the device CA
    def make_next_ca(self, now: int) -> str:
        """Make the CA that takes over, and return its key identifier; raise `RotationRefused`."""
        if self._next is not None:
            raise RotationRefused("a next CA is there already; retire the first one before making another")
        self._next = _Ca.load_or_make(self._folder, _NEXT, f"Edgewarden devices since {_time_of(now):%Y-%m-%d}", now)
        self._write_trusted()
        return self._next.id

    def retire_ca(self) -> None:
        """End the first CA: its key is destroyed, and the next one is the first; raise `RotationRefused`.

        The server's own certificates are those of the new first CA when they are renewed, at the latest at a start.
        """
        if self._next is None:
            raise RotationRefused("there is no next CA; make one first")
        # The old certificate's new name is the decision: `_finish_retirement` does the rest, now or after a crash.
        (self._folder / f"{_CURRENT}.pem").replace(self._folder / f"{_RETIRED}.pem")
        flush_folder(self._folder)
        _finish_retirement(self._folder)
        self._devices, self._next = self._next, None
        self._write_trusted()

    def _in_force(self) -> Sequence["_Ca"]:
        return [self._devices] if self._next is None else [self._devices, self._next]

    def _write_trusted(self) -> None:
        write_atomically(self._folder / f"{_TRUSTED}.pem", self.ca_certificate(), mode=PUBLIC)

    def sign(self, csr: str, device_id: str, now: int) -> str:
        request = _verified_request(csr)
        _check_subject(request, device_id)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise BadRequest("the CSR's key is not EC P-256")
        certificate = self._in_force()[-1].issue(device_id, key, ExtendedKeyUsageOID.CLIENT_AUTH, (), now)
        return certificate.public_bytes(Encoding.PEM).decode()

    def renew(self, now: int) -> bool:
        """Make anew what is missing, near its end, or lacks a host; tell whether anything changed.

        Listeners read certificates when they start, so after True they want a restart.
        """
        made = [
            self._keep_leaf("server", self._devices, ExtendedKeyUsageOID.SERVER_AUTH, self._hosts, now),
            self._keep_leaf("broker", self._admin, ExtendedKeyUsageOID.SERVER_AUTH, LOOPBACK, now),
            self._keep_leaf(ADMIN_NAME + "-admin", self._admin, ExtendedKeyUsageOID.CLIENT_AUTH, (), now),
        ]
        return any(made)

    def server_files(self) -> TlsFiles:
        """For HTTPS and the broker's device listener."""
        return self._files("server", _TRUSTED)

    def broker_admin_files(self) -> TlsFiles:
        """For the broker's end of the loopback listener."""
        return self._files("broker", "admin-ca")

    def admin_client_files(self) -> TlsFiles:
        """For the server's end of the loopback listener."""
        return self._files(ADMIN_NAME + "-admin", "admin-ca")

    def _files(self, name: str, ca: str) -> TlsFiles:
        return TlsFiles(
            certificate=self._folder / f"{name}.pem",
            key=self._folder / f"{name}.key",
            ca=self._folder / f"{ca}.pem",
        )

    def _keep_leaf(self, name: str, ca: "_Ca", usage: x509.ObjectIdentifier, hosts: Sequence[str], now: int) -> bool:
        path = self._folder / f"{name}.pem"
        if _still_good(path, ca, hosts, now) and (self._folder / f"{name}.key").exists():
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        subject = ADMIN_NAME if usage == ExtendedKeyUsageOID.CLIENT_AUTH else f"edgewarden-{name}"
        certificate = ca.issue(subject, key.public_key(), usage, hosts, now)
        path.unlink(missing_ok=True)  # a cut between the two writes must not pair an old certificate with a new key
        write_atomically(self._folder / f"{name}.key", _private_pem(key), mode=SECRET)
        write_atomically(path, certificate.public_bytes(Encoding.PEM), mode=PUBLIC)
        return True


@dataclass(frozen=True, kw_only=True)
class _Ca:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def id(self) -> str:
        return x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()).digest.hex()

    @classmethod
    def load(cls, folder: Path, name: str) -> "_Ca | None":
        """Return a CA that may not be there."""
        if not (folder / f"{name}.pem").exists():
            return None
        return cls.load_or_make(folder, name, "", 0)

    @classmethod
    def load_or_make(cls, folder: Path, name: str, title: str, now: int) -> "_Ca":
        key_path, path = folder / f"{name}.key", folder / f"{name}.pem"
        key = _load_or_make_key(key_path)
        pem = read_capped(path, _MAX_PEM)
        if pem is None:
            certificate = _self_signed(title, key, now)
            write_atomically(path, certificate.public_bytes(Encoding.PEM), mode=PUBLIC)
        else:
            certificate = x509.load_pem_x509_certificate(pem)
        if certificate.public_key() != key.public_key():
            raise ValueError(f"{path} and {key_path} do not belong together; restore both from a backup")
        return cls(certificate=certificate, key=key)

    def revocation_list(self, retired: Sequence[x509.Certificate], now: int) -> bytes:
        """Return the list of what this CA issued and has not expired. An expired list would shut everybody out."""
        start = _time_of(now)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(start - BACKDATED)
            .next_update(start + CA_LIFE)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        for certificate in retired:
            if _issuer_of(certificate) == self.id and certificate.not_valid_after_utc > start:
                builder = builder.add_revoked_certificate(
                    x509.RevokedCertificateBuilder()
                    .serial_number(certificate.serial_number)
                    .revocation_date(start)
                    .build()
                )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)

    def issue(
        self,
        common_name: str,
        key: ec.EllipticCurvePublicKey,
        usage: x509.ObjectIdentifier,
        hosts: Sequence[str],
        now: int,
    ) -> x509.Certificate:
        start = _time_of(now)
        builder = (
            _builder(common_name, self.certificate.subject, key, start, start + LEAF_LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def _finish_retirement(folder: Path) -> None:
    """Take the steps of a retirement that are still to be taken; none are when the first CA is in its place."""
    current, successor = folder / f"{_CURRENT}.pem", folder / f"{_NEXT}.pem"
    if current.exists() or not successor.exists():
        return
    if (folder / f"{_NEXT}.key").exists():
        (folder / f"{_NEXT}.key").replace(folder / f"{_CURRENT}.key")
    successor.replace(current)
    flush_folder(folder)


@lru_cache(maxsize=16_384)
def facts_of(pem: str) -> CertificateFacts:
    """Return what a certificate says; raise ValueError when it is none."""
    certificate = x509.load_pem_x509_certificate(pem.encode())
    return CertificateFacts(
        key_sha256=_key_sha256(certificate),
        ca=_issuer_of(certificate),
        expires_at=int(certificate.not_valid_after_utc.timestamp()) * 1000,
    )


def _key_sha256(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _issuer_of(certificate: x509.Certificate) -> str:
    """Return the key identifier of the CA that issued a certificate; two CAs of ours may have the same name."""
    try:
        issuer = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except x509.ExtensionNotFound:  # a CA's own
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
    return (issuer.key_identifier or b"").hex()


def _self_signed(title: str, key: ec.EllipticCurvePrivateKey, now: int) -> x509.Certificate:
    start = _time_of(now)
    return (
        _builder(title, _subject(title), key.public_key(), start, start + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    common_name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(common_name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _verified_request(csr: str) -> x509.CertificateSigningRequest:
    if len(csr) > _MAX_PEM:
        raise BadRequest(f"the CSR is over the cap of {_MAX_PEM} bytes")
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise BadRequest(f"the CSR cannot be read: {error}") from error
    if not valid:
        raise BadRequest("the CSR is not signed by its own key")
    return request


def _check_subject(request: x509.CertificateSigningRequest, device_id: str) -> None:
    """The CN becomes broker user, client id and part of topics, so it must be exactly the id."""
    try:
        check_device_id(device_id)
    except IllegalName as error:
        raise BadRequest(str(error)) from error
    names = [name.value for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [device_id]:
        raise BadRequest(f"the CSR's common name is {names}, the device says it is {device_id!r}")


def _still_good(path: Path, ca: _Ca, hosts: Sequence[str], now: int) -> bool:
    pem = read_capped(path, _MAX_PEM)
    if pem is None:
        return False
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(ca.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False  # the file is damaged, or the CA was replaced
    left = certificate.not_valid_after_utc - _time_of(now)
    return left > RENEW_WHEN_LEFT and set(_names(hosts)) <= set(_names_in(certificate))


def _names_in(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return ()


def _names(hosts: Sequence[str]) -> Sequence[x509.GeneralName]:
    return [_general_name(host) for host in hosts]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _subject(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    pem = read_capped(path, _MAX_PEM)
    if pem is None:
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomically(path, _private_pem(key), mode=SECRET)
        return key
    loaded = load_pem_private_key(pem, None)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} is not an EC key")  # noqa: TRY004 - the file is wrong, not the caller's type
    return loaded


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _time_of(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds // 1000, timezone.utc)
