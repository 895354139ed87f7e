"""The folder of one release person: private keys or where they are, and what was last seen signed.

Knows files. Nothing in it is trusted for being there except the roots: `fleet_server.cli.signing` verifies the rest.

The folder (``--keys``)::

    NAME.pem   a private key, PKCS#8, 0600, usually with a passphrase
    NAME.uri   instead of a .pem: where the private key is, e.g. hsm:2
    NAME.pub   the public half, to give to others
    image/N.root.json  image/targets.json  image/<family>.json  director/N.root.json
    state.json                                                              the newest versions seen
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from securesystemslib.signer import CryptoSigner, Key

from fleet_server.api_types import Roots
from fleet_server.cli.errors import CannotSign, KeysExist, KeysMissing
from fleet_server.cli.signers import KeyHolder, Passphrase, file_signer, new_private_pem, public_at
from protocol.names import FAMILY_NAME, MAX_METADATA_FILE, IllegalName, check_name

IMAGE_ROOT, IMAGE_TARGETS, DIRECTOR_ROOT = "image-root", "image-targets", "director-root"
KEY_NAMES = (IMAGE_ROOT, IMAGE_TARGETS, DIRECTOR_ROOT)
TARGETS = "targets"
OWNER = "x-edgewarden-owner"  # field of a public key: who holds it
_MAX_SMALL = 16 * 1024


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """``state.json``: the newest versions these keys signed or verified."""

    targets: int = 0
    families: dict[str, int] = {}

    def of(self, role: str) -> int:
        """Return the newest version seen of ``targets`` or a family."""
        return self.targets if role == TARGETS else self.families.get(role, 0)

    def after(self, role: str, version: int) -> "Seen":
        """Return this with a version that was seen too."""
        newest = max(version, self.of(role))
        if role == TARGETS:
            return msgspec.structs.replace(self, targets=newest)
        return msgspec.structs.replace(self, families={**self.families, role: newest})


@dataclass(frozen=True, kw_only=True)
class HeldKey:
    """A key that this folder can sign with. ``public`` is None when only the private file tells."""

    name: str
    uri: str
    public: Key | None


class KeyFolder:
    """The folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # ------------------------------------------------------------ keys
    def refuse_existing(self) -> None:
        """Raise `KeysExist` when any key of a first set-up is there; those on an HSM were put there for it."""
        there = [name for name in KEY_NAMES if self._file(name, "pem").exists()]
        if there:
            raise KeysExist(f"{self.path} has keys already ({', '.join(there)}); they are never written over")

    def make_keys(self, passphrase: bytes | None, owner: str = "") -> None:
        """Make the three keys of a first set-up, except those that were brought in from elsewhere."""
        self.refuse_existing()
        for name in KEY_NAMES:
            if not self._file(name, "uri").exists():
                self.make_key(name, passphrase, owner)

    def make_key(self, name: str, passphrase: bytes | None, owner: str = "") -> Key:
        """Make a key in a file; return its public half. Raises `KeysExist`."""
        self._refuse(name)
        pem = new_private_pem(passphrase)
        write_file(self._file(name, "pem"), pem, mode=0o600)
        key = file_signer(self._file(name, "pem"), lambda: passphrase or b"").public_key
        self._write_public(name, key, owner)
        return key

    def bring_in(self, name: str, uri: str, passphrase: Passphrase, owner: str = "") -> Key:
        """Note a private key that is elsewhere (HSM, key service, another file); return its public half."""
        self._refuse(name)
        full, key = public_at(uri, passphrase)
        write_file(self._file(name, "uri"), full.encode() + b"\n")
        self._write_public(name, key, owner)
        return key

    def held(self) -> Sequence[HeldKey]:
        """Return every key here, by name."""
        names = sorted({p.stem for kind in ("pem", "uri") for p in self.path.glob(f"*.{kind}")})
        return [self._held(name) for name in names]

    def open(self, held: HeldKey, passphrase: Passphrase) -> KeyHolder:
        """Open a key for signing."""
        return KeyHolder(held.uri, held.public, passphrase)

    def signer(self, name: str, passphrase: Passphrase) -> CryptoSigner:
        """Open a key that is in a file."""
        return file_signer(self._file(name, "pem"), passphrase)

    def free_name(self, name: str) -> str:
        """Return ``name``, or with the first number behind it that no key here has."""
        taken = {held.name for held in self.held()}
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)

    def _held(self, name: str) -> HeldKey:
        elsewhere = read_file(self._file(name, "uri"), _MAX_SMALL)
        uri = elsewhere.decode().strip() if elsewhere else f"file:{self._file(name, 'pem')}"
        public = self._file(name, "pub")
        return HeldKey(name=name, uri=uri, public=read_public(public) if public.exists() else None)

    def _refuse(self, name: str) -> None:
        try:
            check_name("key name", name, FAMILY_NAME)
        except IllegalName as error:
            raise CannotSign(str(error)) from error
        if self._file(name, "pem").exists() or self._file(name, "uri").exists():
            raise KeysExist(f"{self.path} has a key {name} already; keys are never written over")
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)

    def _write_public(self, name: str, key: Key, owner: str) -> None:
        if owner:
            key.unrecognized_fields[OWNER] = owner
        write_file(self._file(name, "pub"), json.dumps({"keyid": key.keyid, **key.to_dict()}, indent=2).encode())

    def _file(self, name: str, kind: str) -> Path:
        return self.path / f"{name}.{kind}"

    # ------------------------------------------------------------ what was seen signed
    def roots(self, repository: str) -> Sequence[bytes]:
        """Return the roots of ``image`` or ``director``, oldest first; raise `KeysMissing` when there is none."""
        found: list[bytes] = []
        while data := read_file(self.path / repository / f"{len(found) + 1}.root.json", MAX_METADATA_FILE):
            found.append(data)
        if not found:
            raise KeysMissing(f"{self.path} has no {repository} root; make it with: edgewarden keys init")
        return found

    def has_roots(self) -> bool:
        """Tell whether this folder knows the first roots already."""
        return all((self.path / repository / "1.root.json").exists() for repository in ("image", "director"))

    def keep_root(self, repository: str, version: int, data: bytes) -> None:
        """Store a root that was signed or verified here."""
        _keep(self.path / repository / f"{version}.root.json", data)

    def keep_targets(self, data: bytes, version: int, role: str = TARGETS) -> None:
        """Store targets that the server took, and remember their version."""
        _keep(self.path / "image" / f"{role}.json", data)
        _keep(self.path / "state.json", msgspec.json.encode(self.seen().after(role, version)))

    def targets(self, role: str = TARGETS) -> bytes:
        """Return the newest targets seen here; raise `KeysMissing`."""
        data = read_file(self.path / "image" / f"{role}.json", MAX_METADATA_FILE)
        if data is None:
            raise KeysMissing(f"{self.path} has no Image {role}; make them with: edgewarden keys init")
        return data

    def families(self) -> Mapping[str, bytes]:
        """Return the newest metadata seen of each delegated family."""
        return {family: self.targets(family) for family in sorted(self.seen().families)}

    def seen(self) -> Seen:
        """Return what ``state.json`` remembers."""
        data = read_file(self.path / "state.json", _MAX_SMALL)
        try:
            return msgspec.json.decode(data, type=Seen) if data else Seen()
        except msgspec.DecodeError as error:
            raise KeysMissing(f"{self.path / 'state.json'} cannot be read: {error}") from error

    def signed_roots(self) -> Roots:
        """Return the newest of everything, as the server takes it the first time."""
        return Roots(
            image_root=self.roots("image")[-1],
            image_targets=self.targets(),
            director_root=self.roots("director")[-1],
        )


def fingerprint(first_image_root: bytes, first_director_root: bytes) -> str:
    """Return what two people compare to know that they begin from the same roots."""
    return hashlib.sha256(
        hashlib.sha256(first_image_root).digest() + hashlib.sha256(first_director_root).digest()
    ).hexdigest()


def read_public(path: Path) -> Key:
    """Return a public key as ``NAME.pub`` holds it; raise `KeysMissing`."""
    data = read_file(path, _MAX_SMALL)
    if data is None:
        raise KeysMissing(f"{path} is not there; a public key is made with: edgewarden keys make")
    try:
        return key_of(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KeysMissing(f"{path} is not a public key: {error}") from error


def key_of(described: dict[str, object]) -> Key:
    """Return a key from its TUF description with the id in it; raise ValueError, KeyError or TypeError."""
    claimed = described["keyid"]
    return Key.from_dict(str(claimed), {name: value for name, value in described.items() if name != "keyid"})


def owner_of(key: Key) -> str:
    """Return how people call a key: who holds it, and the beginning of its id."""
    owner = key.unrecognized_fields.get(OWNER)
    short = key.keyid[:8]
    return f"{owner} ({short})" if isinstance(owner, str) and owner.isprintable() else short


# ---------------------------------------------------------------- files
def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file in one durable step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _keep(path: Path, data: bytes) -> None:
    if read_file(path, MAX_METADATA_FILE) != data:
        write_file(path, data)


def read_file(path: Path, cap: int) -> bytes | None:
    """Return a file's bytes, None when there is none; raise `CannotSign` over the cap or when it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(cap + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CannotSign(f"cannot read {path}: {error.strerror}") from error
    if len(data) > cap:
        raise CannotSign(f"{path} is over the cap of {cap} bytes")
    return data
