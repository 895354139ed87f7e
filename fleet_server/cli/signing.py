"""What the release team signs offline: the keys, both trust roots, and targets metadata version by version.

Knows keys in files and TUF metadata. It stops there: talking to a server is `Client`'s part, asking people is for the
commands. Nothing is ever signed over metadata that was not verified first, nor over anything older than this key
folder has seen.

The key folder (``--keys``)::

    image-root.pem  image-targets.pem  director-root.pem     PKCS#8, 0600, usually with a passphrase
    image/N.root.json  image/targets.json  director/N.root.json
    state.json                                               the newest versions seen

Errors, all `CannotSign`: `KeysExist`, `KeysMissing`, `WrongPassphrase`, `NotTrusted`, `NotInitialised`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import IO, Protocol, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import SerializationError

from fleet_server.api_types import OnlineKeysView, Roots, TrustStatus
from protocol.names import MAX_METADATA_FILE
from protocol.release import Release, from_custom, is_bundle_path

ROOT_LIFE = timedelta(days=365)
TARGETS_LIFE = timedelta(days=90)
IMAGE_ROOT, IMAGE_TARGETS, DIRECTOR_ROOT = "image-root", "image-targets", "director-root"
KEY_NAMES = (IMAGE_ROOT, IMAGE_TARGETS, DIRECTOR_ROOT)
_MAX_PEM = 16 * 1024
_DIRECTOR_ONLINE = (Targets.type, Snapshot.type, Timestamp.type)
_IMAGE_ONLINE = (Snapshot.type, Timestamp.type)
_MALFORMED = (RepositoryError, SerializationError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

T = TypeVar("T")
R = TypeVar("R", Root, Targets)
Passphrase = Callable[[], bytes]


class CannotSign(Exception):
    """Something must be put right before this can be signed; the text says what."""

    exit_code = 1


class KeysExist(CannotSign):
    """Keys are there already; they are never written over."""


class KeysMissing(CannotSign):
    """A key or file of the key folder is not there."""


class WrongPassphrase(CannotSign):
    """The passphrase does not open a key."""


class NotTrusted(CannotSign):
    """What the server shows is not what these keys signed, or is older than what was seen before."""


class NotInitialised(CannotSign):
    """The server has no trust roots yet."""


class Client(Protocol):
    """What is needed of `fleet_server.cli.session.Session`."""

    def get(self, path: str, type: type[T]) -> T:  # noqa: A002 - as Session names it
        """GET a resource."""

    def get_bytes(self, path: str) -> bytes:
        """GET a file exactly as stored."""

    def post(self, path: str, body: msgspec.Struct, type: type[T]) -> T:  # noqa: A002 - as Session names it
        """POST a JSON body."""

    def upload(self, path: str, fileobj: IO[bytes], length: int) -> None:
        """POST bytes."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """``state.json``: the newest versions these keys signed or verified."""

    targets: int = 0


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The server's current Image metadata, verified with the keys of the folder."""

    root: Root
    targets: Targets


# ---------------------------------------------------------------- the key folder
class KeyFolder:
    """The folder with the offline keys and what they signed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse_existing(self) -> None:
        """Raise `KeysExist` when any key is there."""
        there = [name for name in KEY_NAMES if self._key_path(name).exists()]
        if there:
            raise KeysExist(f"{self.path} has keys already ({', '.join(there)}); they are never written over")

    def make_keys(self, passphrase: bytes | None) -> None:
        """Make all keys; raise `KeysExist` when any is there."""
        self.refuse_existing()
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        for name in KEY_NAMES:
            pem = _private_pem(CryptoSigner.generate_ed25519().private_bytes, passphrase)
            _write(self._key_path(name), pem, mode=0o600)

    def signer(self, name: str, passphrase: Passphrase) -> CryptoSigner:
        """Load a key; the passphrase is asked for only when the file wants one."""
        pem = _read(self._key_path(name), _MAX_PEM)
        if pem is None:
            raise KeysMissing(f"{self._key_path(name)} is not there; make keys with: edgewarden keys init")
        return CryptoSigner(_open_key(pem, self._key_path(name), passphrase))

    def roots(self, repository: str) -> Sequence[bytes]:
        """Return the roots of ``image`` or ``director``, oldest first; raise `KeysMissing` when there is none."""
        found: list[bytes] = []
        while data := _read(self.path / repository / f"{len(found) + 1}.root.json", MAX_METADATA_FILE):
            found.append(data)
        if not found:
            raise KeysMissing(f"{self.path} has no {repository} root; make it with: edgewarden keys init")
        return found

    def keep_root(self, repository: str, version: int, data: bytes) -> None:
        """Store a root that was signed or verified here."""
        _write(self.path / repository / f"{version}.root.json", data)

    def keep_targets(self, data: bytes, version: int) -> None:
        """Store targets that the server took, and remember their version."""
        _write(self.path / "image" / "targets.json", data)
        _write(self.path / "state.json", msgspec.json.encode(Seen(targets=max(version, self.seen().targets))))

    def targets(self) -> bytes:
        """Return the newest targets signed here; raise `KeysMissing`."""
        data = _read(self.path / "image" / "targets.json", MAX_METADATA_FILE)
        if data is None:
            raise KeysMissing(f"{self.path} has no Image targets; make them with: edgewarden keys init")
        return data

    def seen(self) -> Seen:
        """Return what ``state.json`` remembers."""
        data = _read(self.path / "state.json", _MAX_PEM)
        try:
            return msgspec.json.decode(data, type=Seen) if data else Seen()
        except msgspec.DecodeError as error:
            raise KeysMissing(f"{self.path / 'state.json'} cannot be read: {error}") from error

    def signed_roots(self) -> Roots:
        """Return the newest of everything, as the server takes it."""
        return Roots(
            image_root=self.roots("image")[-1],
            image_targets=self.targets(),
            director_root=self.roots("director")[-1],
        )

    def _key_path(self, name: str) -> Path:
        return self.path / f"{name}.pem"


# ---------------------------------------------------------------- signing
def sign_first(folder: KeyFolder, online: OnlineKeysView, passphrase: Passphrase, now: datetime) -> Roots:
    """Sign both roots and empty Image targets, versions 1, and keep them in the folder."""
    targets_signer = folder.signer(IMAGE_TARGETS, passphrase)
    image = Root(version=1, expires=now + ROOT_LIFE, consistent_snapshot=True)
    image.add_key(targets_signer.public_key, Targets.type)
    _add_online(image, online.image, _IMAGE_ONLINE)
    director = Root(version=1, expires=now + ROOT_LIFE, consistent_snapshot=True)
    _add_online(director, online.director, _DIRECTOR_ONLINE)
    _sign_root(folder, "image", image, folder.signer(IMAGE_ROOT, passphrase))
    _sign_root(folder, "director", director, folder.signer(DIRECTOR_ROOT, passphrase))
    folder.keep_targets(_signed(Targets(version=1, expires=now + TARGETS_LIFE), targets_signer), 1)
    return folder.signed_roots()


def sign_again(folder: KeyFolder, current: Verified, passphrase: Passphrase, now: datetime) -> Roots:
    """Sign the next version of both roots and of the targets, with new expiry dates and nothing else changed."""
    for repository, name in (("image", IMAGE_ROOT), ("director", DIRECTOR_ROOT)):
        root = read(Root, folder.roots(repository)[-1], f"{repository} root").signed
        root.version += 1
        root.expires = now + ROOT_LIFE
        _sign_root(folder, repository, root, folder.signer(name, passphrase))
    data = sign_next(current.targets, {}, folder.signer(IMAGE_TARGETS, passphrase), now)
    folder.keep_targets(data, current.targets.version + 1)
    return folder.signed_roots()


def sign_next(current: Targets, added: Mapping[str, TargetFile], signer: CryptoSigner, now: datetime) -> bytes:
    """Return targets n+1: everything that is there, and what is added."""
    following = Targets(
        version=current.version + 1,
        expires=now + TARGETS_LIFE,
        targets={**current.targets, **added},
        delegations=current.delegations,
        unrecognized_fields=current.unrecognized_fields,
    )
    return _signed(following, signer)


def fetch_verified(client: Client, folder: KeyFolder) -> Verified:
    """Return the server's current Image root and targets, and keep what is new; raise `NotInitialised`, `NotTrusted`.

    Expiry is not looked at: what expired is what most wants to be signed again.
    """
    status = client.get("/trust", TrustStatus)
    if not status.ready or not status.targets_version or not status.image_root_version:
        raise NotInitialised("the server has no trust roots yet; make them with: edgewarden keys init --dir KEYS")
    root = climb_roots(client, folder, "image", status.image_root_version)
    version = status.targets_version
    if version < folder.seen().targets:
        raise NotTrusted(
            f"the server shows targets {version}, but {folder.seen().targets} was seen before: "
            "it was restored from an old backup, or someone hides a publication"
        )
    climb_roots(client, folder, "director", status.director_root_version or 0)
    data = client.get_bytes(f"/trust/image/metadata/{version}.targets.json")
    targets = read(Targets, data, "the server's targets")
    _check_signed(root, Targets.type, targets, "the server's targets")
    if targets.signed.version != version:
        raise NotTrusted(f"the server's targets {version} say that they are {targets.signed.version}")
    folder.keep_targets(data, version)
    return Verified(root=root, targets=targets.signed)


def releases_in(targets: Targets) -> Sequence[Release]:
    """Return every release that targets metadata names."""
    return [from_custom(target.custom["release"]) for path, target in targets.targets.items() if is_bundle_path(path)]


def expiries(folder: KeyFolder) -> Mapping[str, tuple[int, datetime]]:
    """Return what was signed here: name -> (version, expiry)."""
    signed = {
        "Image root": read(Root, folder.roots("image")[-1], "image root").signed,
        "Director root": read(Root, folder.roots("director")[-1], "director root").signed,
        "Image targets": read(Targets, folder.targets(), "image targets").signed,
    }
    return {name: (metadata.version, metadata.expires) for name, metadata in signed.items()}


def read(kind: type[R], data: bytes, name: str) -> Metadata[R]:
    """Return metadata of a kind; raise `NotTrusted`. Nothing of it is verified yet."""
    try:
        metadata = Metadata[R].from_bytes(data[: MAX_METADATA_FILE + 1])
    except _MALFORMED as error:
        raise NotTrusted(f"{name}: not TUF metadata: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise NotTrusted(f"{name}: this is {metadata.signed.type} metadata")
    return metadata


def climb_roots(client: Client, folder: KeyFolder, repository: str, newest: int) -> Root:
    """Return the newest root of ``image`` or ``director``, each step verified by the one below and by itself."""
    root = read(Root, folder.roots(repository)[-1], f"the folder's {repository} root").signed
    while root.version < newest:
        version = root.version + 1
        name = f"the server's {repository} root {version}"
        data = client.get_bytes(f"/trust/{repository}/metadata/{version}.root.json")
        following = read(Root, data, name)
        for signer in (root, following.signed):
            _check_signed(signer, Root.type, following, name)
        if following.signed.version != version:
            raise NotTrusted(f"{name} says that it is {following.signed.version}")
        folder.keep_root(repository, version, data)
        root = following.signed
    return root


def _check_signed(root: Root, role: str, metadata: Metadata[R], name: str) -> None:
    try:
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except _MALFORMED as error:
        raise NotTrusted(f"{name}: not signed as root {root.version} of these keys requires: {error}") from error


def _sign_root(folder: KeyFolder, repository: str, root: Root, signer: CryptoSigner) -> None:
    root.add_key(signer.public_key, Root.type)
    folder.keep_root(repository, root.version, _signed(root, signer))


def _signed(signed: R, signer: CryptoSigner) -> bytes:
    metadata = Metadata(signed)
    metadata.sign(signer)
    return metadata.to_bytes()


def _add_online(root: Root, keys: Mapping[str, str], roles: Sequence[str]) -> None:
    for role in roles:
        try:
            described = json.loads(keys[role])
            root.add_key(Key.from_dict(described.pop("keyid"), described), role)
        except (KeyError, ValueError, AttributeError) as error:
            raise NotTrusted(f"the server's online key for {role} is missing or unreadable: {error}") from error


# ---------------------------------------------------------------- files
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


def _private_pem(plain: bytes, passphrase: bytes | None) -> bytes:
    protection: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return load_pem_private_key(plain, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file in one durable step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path, cap: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except FileNotFoundError:
        return None
    if len(data) > cap:
        raise CannotSign(f"{path} is over the cap of {cap} bytes")
    return data


def now_utc() -> datetime:
    """Return the time that expiry dates are counted from."""
    return datetime.now(timezone.utc)
