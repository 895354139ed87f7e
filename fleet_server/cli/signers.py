"""Private keys by URI: a file with a passphrase, an HSM with a PIN, a cloud's key service.

Knows how each is opened and how its public half is read; securesystemslib does the signing. Which key signs what is
`fleet_server.cli.signing`'s. Schemes::

    file:PATH                      PEM (PKCS#8), usually with a passphrase
    hsm:ID[?label=TOKEN]           PKCS#11, ECDSA P-256 or P-384; PYKCS11LIB names the library; extra ``hsm``
    awskms:ID  gcpkms:NAME  azurekms:VAULT/KEY    key services; securesystemslib's extras awskms, gcpkms, azurekms
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (
    SIGNER_FOR_URI_SCHEME,
    AWSSigner,
    AzureSigner,
    CryptoSigner,
    GCPSigner,
    HSMSigner,
    Key,
    Signature,
    Signer,
)

from fleet_server.cli.errors import CannotSign, KeysMissing, WrongPassphrase

T = TypeVar("T")
FILE = "file"
_MAX_PEM = 16 * 1024
_INSTALL = {
    HSMSigner.SCHEME: "pip install 'edgewarden[hsm]'",
    AWSSigner.SCHEME: "pip install 'securesystemslib[awskms]'",
    GCPSigner.SCHEME: "pip install 'securesystemslib[gcpkms]'",
    AzureSigner.SCHEME: "pip install 'securesystemslib[azurekms]'",
}

Passphrase = Callable[[], bytes]
"""What opens a key: the passphrase of a file, the PIN of an HSM. Asked only when it is needed."""


class KeyHolder:
    """A private key that can sign. Every failure is `CannotSign` and names the key."""

    def __init__(self, uri: str, public: Key | None, passphrase: Passphrase) -> None:
        """Open the key at ``uri``. Without ``public`` the public half is read from it."""
        self.uri = uri
        self._known = public
        if scheme_of(uri) == FILE:
            self._signer: Signer = file_signer(Path(uri.partition(":")[2]), passphrase)
        else:
            known = public or public_at(uri, passphrase)[1]
            self._signer = _naming(uri, lambda: Signer.from_priv_key_uri(uri, known, lambda _: passphrase().decode()))
        if public is not None and public.keyid != self._signer.public_key.keyid:
            raise CannotSign(f"{uri}: the .pub file beside it is of another key ({public.keyid[:8]})")

    @property
    def public(self) -> Key:
        """The public half, with its owner where that is known."""
        return self._known or self._signer.public_key

    def sign(self, data: bytes) -> Signature:
        """Return a signature."""
        return _naming(self.uri, lambda: self._signer.sign(data))


def public_at(uri: str, passphrase: Passphrase) -> tuple[str, Key]:
    """Return the full URI of a private key, and its public half."""
    scheme, where = scheme_of(uri), urlsplit(uri)
    if scheme == FILE:
        return uri, file_signer(Path(uri.partition(":")[2]), passphrase).public_key
    if scheme == HSMSigner.SCHEME:
        label = dict(parse_qsl(where.query)).get("label")
        number = _naming(uri, lambda: int(where.path) if where.path else None)
        return _naming(uri, lambda: HSMSigner.import_(number, label, lambda _: passphrase().decode()))
    rest = uri.partition(":")[2]
    if scheme == AWSSigner.SCHEME:
        return _naming(uri, lambda: AWSSigner.import_(rest))
    if scheme == GCPSigner.SCHEME:
        return _naming(uri, lambda: GCPSigner.import_(rest))
    vault, _, name = rest.partition("/")
    return _naming(uri, lambda: AzureSigner.import_(vault, name))


def scheme_of(uri: str) -> str:
    """Return the scheme of a URI; raise `CannotSign` for one that is not known."""
    scheme = uri.partition(":")[0]
    known = (FILE, *_INSTALL)
    if scheme not in known or (scheme != FILE and scheme not in SIGNER_FOR_URI_SCHEME):
        raise CannotSign(f"{uri}: no such kind of key; known are {', '.join(f'{s}:' for s in known)}")
    return scheme


def file_signer(path: Path, passphrase: Passphrase) -> CryptoSigner:
    """Load a PEM; the passphrase is asked for only when the file wants one."""
    try:
        with path.open("rb") as file:
            pem = file.read(_MAX_PEM + 1)
    except FileNotFoundError as error:
        raise KeysMissing(f"{path} is not there; make keys with: edgewarden keys init") from error
    except OSError as error:
        raise KeysMissing(f"cannot read {path}: {error.strerror}") from error
    if len(pem) > _MAX_PEM:
        raise KeysMissing(f"{path} is over the cap of {_MAX_PEM} bytes")
    return CryptoSigner(_open_key(pem, path, passphrase))


def new_private_pem(passphrase: bytes | None) -> bytes:
    """Make an Ed25519 key; return it as PEM, protected when there is a passphrase."""
    protection: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    key = load_pem_private_key(CryptoSigner.generate_ed25519().private_bytes, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def _open_key(pem: bytes, path: Path, passphrase: Passphrase) -> PrivateKeyTypes:
    try:
        return load_pem_private_key(pem, None)
    except TypeError:  # the library's way to say that the key is encrypted
        pass
    except ValueError as error:
        raise KeysMissing(f"{path} is not a private key: {error}") from error
    try:
        return load_pem_private_key(pem, passphrase())
    except ValueError as error:
        raise WrongPassphrase(f"the passphrase does not open {path}") from error


def _naming(uri: str, act: Callable[[], T]) -> T:
    """Do something with a key; turn whatever goes wrong into `CannotSign` that names the key."""
    try:
        return act()
    except CannotSign:
        raise
    except UnsupportedLibraryError as error:
        install = _INSTALL.get(uri.partition(":")[0], "")
        raise CannotSign(f"{uri}: a library is missing ({error}); install it with: {install}") from error
    except Exception as error:  # HSMs and key services have errors of their own, without a common base
        raise CannotSign(f"{uri}: {type(error).__name__}: {error}".rstrip(": ")) from error
