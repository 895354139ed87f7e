"""Signs desired states: a TUF repository per device, made on the spot from the server's online keys.

Knows TUF's shape of a desired state (Uptane's Director: one number for targets, snapshot and timestamp,
seven days' life). What a device should run, and the number, come from `fleet_server.rollouts`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from tuf.api.metadata import MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fleet_server.adapters.durable import make_private_folder
from fleet_server.adapters.online_keys import OnlineSigners
from fleet_server.adapters.root_chain import RootChain, milliseconds_of, role_fact, time_of
from fleet_server.ports import Assigned, RoleFact, SignedDesire
from fleet_server.rollouts import DESIRE_LIFE_MS
from protocol.commands import PAYLOAD_TYPE, Command, encode_command
from protocol.messages import CommandEnvelope
from protocol.release import DeviceConfig, DirectorScope, to_custom

ONLINE_ROLES = (Targets.type, Snapshot.type, Timestamp.type)


class OnlineDirector:
    """`ports.Director` and `ports.CommandSigner` on a folder: ``<role>.pem`` and ``roots/``."""

    def __init__(self, folder: Path, *, on_signed: Callable[[], None] = lambda: None) -> None:
        """Load or make everything; ``on_signed`` is for those who count desired states."""
        self._on_signed = on_signed
        make_private_folder(folder)
        self._signers = OnlineSigners(folder, ONLINE_ROLES)
        self._roots = RootChain(folder / "roots", "Director", self._signers.accepted)
        self._follow()

    def online_keys(self) -> dict[str, bytes]:
        return self._signers.public()

    def roots(self) -> Sequence[bytes]:
        return self._roots.all

    def check_root(self, root: bytes) -> None:
        self._roots.check(root)

    def accept_root(self, root: bytes) -> None:
        self._roots.check(root)
        self._roots.add(root)
        self._follow()

    def make_next_keys(self) -> None:
        self._signers.make_next()

    def root_fact(self) -> RoleFact | None:
        return role_fact("director-root", self._roots.newest, self._roots.newest, Root.type) if self.roots() else None

    def vouches_for(self, desire: SignedDesire) -> bool:
        root = self._roots.newest
        signed = {Targets.type: desire.targets, Snapshot.type: desire.snapshot, Timestamp.type: desire.timestamp}
        return all(_signers_of(data) & set(root.roles[role].keyids) for role, data in signed.items())

    def _follow(self) -> None:
        """Sign with the next keys from the root on that names them; also when the process ended in between."""
        if self._roots.all:
            self._signers.follow(self._roots.newest)

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
        self._on_signed()
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

    def sign_command(self, command: Command) -> CommandEnvelope:
        return self._signers.envelope(Targets.type, encode_command(command), PAYLOAD_TYPE)


class _Signature(msgspec.Struct, frozen=True):
    keyid: str


class _SignedBySomeone(msgspec.Struct, frozen=True):
    signatures: tuple[_Signature, ...]


def _signers_of(metadata: bytes) -> set[str]:
    """Return the ids of the keys under metadata that this server signed itself; nothing is verified."""
    return {s.keyid for s in msgspec.json.decode(metadata, type=_SignedBySomeone).signatures}


def _target_file(assigned: Assigned) -> TargetFile:
    bundle = assigned.bundle
    custom = {"release": to_custom(bundle.release), "assignment": msgspec.to_builtins(assigned.assignment)}
    return TargetFile(bundle.length, {"sha256": bundle.sha256}, bundle.path, {"custom": custom})
