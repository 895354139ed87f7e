"""A small fleet's trust for tests: both TUF repositories with their keys, in memory, and knobs to do wrong.

``world.publish(...)`` signs a bundle into the Image repository, ``world.assign(...)`` lets the Director sign a
desired state for the device. Everything is signed by real keys; an attack is one named argument away.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from agent.adapters.trust import TufTrust
from agent.ports import VerifiedDesire
from protocol.manifest import Needs, TensorSpec
from protocol.messages import DesiredState
from protocol.release import Release, bundle_path, floor_path, to_custom
from protocol.states import RejectReason

NOW = 1_790_000_000_000  # UTC ms; the tests' present
DAY = 86_400_000
_COMPACT = JSONSerializer(compact=True)
_ONLINE = ("targets", "snapshot", "timestamp")


def at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, tz=timezone.utc).replace(microsecond=0)


def make_release(model: str = "digits", version: int = 1, **changes: Any) -> Release:
    facts: dict[str, Any] = {
        "model": model,
        "version": version,
        "variant": "int8",
        "inputs": (TensorSpec(name="image", dtype="INT8", shape=(1, 28, 28, 1), scale=0.00392156862745098),),
        "outputs": (TensorSpec(name="scores", dtype="INT8", shape=(1, 10), scale=0.00390625, zero_point=-128),),
        "needs": Needs(memory=1_000_000),
    }
    return Release(**{**facts, **changes})


def _version_of(metadata: bytes) -> int:
    version: int = Metadata.from_bytes(metadata).signed.version
    return version


@dataclass
class Bundle:
    """A published bundle: what its bytes are and what is said of it."""

    release: Release
    data: bytes

    @property
    def path(self) -> str:
        return bundle_path(self.release)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def target(self, **custom: Any) -> TargetFile:
        said = {"release": to_custom(self.release), **custom}
        return TargetFile(len(self.data), {"sha256": self.sha256}, self.path, {"custom": said})


@dataclass
class Repository:
    """One TUF repository: keys, current content, all roots, and the newest signed files."""

    consistent: bool = False
    now: int = NOW
    keys: dict[str, CryptoSigner] = field(default_factory=dict)
    seconds: dict[str, CryptoSigner] = field(default_factory=dict)  # roles that two keys must sign
    roots: list[bytes] = field(default_factory=list)
    root_version: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    history: list[dict[str, bytes]] = field(default_factory=list)  # the files after each signing

    def __post_init__(self) -> None:
        for role in ("root", *_ONLINE):
            self.keys[role] = CryptoSigner.generate_ed25519()
        self.sign_root()

    def sign_root(self, *, by: Sequence[CryptoSigner] = (), life: int = 365 * DAY) -> bytes:
        """Sign the next root with the present root key, and with ``by``, the one before."""
        self.root_version += 1
        root = Root(version=self.root_version, expires=at(self.now + life), consistent_snapshot=self.consistent)
        for role, signer in self.keys.items():
            if role in root.roles:
                root.add_key(signer.public_key, role)
        for role, signer in self.seconds.items():
            root.add_key(signer.public_key, role)
            root.roles[role].threshold = 2
        metadata = Metadata(root)
        for signer in (self.keys["root"], *by):
            metadata.sign(signer, append=True)
        self.roots.append(metadata.to_bytes(_COMPACT))
        self.files[f"{self.root_version}.root.json"] = self.roots[-1]
        return self.roots[-1]

    def rotate(self, *roles: str) -> bytes:
        """Give roles new keys by a new root, signed by the old root key and the new one."""
        before = self.keys["root"]
        for role in roles:
            self.keys[role] = CryptoSigner.generate_ed25519()
        return self.sign_root(by=(before,) if "root" in roles else ())

    def sign(self, signed: Signed, role: str, *, key: CryptoSigner | None = None) -> bytes:
        metadata: Metadata[Any] = Metadata(signed)
        metadata.sign(key or self.keys[role])
        if role in self.seconds and key is None:
            metadata.sign(self.seconds[role], append=True)
        return metadata.to_bytes(_COMPACT)

    def sign_all(
        self,
        version: int,
        targets: Targets,
        *,
        life: int = 7 * DAY,
        wrong_key: str = "",
        stolen: dict[str, CryptoSigner] | None = None,
        others: dict[str, bytes] | None = None,
        spoil: Callable[[str, Signed], None] = lambda role, signed: None,
    ) -> dict[str, bytes]:
        """Sign targets, snapshot and timestamp under one version; ``others`` are delegated roles' files."""
        expires = at(self.now + life)
        meta = {"targets.json": MetaFile(version=version)}
        meta.update({name: MetaFile(version=_version_of(data)) for name, data in (others or {}).items()})
        content: dict[str, Signed] = {
            "targets": targets,
            "snapshot": Snapshot(version=version, expires=expires, meta=meta),
            "timestamp": Timestamp(version=version, expires=expires, snapshot_meta=MetaFile(version=version)),
        }
        signed = {}
        for role, what in content.items():
            spoil(role, what)
            wrong = CryptoSigner.generate_ed25519() if role == wrong_key else (stolen or {}).get(role)
            signed[f"{role}.json"] = self.sign(what, role, key=wrong)
        self.files.update({**signed, **(others or {})})
        self.history.append(dict(self.files))
        return signed

    def serve(self, name: str, cap: int) -> bytes | None:
        """Answer as the server's HTTPS port does."""
        version, _, rest = name.partition(".")
        plain = rest if version.isdecimal() and rest != "root.json" else name
        return self.files.get(plain)


class TufWorld:
    """Both repositories of a fleet, seen from one device."""

    def __init__(self, device: str = "cam-7", *, consistent: bool = False) -> None:
        self.device = device
        self.director = Repository(consistent=consistent)
        self.image = Repository(consistent=consistent)
        self.released: dict[str, TargetFile] = {}
        self.image_version = 0
        self.director_version = 0
        self.asked: list[str] = []  # Image files that were fetched
        self.failure: Exception | None = None  # what fetching Image files raises

    # ------------------------------------------------------------ the release team
    def publish(self, model: str = "digits", version: int = 1, **changes: Any) -> Bundle:
        bundle = Bundle(make_release(model, version, **changes), f"{model} {version}".encode() * 40)
        self.released[bundle.path] = bundle.target()
        self.sign_image()
        return bundle

    def raise_floor(self, model: str, floor: object, family: str = "main") -> None:
        path = floor_path(family, model)
        self.released[path] = TargetFile(0, {"sha256": "0" * 64}, path, {"custom": {"floor": floor}})
        self.sign_image()

    def sign_image(self, *, life: int = 90 * DAY, **attack: Any) -> None:
        self.image_version += 1
        targets = Targets(version=self.image_version, expires=at(self.image.now + life), targets=dict(self.released))
        self.image.sign_all(self.image_version, targets, life=life, **attack)

    def yank(self, bundle: Bundle, why: object = "it confuses 3 and 8") -> None:
        self.released[bundle.path] = bundle.target(yanked=why)
        self.sign_image()

    def delegate(
        self,
        *bundles: Bundle,
        paths: Sequence[str],
        life: int = 90 * DAY,
        forged: bool = False,
        version: int = 1,
        key: CryptoSigner | None = None,
    ) -> None:
        """Let a role of its own, with a key of its own, sign bundles; it may sign for ``paths`` only."""
        key = key or CryptoSigner.generate_ed25519()
        role = DelegatedRole("team", [key.public_key.keyid], 1, True, list(paths))
        self.image_version += 1
        expires = at(self.image.now + 90 * DAY)
        targets = Targets(
            version=self.image_version,
            expires=expires,
            targets=dict(self.released),
            delegations=Delegations({key.public_key.keyid: key.public_key}, {"team": role}),
        )
        targets_of_team = {bundle.path: bundle.target() for bundle in bundles}
        team = Targets(version=version, expires=at(self.image.now + life), targets=targets_of_team)
        signer = CryptoSigner.generate_ed25519() if forged else key
        others = {"team.json": self.image.sign(team, "team", key=signer)}
        self.image.sign_all(self.image_version, targets, life=90 * DAY, others=others)

    def image_file(self, name: str, cap: int) -> bytes | None:
        self.asked.append(name)
        if self.failure is not None:
            raise self.failure
        return self.image.serve(name, cap)

    # ------------------------------------------------------------ the Director
    def assign(
        self,
        *bundles: Bundle,
        device: str | None = None,
        version: int | None = None,
        issued: int | None = None,
        attempt: int = 1,
        root: Sequence[bytes] = (),
        scope: dict[str, Any] | None = None,
        change: Callable[[TargetFile], None] = lambda target: None,
        life: int = 7 * DAY,
        **attack: Any,
    ) -> DesiredState:
        """Sign a desired state. Without ``version``, the next one."""
        self.director_version = self.director_version + 1 if version is None else version
        targets: dict[str, TargetFile] = {}
        for bundle in bundles:
            target = bundle.target(assignment={"rollout": "r-1", "attempt": attempt})
            change(target)
            targets[target.path] = target
        said = {
            "device": device or self.device,
            "issued": self.director.now if issued is None else issued,
            "config": {},
        }
        signed = Targets(
            version=self.director_version,
            expires=at(self.director.now + life),
            targets=targets,
            unrecognized_fields={"custom": said if scope is None else scope},
        )
        files = self.director.sign_all(self.director_version, signed, life=life, **attack)
        return DesiredState(
            root=tuple(root),
            timestamp=files["timestamp.json"],
            snapshot=files["snapshot.json"],
            targets=files["targets.json"],
        )


# ---------------------------------------------------------------- the device
def open_trust(world: TufWorld, folder: Path, stored: set[str] | None = None, **changes: Any) -> TufTrust:
    parts: dict[str, Any] = {
        "device": "cam-7",
        "director_root": world.director.roots[0],
        "image_root": world.image.roots[0],
        "folder": folder / "trust",
        "scratch": folder / "scratch",
        "image": world.image_file,
        "is_stored": (stored if stored is not None else set()).__contains__,
    }
    return TufTrust(**{**parts, **changes})


def said_of(desire: VerifiedDesire) -> dict[str, RejectReason | None]:
    """Return what is said against each model; None stands for nothing."""
    return {target.release.model: target.objection.reason if target.objection else None for target in desire.targets}
