"""Signs desired states: a TUF repository per device, made on the spot from the server's online keys.

Knows TUF's shape of a desired state (Uptane's Director: one number for targets, snapshot and timestamp,
seven days' life). What a device should run, and the number, come from `fleet_server.rollouts`.
"""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from tuf.api.metadata import MetaFile, Snapshot, TargetFile, Targets, Timestamp

from fleet_server.adapters.durable import make_private_folder
from fleet_server.adapters.online_keys import OnlineSigners
from fleet_server.adapters.root_chain import RootChain
from fleet_server.ports import Assigned, SignedDesire
from fleet_server.rollouts import DESIRE_LIFE_MS
from protocol.release import DeviceConfig, DirectorScope, to_custom

ONLINE_ROLES = (Targets.type, Snapshot.type, Timestamp.type)


class OnlineDirector:
    """`ports.Director` on a folder: ``<role>.pem`` and ``roots/``."""

    def __init__(self, folder: Path) -> None:
        make_private_folder(folder)
        self._signers = OnlineSigners(folder, ONLINE_ROLES)
        self._roots = RootChain(folder / "roots", "Director", self._signers.key_ids())

    def online_keys(self) -> dict[str, bytes]:
        return self._signers.public()

    def roots(self) -> Sequence[bytes]:
        return self._roots.all

    def check_root(self, root: bytes) -> None:
        self._roots.check(root)

    def accept_root(self, root: bytes) -> None:
        self._roots.check(root)
        self._roots.add(root)

    def sign(
        self, device_id: str, version: int, assigned: Sequence[Assigned], config: DeviceConfig, now: int
    ) -> SignedDesire:
        expires = time_of(now + DESIRE_LIFE_MS)
        scope = DirectorScope(device=device_id, issued=now, config=config)
        targets = Targets(
            version=version,
            expires=expires,
            targets={a.bundle.path: _target_file(a) for a in assigned},
            unrecognized_fields={"custom": msgspec.to_builtins(scope)},
        )
        snapshot = Snapshot(version=version, expires=expires, meta={"targets.json": MetaFile(version)})
        timestamp = Timestamp(version=version, expires=expires, snapshot_meta=MetaFile(version))
        return SignedDesire(
            device=device_id,
            version=version,
            assigned=tuple(assigned),
            config=config,
            timestamp=self._signers.sign(timestamp),
            snapshot=self._signers.sign(snapshot),
            targets=self._signers.sign(targets),
            issued_at=now,
            expires_at=milliseconds_of(expires),
        )


def time_of(milliseconds: int) -> datetime:
    """Return TUF's form of a time; TUF knows whole seconds only."""
    return datetime.fromtimestamp(milliseconds // 1000, timezone.utc)


def milliseconds_of(time: datetime) -> int:
    """Return UTC ms."""
    return int(time.timestamp()) * 1000


def _target_file(assigned: Assigned) -> TargetFile:
    bundle = assigned.bundle
    custom = {"release": to_custom(bundle.release), "assignment": msgspec.to_builtins(assigned.assignment)}
    return TargetFile(bundle.length, {"sha256": bundle.sha256}, bundle.path, {"custom": custom})
