"""How the server and its trust are doing, gathered for the API and the console alike."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone

import msgspec

import protocol
from fleet_server.api_types import DeviceView, ModelVersion, Overview, RoleStatus, TrustStatus
from fleet_server.core.expiry import remind
from fleet_server.ports import Director, ImageRepository, RoleFact
from fleet_server.web.services import Parts


class _Signed(msgspec.Struct, frozen=True):
    """The part of TUF metadata that people are shown; verified when it was accepted."""

    version: int
    expires: str


class _Metadata(msgspec.Struct, frozen=True):
    signed: _Signed


def overview_of(parts: Parts, devices: Sequence[DeviceView]) -> Overview:
    """Return the figures of the first page."""
    reports, dead_letters = parts.queries.counts()
    return Overview(
        version=protocol.__version__,
        epoch=parts.epoch,
        now=parts.clock(),
        trust_ready=_is_ready(parts),
        broker_up=parts.broker_up(),
        devices=dict(Counter(device.presence.value for device in devices)),
        reports=reports,
        dead_letters=dead_letters,
        trust_warnings=trust_warnings(parts.director, parts.image, parts.clock()),
    )


def versions_of(parts: Parts) -> tuple[ModelVersion, ...]:
    """Return every published version, with what the Image repository says against it."""
    return tuple(
        msgspec.structs.replace(version, hindrance=parts.image.hindrance(version.sha256))
        for version in parts.queries.model_versions()
    )


def trust_of(parts: Parts) -> TrustStatus:
    """Return which signed metadata is in force."""
    first_root = parts.image.first_root()
    targets = _signed(parts.image.metadata("targets.json"))
    image_root = _signed(parts.image.metadata("root.json"))
    return TrustStatus(
        ready=_is_ready(parts),
        ca_key_sha256=parts.authority.ca_key_sha256(),
        image_root_sha256=hashlib.sha256(first_root).hexdigest() if first_root else None,
        image_root_version=image_root.version if image_root else None,
        director_root_version=len(parts.director.roots()) or None,
        targets_version=targets.version if targets else None,
        targets_expires=targets.expires if targets else None,
        roles=roles_of(parts.director, parts.image, parts.clock()),
        targets_versions=_targets_versions(parts.image.roles()),
    )


def roles_of(director: Director, image: ImageRepository, now: int) -> tuple[RoleStatus, ...]:
    """Return every role of both repositories, and when someone must act."""
    return tuple(_role_status(fact, now) for fact in role_facts(director, image))


def role_facts(director: Director, image: ImageRepository) -> tuple[RoleFact, ...]:
    """Return every role of both repositories as it is in force."""
    root = director.root_fact()
    return (*([root] if root else []), *image.roles())


def trust_warnings(director: Director, image: ImageRepository, now: int) -> tuple[str, ...]:
    """Return what people must do soon, a sentence each."""
    return tuple(role.warning for role in roles_of(director, image, now) if role.warning)


def _role_status(fact: RoleFact, now: int) -> RoleStatus:
    reminder = remind(fact.name, fact.expires_at, now)
    return RoleStatus(
        name=fact.name,
        version=fact.version,
        expires=datetime.fromtimestamp(fact.expires_at / 1000, timezone.utc).isoformat(),
        days_left=reminder.days_left,
        threshold=fact.threshold,
        keys=fact.keys,
        warning=reminder.warning,
        command=reminder.command,
    )


def _targets_versions(roles: Sequence[RoleFact]) -> dict[str, int]:
    others = {"image-root", "image-snapshot", "image-timestamp"}
    return {
        "targets" if fact.name == "image-targets" else fact.name: fact.version
        for fact in roles
        if fact.name not in others
    }


def _is_ready(parts: Parts) -> bool:
    return parts.image.first_root() is not None and bool(parts.director.roots())


def _signed(metadata: bytes | None) -> _Signed | None:
    return msgspec.json.decode(metadata, type=_Metadata).signed if metadata else None
