"""What both repositories say, put side by side: which targets stand, and whom a fault concerns.

The Director says what this device should run, the Image repository what may run at all. Signatures, versions and
expiry are settled before it gets here. Pure: words of both in; targets, each with an objection or without, out.

A fault condemns the whole desired state when only the Director can be at fault: its list is not what a sound
server signs. It concerns one target when the Image repository's own word can be its cause (a floor, a yank, the keys
of one family) or when the bundle was agreed on before: then the other models' updates and rollbacks must go on.
docs/explanation/trust.md has the table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from agent.core.admission import object_to_age
from agent.core.facts import Objection, Target
from protocol.names import IllegalName
from protocol.release import YANKED, Assignment, Release, bundle_path, floor_path, from_custom, is_bundle_path
from protocol.states import RejectReason

S = TypeVar("S")

_HASH = "sha256"
# What passes when the release team, or the server, has put its metadata in order: worth asking again.
PASSING = frozenset(RejectReason) - {RejectReason.BELOW_FLOOR, RejectReason.YANKED}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one repository says of one target."""

    length: int
    hashes: Mapping[str, str]
    custom: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Word:
    """The Image repository's word on one target that the Director names."""

    released: Said | None  # None: it does not name it
    floor: Said | None  # of this model's floor target
    delegated: bool  # a family's own keys speak for this path
    fault: Objection | None = None  # why that family's role cannot be believed


class Condemned(Exception):
    """The desired state as a whole is not to be followed."""

    def __init__(self, objection: Objection) -> None:
        """Name the attack or fault."""
        super().__init__(objection.detail)
        self.objection = objection


def read_wanted(listed: Mapping[str, Said]) -> dict[str, Target]:
    """Return the Director's list by path; raise `Condemned` when it is not what a sound server signs."""
    wanted = {path: _wanted(path, said) for path, said in sorted(listed.items())}
    models = [target.release.model for target in wanted.values()]
    if len(set(models)) != len(models):
        raise _condemned(RejectReason.MALFORMED, f"a model is named twice: {', '.join(models)}")
    return wanted


def is_doubtful(target: Target, word: Word) -> bool:
    """Tell whether it matters for this target that its bundle was agreed on, and stored, before."""
    return bool(_fault(target, word) or _yank(word))


def agree(target: Target, word: Word, *, known_floor: int, held: bool) -> Target:
    """Return the target as both repositories have it, with an objection where they differ; raise `Condemned`.

    ``known_floor`` is the highest floor seen before. ``held``: the very bundle is in this device's store, verified.
    """
    if fault := _fault(target, word):
        if not held and not word.delegated:
            raise Condemned(fault)
        return replace(target, floor=known_floor, objection=fault)
    floor = max(known_floor, _floor(word))
    objection = object_to_age(target.release, floor) or (None if held else _yank(word))
    return replace(target, floor=floor, objection=objection)


def path_of_floor(target: Target) -> str:
    """Return the path under which the Image repository keeps the floor of a target's model."""
    return floor_path(target.release.family, target.release.model)


# ------------------------------------------------------------ the Director's list
def _wanted(path: str, said: Said) -> Target:
    if not is_bundle_path(path):
        raise _condemned(RejectReason.MALFORMED, f"{path} is not the path of a bundle")
    if set(said.hashes) != {_HASH}:
        raise _condemned(RejectReason.MALFORMED, f"{path}: only SHA-256 hashes are known")
    release = _release(path, said)
    # A family signs for its own paths only; a release must not claim more than its path.
    if _path_of(release) != path:
        raise _condemned(RejectReason.DISAGREEMENT, f"{path}: the release belongs under another path")
    assignment = _convert(said.custom.get("assignment"), Assignment, f"the assignment of {path}")
    return Target(release=release, assignment=assignment, sha256=said.hashes[_HASH], length=said.length)


def _release(path: str, said: Said) -> Release:
    try:
        return from_custom(said.custom.get("release"))
    except msgspec.ValidationError as error:
        raise _condemned(RejectReason.MALFORMED, f"the release of {path}: {error}") from error


def _path_of(release: Release) -> str:
    try:
        return bundle_path(release)
    except IllegalName as error:
        raise _condemned(RejectReason.MALFORMED, str(error)) from error


# ------------------------------------------------------------ the Image repository's word
def _fault(target: Target, word: Word) -> Objection | None:
    """Return how the Image repository's word differs from the Director's, or why there is none."""
    path = _path_of(target.release)
    if word.fault:
        return word.fault
    if word.released is None:
        return _not(RejectReason.NOT_RELEASED, f"the Image repository does not name {path}")
    if set(word.released.hashes) != {_HASH}:
        return _not(RejectReason.MALFORMED, f"{path}: only SHA-256 hashes are known")
    try:
        differs = _difference(target, word.released, path)
        _floor(word)
    except Condemned as unreadable:
        return unreadable.objection
    return _not(RejectReason.DISAGREEMENT, f"{path}: the repositories differ in {differs}") if differs else None


def _difference(target: Target, released: Said, path: str) -> str:
    if (released.length, released.hashes[_HASH]) != (target.length, target.sha256):
        return "length or hash"
    return "" if _release(path, released) == target.release else "the release"


def _yank(word: Word) -> Objection | None:
    """Return the objection of a yank. Whatever stands there is one: a mark that cannot be read is no permission."""
    said = word.released.custom.get(YANKED) if word.released else None
    return None if said is None else _not(RejectReason.YANKED, f"the release team took it back: {said}")


class _Floor(msgspec.Struct, frozen=True, kw_only=True):
    floor: int


def _floor(word: Word) -> int:
    return _convert(word.floor.custom, _Floor, "the floor").floor if word.floor else 0


def _convert(value: object, kind: "type[S]", what: str) -> "S":
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _condemned(RejectReason.MALFORMED, f"{what}: {error}") from error


def _not(reason: RejectReason, detail: str) -> Objection:
    return Objection(reason=reason, detail=detail)


def _condemned(reason: RejectReason, detail: str) -> Condemned:
    return Condemned(_not(reason, detail))
