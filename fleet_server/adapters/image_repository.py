"""The Image repository on disk: keeps what the release team signed offline, adds snapshot and timestamp online.

Knows what targets metadata may say (legal paths, releases that never change, floors that only grow, at most ninety
days' life) and refuses everything else with a sentence. Signature rules are python-tuf's. The bundles themselves are
looked at by `fleet_server.publishing`.

On disk ``metadata/`` is the repository as devices read it: ``N.root.json``, ``N.targets.json``, ``N.snapshot.json``,
``timestamp.json``. The timestamp is written last and is what counts: files above the versions it leads to are left
over from a publication that was cut short, and the next one writes over them.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from fleet_server.adapters.director import milliseconds_of, time_of
from fleet_server.adapters.durable import make_private_folder, read_capped, write_atomically
from fleet_server.adapters.online_keys import OnlineSigners
from fleet_server.adapters.root_chain import RootChain, check_signed_by, parse
from fleet_server.ports import PublishedBundle
from fleet_server.publishing import Refused
from protocol.names import MAX_BUNDLE, MAX_METADATA_FILE, MAX_VERSION, SHA256_HEX, IllegalName
from protocol.release import Release, bundle_path, from_custom, is_bundle_path, is_floor_path, to_custom

DAY_MS = 24 * 3600 * 1000
MAX_TARGETS_LIFE_MS = 90 * DAY_MS
CLOCK_SLACK_MS = 3600 * 1000  # how far the signer's clock may be ahead of ours
ONLINE_LIFE_MS = 7 * DAY_MS  # of snapshot and timestamp
ONLINE_ROLES = (Snapshot.type, Timestamp.type)
_FILE_NAME = re.compile(r"([1-9][0-9]{0,9}\.(root|targets|snapshot)|root|targets|snapshot|timestamp)\.json")


class ImageFolder:
    """`ports.ImageRepository` on a folder: ``<role>.pem`` and ``metadata/``."""

    def __init__(self, folder: Path) -> None:
        make_private_folder(folder)
        self._signers = OnlineSigners(folder, ONLINE_ROLES)
        self._metadata = folder / "metadata"
        self._roots = RootChain(self._metadata, "Image", self._signers.key_ids())
        self._timestamp: Timestamp | None = None
        self._snapshot: Snapshot | None = None
        self._targets: bytes | None = None
        self._turn = threading.Lock()
        self._load()

    def online_keys(self) -> dict[str, bytes]:
        return self._signers.public()

    def first_root(self) -> bytes | None:
        return self._roots.all[0] if self._roots.all and self._targets is not None else None

    # ------------------------------------------------------------ roots
    def check_root(self, root: bytes) -> None:
        self._check_root(root)

    def accept_root(self, root: bytes) -> None:
        with self._turn:
            self._check_root(root)
            self._roots.add(root, replace_first=self._targets is None)

    def _check_root(self, data: bytes) -> None:
        """A new root must leave the targets valid that devices read meanwhile."""
        root = self._roots.check(data, replace_first=self._targets is None)
        if self._targets is not None:
            current = parse(Targets, self._targets, "Image targets", cap=MAX_METADATA_FILE)
            check_signed_by(root, Targets.type, current, "the Image targets in force")

    # ------------------------------------------------------------ targets
    def check_targets(self, targets: bytes, now: int) -> Sequence[PublishedBundle]:
        metadata = parse(Targets, targets, "Image targets", cap=MAX_METADATA_FILE)
        check_signed_by(self._roots.newest, Targets.type, metadata, "Image targets")
        if targets != self._targets:
            self._check_succession(metadata.signed, now)
        return _bundles_in(metadata.signed, now)

    def accept_targets(self, targets: bytes, now: int) -> Sequence[PublishedBundle]:
        with self._turn:
            bundles = self.check_targets(targets, now)
            if targets != self._targets:
                version = 1 + self._targets_version()
                write_atomically(self._metadata / f"{version}.targets.json", targets)
                self._sign_online(version, now)
                self._targets = targets
            return bundles

    def _check_succession(self, new: Targets, now: int) -> None:
        if new.version != 1 + self._targets_version():
            raise Refused(
                f"Image targets: version {new.version} came, {1 + self._targets_version()} is next; "
                "someone else may have published in between"
            )
        _check_expiry(new, now)
        if self._targets is not None:
            current = parse(Targets, self._targets, "Image targets", cap=MAX_METADATA_FILE)
            _check_unchanged(current.signed.targets, new.targets)

    def _targets_version(self) -> int:
        return self._snapshot.meta["targets.json"].version if self._snapshot else 0

    # ------------------------------------------------------------ reading
    def metadata(self, name: str) -> bytes | None:
        if not _FILE_NAME.fullmatch(name):
            return None
        return read_capped(self._metadata / self._numbered(name), MAX_METADATA_FILE)

    def _numbered(self, name: str) -> str:
        newest = {
            "root.json": len(self._roots.all),
            "targets.json": self._targets_version(),
            "snapshot.json": self._snapshot.version if self._snapshot else 0,
        }
        return f"{newest[name]}.{name}" if name in newest else name

    # ------------------------------------------------------------ online roles
    def renew(self, now: int) -> None:
        with self._turn:
            if self._timestamp and milliseconds_of(self._timestamp.expires) < now + ONLINE_LIFE_MS // 2:
                self._sign_online(self._targets_version(), now)

    def _sign_online(self, targets_version: int, now: int) -> None:
        expires = time_of(now + ONLINE_LIFE_MS)
        snapshot = Snapshot(
            version=1 + (self._snapshot.version if self._snapshot else 0),
            expires=expires,
            meta={"targets.json": MetaFile(targets_version)},
        )
        timestamp = Timestamp(
            version=1 + (self._timestamp.version if self._timestamp else 0),
            expires=expires,
            snapshot_meta=MetaFile(snapshot.version),
        )
        write_atomically(self._metadata / f"{snapshot.version}.snapshot.json", self._signers.sign(snapshot))
        write_atomically(self._metadata / "timestamp.json", self._signers.sign(timestamp))
        self._snapshot, self._timestamp = snapshot, timestamp

    def _load(self) -> None:
        """Follow the timestamp to what is in force."""
        data = self.metadata("timestamp.json")
        if data is None:
            return
        self._timestamp = Metadata[Timestamp].from_bytes(data).signed
        number = self._timestamp.snapshot_meta.version
        self._snapshot = Metadata[Snapshot].from_bytes(self._must_read(f"{number}.snapshot.json")).signed
        self._targets = self._must_read(f"{self._targets_version()}.targets.json")

    def _must_read(self, name: str) -> bytes:
        data = self.metadata(name)
        if data is None:
            raise FileNotFoundError(f"{self._metadata / name} is missing; restore the folder from a backup")
        return data


# ---------------------------------------------------------------- rules of targets metadata
def _check_expiry(new: Targets, now: int) -> None:
    expires = milliseconds_of(new.expires)
    if expires <= now:
        raise Refused(f"Image targets: expired at {new.expires.isoformat()}")
    if expires > now + MAX_TARGETS_LIFE_MS + CLOCK_SLACK_MS:
        raise Refused(f"Image targets: expires at {new.expires.isoformat()}, more than 90 days ahead")


def _check_unchanged(before: Mapping[str, TargetFile], after: Mapping[str, TargetFile]) -> None:
    """What was published stays as it is; a floor may rise."""
    for path, old in before.items():
        new = after.get(path)
        if new is None:
            raise Refused(f"{path}: was published and is missing now")
        if is_floor_path(path):
            if _floor_in(new) < _floor_in(old):
                raise Refused(f"{path}: the floor falls from {_floor_in(old)} to {_floor_in(new)}; it only grows")
        elif new != old:
            raise Refused(f"{path}: was published and never changes; publish a new version instead")


def _bundles_in(targets: Targets, now: int) -> Sequence[PublishedBundle]:
    if targets.delegations is not None:
        raise Refused("Image targets: delegations are not served here")
    bundles = []
    for path, target in sorted(targets.targets.items()):
        if is_floor_path(path):
            _floor_in(target)
        else:
            bundles.append(_bundle_of(path, target, now))
    _check_families(bundles)
    return bundles


def _bundle_of(path: str, target: TargetFile, now: int) -> PublishedBundle:
    if not is_bundle_path(path):
        raise Refused(f"{path[:120]!r}: neither the path of a bundle nor of a floor")
    release = _release_of(path, target)
    if not 0 < target.length <= MAX_BUNDLE:
        raise Refused(f"{path}: {target.length} bytes are not in 1…{MAX_BUNDLE}")
    sha256 = target.hashes.get("sha256", "")
    if not SHA256_HEX.fullmatch(sha256) or len(target.hashes) != 1:
        raise Refused(f"{path}: exactly one hash is wanted, sha256 in hex")
    return PublishedBundle(release=release, path=path, sha256=sha256, length=target.length, published_at=now)


def _release_of(path: str, target: TargetFile) -> Release:
    custom = target.custom if isinstance(target.custom, dict) else {}
    try:
        release = from_custom(custom.get("release"))
        expected = bundle_path(release)
    except (msgspec.ValidationError, IllegalName) as error:
        raise Refused(f"{path}: custom.release: {error}") from error
    if expected != path or not 0 < release.version <= MAX_VERSION:
        raise Refused(f"{path}: custom.release belongs to {expected}")
    if to_custom(release) != custom["release"]:
        raise Refused(f"{path}: custom.release has fields or forms that this server does not know")
    return release


def _floor_in(target: TargetFile) -> int:
    custom = target.custom if isinstance(target.custom, dict) else {}
    floor = custom.get("floor")
    if type(floor) is not int or not 0 < floor <= MAX_VERSION:
        raise Refused(f"{target.path}: custom.floor must be a version number")
    return floor


def _check_families(bundles: Sequence[PublishedBundle]) -> None:
    """Model names are unique over all families."""
    family: dict[str, str] = {}
    for bundle in bundles:
        release = bundle.release
        if family.setdefault(release.model, release.family) != release.family:
            raise Refused(f"{bundle.path}: model {release.model} belongs to family {family[release.model]}")
