"""What the release team trusts and signs: the metadata in force, verified with the key folder, and the first roots.

Knows TUF metadata. It stops there: talking to a server is `Client`'s part, asking people is for the commands, what
comes next is `fleet_server.cli.changes`'s. Nothing is ever signed over metadata that was not verified first, nor over
anything older than this key folder has seen.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import IO, Protocol, TypeVar

import msgspec
from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import SerializationError

from fleet_server.api_types import OnlineKeysView, Roots, TrustStatus
from fleet_server.cli.errors import NotInitialised, NotTrusted
from fleet_server.cli.key_folder import DIRECTOR_ROOT, IMAGE_ROOT, IMAGE_TARGETS, TARGETS, KeyFolder, key_of
from fleet_server.cli.signers import KeyHolder, Passphrase
from protocol.names import MAX_METADATA_FILE
from protocol.release import Release, from_custom, is_bundle_path

ROOT_LIFE = timedelta(days=365)
TARGETS_LIFE = timedelta(days=90)
REPOSITORIES = {"image": IMAGE_ROOT, "director": DIRECTOR_ROOT}
ONLINE_ROLES = {"director": (Targets.type, Snapshot.type, Timestamp.type), "image": (Snapshot.type, Timestamp.type)}
MALFORMED = (RepositoryError, SerializationError, ValueError, KeyError, TypeError, AttributeError, RecursionError)

T = TypeVar("T")
R = TypeVar("R", Root, Targets)


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


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The server's current offline metadata, verified from the roots of the folder on."""

    root: Root
    director_root: Root
    signed: Mapping[str, Metadata[Targets]]  # ``targets`` and each delegated family

    @property
    def targets(self) -> Targets:
        """What is not delegated."""
        return self.signed[TARGETS].signed

    def role_of(self, family: str) -> str:
        """Return the role that signs for a family."""
        return family if family in self.signed else TARGETS


# ---------------------------------------------------------------- the first time
def sign_first(folder: KeyFolder, online: OnlineKeysView, passphrase: Passphrase, now: datetime) -> Roots:
    """Sign both roots and empty Image targets, versions 1, and keep them in the folder."""
    by_name = {held.name: folder.open(held, passphrase) for held in folder.held()}
    image = Root(version=1, expires=now + ROOT_LIFE, consistent_snapshot=True)
    image.add_key(by_name[IMAGE_TARGETS].public, Targets.type)
    director = Root(version=1, expires=now + ROOT_LIFE, consistent_snapshot=True)
    for repository, root in (("image", image), ("director", director)):
        name_online_keys(root, repository, online)
        holder = by_name[REPOSITORIES[repository]]
        root.add_key(holder.public, Root.type)
        folder.keep_root(repository, 1, _signed(root, holder))
    folder.keep_targets(_signed(Targets(version=1, expires=now + TARGETS_LIFE), by_name[IMAGE_TARGETS]), 1)
    return folder.signed_roots()


def name_online_keys(root: Root, repository: str, online: OnlineKeysView) -> None:
    """Have a root name exactly the online keys that the server shows."""
    shown = online.image if repository == "image" else online.director
    for role in ONLINE_ROLES[repository]:
        key = _online_key(shown, role)
        for old in list(root.roles[role].keyids):
            root.revoke_key(old, role)
        root.add_key(key, role)
        root.roles[role].threshold = 1


def _online_key(shown: Mapping[str, str], role: str) -> Key:
    try:
        return key_of(json.loads(shown[role]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise NotTrusted(f"the server's online key for {role} is missing or unreadable: {error}") from error


def _signed(signed: R, holder: KeyHolder) -> bytes:
    metadata = Metadata(signed)
    signature = holder.sign(metadata.signed_bytes)
    metadata.signatures[signature.keyid] = signature
    return metadata.to_bytes()


# ---------------------------------------------------------------- what is in force
def fetch_verified(client: Client, folder: KeyFolder) -> Verified:
    """Return the server's current offline metadata, and keep what is new; raise `NotInitialised`, `NotTrusted`.

    Expiry is not looked at: what expired is what most wants to be signed again.
    """
    status = client.get("/trust", TrustStatus)
    if not status.ready or not status.targets_version or not status.image_root_version:
        raise NotInitialised("the server has no trust roots yet; make them with: edgewarden keys init --dir KEYS")
    root = climb_roots(client, folder, "image", status.image_root_version)
    _check_not_older(TARGETS, status.targets_version, folder)
    director_root = climb_roots(client, folder, "director", status.director_root_version or 0)
    targets = _fetch_targets(client, folder, TARGETS, status.targets_version, root)
    roles = targets.signed.delegations.roles if targets.signed.delegations else None
    families = {
        family: _fetch_family(client, folder, family, status, targets.signed) for family in sorted(roles or {})
    }
    return Verified(root=root, director_root=director_root, signed={TARGETS: targets, **families})


def releases_in(current: Verified) -> Sequence[Release]:
    """Return every release that is named, of all families."""
    return [
        from_custom(target.custom["release"])
        for metadata in current.signed.values()
        for path, target in metadata.signed.targets.items()
        if is_bundle_path(path)
    ]


def read(kind: type[R], data: bytes, name: str) -> Metadata[R]:
    """Return metadata of a kind; raise `NotTrusted`. Nothing of it is verified yet."""
    try:
        metadata = Metadata[R].from_bytes(data[: MAX_METADATA_FILE + 1])
    except MALFORMED as error:
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
        for by in (root, following.signed):
            check_signed(by, Root.type, following, name)
        if following.signed.version != version:
            raise NotTrusted(f"{name} says that it is {following.signed.version}")
        folder.keep_root(repository, version, data)
        root = following.signed
    return root


def check_signed(by: Root | Targets, role: str, metadata: Metadata[R], name: str) -> None:
    """Raise `NotTrusted` unless as many of the role's keys signed as ``by`` wants."""
    try:
        by.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except MALFORMED as error:
        raise NotTrusted(f"{name}: not signed as {by.type} {by.version} of these keys requires: {error}") from error


def _fetch_family(
    client: Client, folder: KeyFolder, family: str, status: TrustStatus, by: Targets
) -> Metadata[Targets]:
    version = status.targets_versions.get(family)
    if version is None:
        raise NotTrusted(f"the server hides the metadata of family {family}")
    _check_not_older(family, version, folder)
    return _fetch_targets(client, folder, family, version, by)


def _fetch_targets(
    client: Client, folder: KeyFolder, role: str, version: int, by: Root | Targets
) -> Metadata[Targets]:
    name = f"the server's {role}"
    data = client.get_bytes(f"/trust/image/metadata/{version}.{role}.json")
    targets = read(Targets, data, name)
    check_signed(by, role, targets, name)
    if targets.signed.version != version:
        raise NotTrusted(f"{name} {version} say that they are {targets.signed.version}")
    folder.keep_targets(data, version, role)
    return targets


def _check_not_older(role: str, version: int, folder: KeyFolder) -> None:
    if version < folder.seen().of(role):
        raise NotTrusted(
            f"the server shows {role} {version}, but {folder.seen().of(role)} was seen before: "
            "it was restored from an old backup, or someone hides a publication"
        )


def now_utc() -> datetime:
    """Return the time that expiry dates are counted from."""
    return datetime.now(timezone.utc).replace(microsecond=0)
