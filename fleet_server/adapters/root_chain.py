"""The root metadata of one TUF repository on disk: ``1.root.json``, ``2.root.json``, …, each signed by the last.

Verification is python-tuf's. Knows which online keys a root must name, so that what the server signs with them is
valid for those who read it.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import SerializationError

from fleet_server.adapters.durable import read_capped, write_atomically
from fleet_server.ports import RoleFact
from fleet_server.publishing import Refused

MAX_ROOT = 512_000  # bytes; python-tuf's own cap (ngclient/config.py)
K = TypeVar("K", Root, Targets)
_MALFORMED = (RepositoryError, SerializationError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class RootChain:
    """All root versions, oldest first."""

    def __init__(self, folder: Path, name: str, online: Callable[[], Mapping[str, frozenset[str]]]) -> None:
        """Read what is there.

        ``name`` is for messages; ``online`` gives role -> ids of keys on this server, one of which a root must name.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._name = name
        self._online = online
        self._roots = _read_all(folder)

    @property
    def all(self) -> Sequence[bytes]:
        """The exact bytes of every version."""
        return tuple(self._roots)

    @property
    def newest(self) -> Root:
        """The root in force; raises `Refused` when there is none."""
        if not self._roots:
            raise Refused(f"the {self._name} repository has no root yet; make it with: edgewarden keys init")
        return _parse_root(self._roots[-1], self._name).signed

    def check(self, data: bytes, *, replace_first: bool = False) -> Root:
        """Return the root after verifying that it may come next (or is the newest again); raise `Refused`.

        ``replace_first`` allows another version 1, as long as nothing hangs on the one that is there.
        """
        metadata = _parse_root(data, self._name)
        previous = None if replace_first else self._previous(data)
        expected = previous.version + 1 if previous else 1
        if data not in self._roots[-1:] and metadata.signed.version != expected:
            raise Refused(f"{self._name} root: version {metadata.signed.version} came, {expected} is next")
        self._check_signatures(metadata, previous)
        self._check_online_keys(metadata.signed)
        return metadata.signed

    def add(self, data: bytes, *, replace_first: bool = False) -> None:
        """Store a root that `check` let pass; the newest again changes nothing."""
        if data in self._roots[-1:]:
            return
        kept = [] if replace_first else self._roots
        write_atomically(self._folder / f"{len(kept) + 1}.root.json", data)
        self._roots = [*kept, data]

    def _previous(self, data: bytes) -> Root | None:
        """Return the root that must have signed ``data`` too."""
        before = [root for root in self._roots if root != data]
        return _parse_root(before[-1], self._name).signed if before else None

    def _check_signatures(self, metadata: Metadata[Root], previous: Root | None) -> None:
        for signer in (previous, metadata.signed):
            if signer is not None:
                check_signed_by(signer, Root.type, metadata, f"{self._name} root")

    def _check_online_keys(self, root: Root) -> None:
        if root.consistent_snapshot is not True:
            raise Refused(f"{self._name} root: consistent_snapshot must be true")
        for role, key_ids in self._online().items():
            if root.roles[role].threshold != 1 or not key_ids & set(root.roles[role].keyids):
                known = " or ".join(sorted(key_ids))
                raise Refused(f"{self._name} root: {role} must name this server's key {known} with threshold 1")


def _parse_root(data: bytes, name: str) -> Metadata[Root]:
    return parse(Root, data, f"{name} root", cap=MAX_ROOT)


def parse(kind: type[K], data: bytes, name: str, *, cap: int) -> Metadata[K]:
    """Return metadata of a kind (`Root`, `Targets`); raise `Refused`. Nothing of it is verified yet."""
    if len(data) > cap:
        raise Refused(f"{name}: {len(data)} bytes are over the cap of {cap}")
    try:
        metadata = Metadata[K].from_bytes(data)
    except _MALFORMED as error:
        raise Refused(f"{name}: not TUF metadata: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise Refused(f"{name}: this is {metadata.signed.type} metadata")
    return metadata


def check_signed_by(by: Root | Targets, role: str, metadata: Metadata[K], name: str) -> None:
    """Raise `Refused` unless as many of the role's keys signed as ``by``, which delegates to it, wants."""
    try:
        by.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except _MALFORMED as error:
        raise Refused(f"{name}: not signed as {by.type} {by.version} requires: {error}") from error


def role_fact(name: str, signed: Root | Targets | Snapshot | Timestamp, by: Root | Targets, role: str) -> RoleFact:
    """Return what is known of a role: ``by`` is the metadata that delegates to it."""
    delegation = by.get_delegated_role(role)
    return RoleFact(
        name=name,
        version=signed.version,
        expires_at=milliseconds_of(signed.expires),
        threshold=delegation.threshold,
        keys=len(delegation.keyids),
    )


def time_of(milliseconds: int) -> datetime:
    """Return TUF's form of a time; TUF knows whole seconds only."""
    return datetime.fromtimestamp(milliseconds // 1000, timezone.utc)


def milliseconds_of(time: datetime) -> int:
    """Return UTC ms."""
    return int(time.timestamp()) * 1000


def _read_all(folder: Path) -> list[bytes]:
    roots: list[bytes] = []
    while (data := read_capped(folder / f"{len(roots) + 1}.root.json", MAX_ROOT)) is not None:
        roots.append(data)
    return roots
