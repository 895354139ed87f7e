"""The Image repository on disk: keeps what the release team signed offline, adds snapshot and timestamp online.

TUF's rules (signatures, thresholds) are python-tuf's; what offline metadata may say is `image_rules`'s. Here is the
order: what comes is one publication, checked as a whole against what is in force, and taken as a whole.

On disk ``metadata/`` is the repository as devices read it: ``N.root.json``, ``N.targets.json``, ``N.<family>.json``,
``N.snapshot.json``, ``timestamp.json``. The timestamp is written last and is what counts: files above the versions it
leads to are left over from a publication that was cut short, and the next one writes over them. A root counts at
once; so that it never stands without the metadata that came with it, a publication is in ``pending.json`` until all
of it is in place, and is finished at the next start.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from fleet_server.adapters.durable import flush_folder, make_private_folder, read_capped, write_atomically
from fleet_server.adapters.image_rules import (
    bundles_in,
    check_contents,
    check_delegations,
    check_expiry,
    check_unchanged,
    families_in,
    hindrances_in,
)
from fleet_server.adapters.online_keys import OnlineSigners
from fleet_server.adapters.root_chain import RootChain, check_signed_by, milliseconds_of, parse, role_fact, time_of
from fleet_server.api_types import Publication
from fleet_server.ports import PublishedBundle, RoleFact
from fleet_server.publishing import Refused
from protocol.names import MAX_METADATA_FILE

DAY_MS = 24 * 3600 * 1000
ONLINE_LIFE_MS = 7 * DAY_MS  # of snapshot and timestamp
ONLINE_ROLES = (Snapshot.type, Timestamp.type)
_MAX_PENDING = 64 * 1024 * 1024  # bytes; a root and the targets of every family, as base64
_FILE_NAME = re.compile(r"(?:([1-9][0-9]{0,9})\.)?([a-z0-9][a-z0-9_-]{0,62})\.json")


@dataclass(frozen=True, kw_only=True)
class _Offline:
    """Offline metadata of all roles that goes together: in force, or about to be."""

    root: Root
    targets: Metadata[Targets]
    families: Mapping[str, Metadata[Targets]]

    def parts(self) -> Mapping[str, Targets]:
        """Return targets by role, ``targets`` first."""
        return {Targets.type: self.targets.signed, **{f: m.signed for f, m in self.families.items()}}


class ImageFolder:
    """`ports.ImageRepository` on a folder: ``<role>.pem`` and ``metadata/``."""

    def __init__(self, folder: Path) -> None:
        make_private_folder(folder)
        self._signers = OnlineSigners(folder, ONLINE_ROLES)
        self._pending = folder / "pending.json"
        self._metadata = folder / "metadata"
        self._roots = RootChain(self._metadata, "Image", self._signers.accepted)
        self._timestamp: Timestamp | None = None
        self._snapshot: Snapshot | None = None
        self._targets: dict[str, bytes] = {}  # ``targets`` and each delegated family
        self._hindrances: Mapping[str, str] = {}
        self._turn = threading.Lock()
        self._load()

    def online_keys(self) -> dict[str, bytes]:
        return self._signers.public()

    def make_next_keys(self) -> None:
        self._signers.make_next()

    def first_root(self) -> bytes | None:
        return self._roots.all[0] if self._roots.all and self._targets else None

    # ------------------------------------------------------------ publications
    def check(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        before = self._in_force()
        after = self._after(publication, before, now)
        contents = check_contents(after.parts())
        if before is not None:
            check_unchanged(check_contents(before.parts()), contents)
        return bundles_in(contents, now)

    def accept(self, publication: Publication, now: int) -> Sequence[PublishedBundle]:
        with self._turn:
            bundles = self.check(publication, now)
            new = self._new_in(publication)
            if new != Publication():
                write_atomically(self._pending, msgspec.json.encode(new))
                self._put(new, now)
            return bundles

    def catch_up(self, now: int) -> Sequence[PublishedBundle]:
        with self._turn:
            data = read_capped(self._pending, _MAX_PENDING)
            if data is not None:
                self._put(msgspec.json.decode(data, type=Publication), now)
            in_force = self._in_force()
            return bundles_in(check_contents(in_force.parts()), now) if in_force else ()

    def _after(self, publication: Publication, before: _Offline | None, now: int) -> _Offline:
        """Return what would be in force; raise `Refused` where a signature, a number or a date is not right."""
        root = self._root_after(publication)
        targets = self._role_after(Targets.type, publication.targets, now)
        check_signed_by(root, Targets.type, targets, "Image targets")
        check_delegations(before.targets.signed if before else None, targets.signed)
        delegated = families_in(targets.signed)
        for family in publication.delegated:
            if family not in delegated:
                raise Refused(f"{family[:80]!r}: the Image targets do not delegate such a family")
        families = {family: self._role_after(family, publication.delegated.get(family), now) for family in delegated}
        for family, metadata in families.items():
            check_signed_by(targets.signed, family, metadata, f"family {family}")
        return _Offline(root=root, targets=targets, families=families)

    def _root_after(self, publication: Publication) -> Root:
        if publication.image_root is None:
            return self._roots.newest
        return self._roots.check(publication.image_root, replace_first=not self._targets)

    def _role_after(self, role: str, data: bytes | None, now: int) -> Metadata[Targets]:
        current, name = self._targets.get(role), _title(role)
        if data is None or data == current:
            if current is None:
                raise Refused(f"{name}: its metadata did not come")
            return parse(Targets, current, name, cap=MAX_METADATA_FILE)
        metadata = parse(Targets, data, name, cap=MAX_METADATA_FILE)
        number = 1 + self._version(role)
        if metadata.signed.version != number:
            raise Refused(
                f"{name}: version {metadata.signed.version} came, {number} is next; "
                "someone else may have published in between"
            )
        check_expiry(metadata.signed, name, now)
        return metadata

    def _new_in(self, publication: Publication) -> Publication:
        """Return the publication without what is in force already."""
        root, targets = publication.image_root, publication.targets
        return Publication(
            image_root=None if root in self._roots.all[-1:] and self._targets else root,
            targets=None if targets == self._targets.get(Targets.type) else targets,
            delegated={f: data for f, data in publication.delegated.items() if data != self._targets.get(f)},
        )

    def _put(self, new: Publication, now: int) -> None:
        """Put in place what was checked; doing it twice does no harm."""
        if new.image_root is not None:
            self._roots.add(new.image_root, replace_first=not self._targets)
            self._signers.follow(self._roots.newest)
        targets = {Targets.type: new.targets} if new.targets is not None else {}
        for role, data in {**targets, **new.delegated}.items():
            version = parse(Targets, data, _title(role), cap=MAX_METADATA_FILE).signed.version
            write_atomically(self._metadata / f"{version}.{role}.json", data)
            self._targets[role] = data
        self._sign_online({role: _version_of(data) for role, data in self._targets.items()}, now)
        self._note_hindrances()
        self._pending.unlink(missing_ok=True)
        flush_folder(self._pending.parent)

    def _in_force(self) -> _Offline | None:
        if not self._targets:
            return None
        parsed = {
            role: parse(Targets, data, _title(role), cap=MAX_METADATA_FILE) for role, data in self._targets.items()
        }
        return _Offline(root=self._roots.newest, targets=parsed.pop(Targets.type), families=parsed)

    def _version(self, role: str) -> int:
        meta = self._snapshot.meta.get(f"{role}.json") if self._snapshot else None
        return meta.version if meta else 0

    # ------------------------------------------------------------ what they mean
    def hindrance(self, sha256: str) -> str | None:
        return self._hindrances.get(sha256)

    def roles(self) -> Sequence[RoleFact]:
        in_force = self._in_force()
        if in_force is None or self._snapshot is None or self._timestamp is None:
            return ()
        root, targets = in_force.root, in_force.targets.signed
        return (
            role_fact("image-root", root, root, Root.type),
            role_fact("image-targets", targets, root, Targets.type),
            *(role_fact(family, m.signed, targets, family) for family, m in sorted(in_force.families.items())),
            role_fact("image-snapshot", self._snapshot, root, Snapshot.type),
            role_fact("image-timestamp", self._timestamp, root, Timestamp.type),
        )

    # ------------------------------------------------------------ reading
    def metadata(self, name: str) -> bytes | None:
        match = _FILE_NAME.fullmatch(name)
        if match is None or match[2] not in {Root.type, Snapshot.type, Timestamp.type, *self._targets}:
            return None
        return read_capped(self._metadata / (name if match[1] else self._numbered(match[2])), MAX_METADATA_FILE)

    def _numbered(self, role: str) -> str:
        if role == Timestamp.type:
            return "timestamp.json"
        online = {Root.type: len(self._roots.all), Snapshot.type: self._snapshot.version if self._snapshot else 0}
        return f"{online.get(role, self._version(role))}.{role}.json"

    # ------------------------------------------------------------ online roles
    def renew(self, now: int) -> None:
        with self._turn:
            if self._timestamp and milliseconds_of(self._timestamp.expires) < now + ONLINE_LIFE_MS // 2:
                self._sign_online({role: self._version(role) for role in self._targets}, now)

    def _sign_online(self, versions: Mapping[str, int], now: int) -> None:
        expires = time_of(now + ONLINE_LIFE_MS)
        snapshot = Snapshot(
            version=_number_after(self._snapshot, now),
            expires=expires,
            meta={f"{role}.json": MetaFile(version) for role, version in versions.items()},
        )
        timestamp = Timestamp(
            version=_number_after(self._timestamp, now),
            expires=expires,
            snapshot_meta=MetaFile(snapshot.version),
        )
        write_atomically(self._metadata / f"{snapshot.version}.snapshot.json", self._signers.sign(snapshot))
        write_atomically(self._metadata / "timestamp.json", self._signers.sign(timestamp))
        self._snapshot, self._timestamp = snapshot, timestamp

    def _load(self) -> None:
        """Follow the timestamp to what is in force."""
        if self._roots.all:
            self._signers.follow(self._roots.newest)
        data = read_capped(self._metadata / "timestamp.json", MAX_METADATA_FILE)
        if data is None:
            return
        self._timestamp = Metadata[Timestamp].from_bytes(data).signed
        number = self._timestamp.snapshot_meta.version
        self._snapshot = Metadata[Snapshot].from_bytes(self._must_read(f"{number}.snapshot.json")).signed
        for file in self._snapshot.meta:
            role = file.removesuffix(".json")
            self._targets[role] = self._must_read(f"{self._version(role)}.{file}")
        self._note_hindrances()

    def _note_hindrances(self) -> None:
        in_force = self._in_force()
        self._hindrances = hindrances_in(check_contents(in_force.parts())) if in_force else {}

    def _must_read(self, name: str) -> bytes:
        data = read_capped(self._metadata / name, MAX_METADATA_FILE)
        if data is None:
            raise FileNotFoundError(f"{self._metadata / name} is missing; restore the folder from a backup")
        return data


def _number_after(last: Snapshot | Timestamp | None, now: int) -> int:
    """Return a version above the last, and above what a server restored from a backup has signed and forgotten."""
    return max(now // 1000, 1 + (last.version if last else 0))


def _version_of(targets: bytes) -> int:
    return parse(Targets, targets, "targets", cap=MAX_METADATA_FILE).signed.version


def _title(role: str) -> str:
    return "Image targets" if role == Targets.type else f"family {role}"
