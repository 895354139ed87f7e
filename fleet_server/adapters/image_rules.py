"""What offline metadata of the Image repository may say, and what it comes to: bundles, floors, families.

Knows legal paths and families, releases that never change, floors that only grow, yanks that stay, and the life of
metadata. Everything else is refused with a sentence. Signatures are looked at before, by `image_repository`; the
bundles themselves after, by `fleet_server.publishing`. The rules for readers are in docs/explanation/trust.md.
"""

from collections.abc import Mapping, Sequence

import msgspec
from tuf.api.metadata import DelegatedRole, TargetFile, Targets

from fleet_server.adapters.root_chain import milliseconds_of
from fleet_server.ports import PublishedBundle
from fleet_server.publishing import Refused
from protocol.names import FAMILY_NAME, MAX_BUNDLE, MAX_VERSION, SHA256_HEX, IllegalName
from protocol.release import (
    EMPTY_SHA256,
    RESERVED_FAMILIES,
    YANKED,
    Release,
    bundle_path,
    family_of_path,
    family_pattern,
    floor_path,
    from_custom,
    is_bundle_path,
    is_floor_path,
    model_of_floor,
    to_custom,
    yanked_reason,
)

DAY_MS = 24 * 3600 * 1000
MAX_TARGETS_LIFE_MS = 90 * DAY_MS
CLOCK_SLACK_MS = 3600 * 1000  # how far the signer's clock may be ahead of ours

Contents = Mapping[str, TargetFile]
"""Every target of all roles by its path, each in the role where it belongs."""


# ---------------------------------------------------------------- roles
def families_in(targets: Targets) -> Sequence[str]:
    """Return the families that are delegated."""
    return list(_delegated_roles(targets))


def check_delegations(before: Targets | None, after: Targets) -> None:
    """Hold delegations to the one shape that devices expect; raise `Refused`."""
    roles = _delegated_roles(after)
    for family, role in roles.items():
        if not FAMILY_NAME.fullmatch(family) or family in RESERVED_FAMILIES:
            raise Refused(f"delegation {family[:80]!r}: this is no name for a delegated family")
        if role.paths != [family_pattern(family)] or role.path_hash_prefixes is not None:
            raise Refused(f"delegation {family}: its path must be {family_pattern(family)}")
        if not role.terminating:
            raise Refused(f"delegation {family}: it must be terminating")
        if len(role.keyids) < role.threshold:
            raise Refused(f"delegation {family}: {len(role.keyids)} keys cannot give {role.threshold} signatures")
    gone = [family for family in (_delegated_roles(before) if before else ()) if family not in roles]
    if gone:
        raise Refused(f"delegation {gone[0]}: it was there and is missing now; give it other keys instead")


def check_expiry(new: Targets, name: str, now: int) -> None:
    """Raise `Refused` unless metadata lives now, and at most ninety days."""
    expires = milliseconds_of(new.expires)
    if expires <= now:
        raise Refused(f"{name}: expired at {new.expires.isoformat()}")
    if expires > now + MAX_TARGETS_LIFE_MS + CLOCK_SLACK_MS:
        raise Refused(f"{name}: expires at {new.expires.isoformat()}, more than 90 days ahead")


def _delegated_roles(targets: Targets) -> Mapping[str, DelegatedRole]:
    if targets.delegations is None:
        return {}
    if targets.delegations.roles is None:
        raise Refused("Image targets: delegations by hash (succinct) are not served here")
    return targets.delegations.roles


# ---------------------------------------------------------------- targets
def check_contents(parts: Mapping[str, Targets]) -> Contents:
    """Return all targets by path, after checking each and that its role may name it; raise `Refused`."""
    contents: dict[str, TargetFile] = {}
    for role, targets in parts.items():
        if role != Targets.type and targets.delegations is not None:
            raise Refused(f"family {role}: it delegates further, which is not served here")
        for path, target in targets.targets.items():
            _check_role(path, role, parts)
            _check_floor(path, target) if is_floor_path(path) else _release_of(path, target)
            contents[path] = target
    _check_models(contents)
    return contents


def check_unchanged(before: Contents, after: Contents) -> None:
    """What was published stays as it is; a floor may rise, a bundle may be yanked once."""
    for path, old in before.items():
        new = after.get(path)
        if new is None:
            raise Refused(f"{path}: was published and is missing now")
        if is_floor_path(path):
            if _floor_in(new) < _floor_in(old):
                raise Refused(f"{path}: the floor falls from {_floor_in(old)} to {_floor_in(new)}; it only grows")
        elif _without_yank(new) != _without_yank(old):
            raise Refused(f"{path}: was published and never changes; publish a new version instead")
        elif yanked_reason(old.custom) not in (None, yanked_reason(new.custom)):
            raise Refused(f"{path}: was yanked, which stays with its reason; publish a new version instead")


def bundles_in(contents: Contents, now: int) -> Sequence[PublishedBundle]:
    """Return every bundle that is named."""
    return [
        PublishedBundle(
            release=_release_of(path, target),
            path=path,
            sha256=target.hashes["sha256"],
            length=target.length,
            published_at=now,
        )
        for path, target in sorted(contents.items())
        if is_bundle_path(path)
    ]


def hindrances_in(contents: Contents) -> Mapping[str, str]:
    """Return, by SHA-256, why bundles must not be newly installed anywhere: yanked, or below the floor."""
    found: dict[str, str] = {}
    for bundle in bundles_in(contents, 0):
        release = bundle.release
        floor = contents.get(floor_path(release.family, release.model))
        what = f"{release.model} {release.version} ({release.variant})"
        if reason := yanked_reason(contents[bundle.path].custom):
            found[bundle.sha256] = f"{what} was yanked: {reason}"
        elif floor is not None and release.version < _floor_in(floor):
            found[bundle.sha256] = f"{what} is below the floor {_floor_in(floor)} of {release.model}"
    return found


def _check_role(path: str, role: str, parts: Mapping[str, Targets]) -> None:
    """Hold each path to the one role that may name it."""
    if not is_bundle_path(path) and not is_floor_path(path):
        raise Refused(f"{path[:120]!r}: neither the path of a bundle nor of a floor")
    family = family_of_path(path)
    if role == Targets.type and family in parts:
        raise Refused(f"{path}: family {family} is delegated; its own keys must sign this")
    if role not in (Targets.type, family):
        raise Refused(f"{path}: the keys of family {role} do not sign for family {family}")


def _release_of(path: str, target: TargetFile) -> Release:
    custom = _custom_of(path, target, {"release", YANKED})
    try:
        release = from_custom(custom.get("release"))
        expected = bundle_path(release)
        yanked_reason(custom)
    except (msgspec.ValidationError, IllegalName, ValueError) as error:
        raise Refused(f"{path}: custom.release: {error}") from error
    if expected != path or not 0 < release.version <= MAX_VERSION:
        raise Refused(f"{path}: custom.release belongs to {expected}")
    if to_custom(release) != custom["release"]:
        raise Refused(f"{path}: custom.release has fields or forms that this server does not know")
    if not 0 < target.length <= MAX_BUNDLE:
        raise Refused(f"{path}: {target.length} bytes are not in 1…{MAX_BUNDLE}")
    if not SHA256_HEX.fullmatch(target.hashes.get("sha256", "")) or len(target.hashes) != 1:
        raise Refused(f"{path}: exactly one hash is wanted, sha256 in hex")
    return release


def _check_floor(path: str, target: TargetFile) -> None:
    _custom_of(path, target, {"floor"})
    _floor_in(target)
    if target.length != 0 or target.hashes != {"sha256": EMPTY_SHA256}:
        raise Refused(f"{path}: a floor has length 0 and the SHA-256 of nothing")


def _floor_in(target: TargetFile) -> int:
    custom = target.custom if isinstance(target.custom, dict) else {}
    floor = custom.get("floor")
    if type(floor) is not int or not 0 < floor <= MAX_VERSION:
        raise Refused(f"{target.path}: custom.floor must be a version number")
    return floor


def _custom_of(path: str, target: TargetFile, known: set[str]) -> dict[str, object]:
    custom = target.custom if isinstance(target.custom, dict) else {}
    unknown = sorted(set(custom) - known)
    if unknown:
        raise Refused(f"{path}: custom.{unknown[0]} is nothing that this server knows")
    return custom


def _without_yank(target: TargetFile) -> object:
    rest = {key: value for key, value in (target.custom or {}).items() if key != YANKED}
    others = {key: value for key, value in target.unrecognized_fields.items() if key != "custom"}
    return target.length, target.hashes, rest, others


def _check_models(contents: Contents) -> None:
    """Model names are unique over all families, and a floor leaves something to run."""
    family: dict[str, str] = {}
    highest: dict[str, int] = {}
    for path, target in sorted(contents.items()):
        if is_bundle_path(path):
            release = _release_of(path, target)
            if family.setdefault(release.model, release.family) != release.family:
                raise Refused(f"{path}: model {release.model} belongs to family {family[release.model]}")
            highest[release.model] = max(release.version, highest.get(release.model, 0))
    for path, target in contents.items():
        if is_floor_path(path) and _floor_in(target) > highest.get(model_of_floor(path), 0):
            top = highest.get(model_of_floor(path), 0)
            raise Refused(f"{path}: floor {_floor_in(target)} is above {top}, the highest published version")
