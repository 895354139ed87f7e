"""What both TUF repositories say of a bundle in ``custom``, and the paths it lives under.

The Image repository (offline keys) says what may run at all; the Director (online keys) says what one device should
run. A device installs only where both agree on length, hashes and `Release`; see docs/explanation/trust.md. TUF's own
rules are python-tuf's; the decision to install is ``agent/core/admission.py``'s.
"""

import re
from typing import Annotated, Any

import msgspec

from protocol.manifest import Manifest, Needs, TensorSpec
from protocol.names import FAMILY_NAME, MODEL_NAME, VARIANT_NAME, check_name
from protocol.states import Task

DEFAULT_FAMILY = "main"
# No names for a family with keys of its own: TUF's roles, and how people call the offline roles.
RESERVED_FAMILIES = frozenset(
    {"root", "targets", "snapshot", "timestamp", "image-root", "image-targets", "director-root", "online"}
    | {DEFAULT_FAMILY}
)
YANKED = "yanked"  # custom.yanked: why a bundle must not be newly installed
MAX_YANK_REASON = 200  # characters
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of a floor: its file is empty
ZSTD, ZSTD_PATCH, BSDIFF = (
    "zstd",
    "zstd-patch",
    "bsdiff",
)  # how a delta was made; devices pass over what they do not know
DELTA_METHODS = (ZSTD, ZSTD_PATCH, BSDIFF)
NO_BASE = "none"  # instead of a base's digest: the delta is the bundle itself, compressed
_BUNDLE_PATH = re.compile(
    rf"models/({FAMILY_NAME.pattern})/({MODEL_NAME.pattern})-([1-9][0-9]{{0,9}})-({VARIANT_NAME.pattern})\.ewb"
)
_FLOOR_PATH = re.compile(rf"models/({FAMILY_NAME.pattern})/({MODEL_NAME.pattern})\.floor")


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and needs of a published bundle: ``custom.release``, the same in both repositories."""

    model: str
    version: int
    variant: str
    family: str = DEFAULT_FAMILY
    task: Task = Task.CLASSIFICATION
    title: str = ""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    needs: Needs


class ShadowTerms(msgspec.Struct, frozen=True, kw_only=True):
    """How a candidate is compared before it serves. Shares in per mille: what is signed has no fractions."""

    share: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100  # of the live requests
    requests: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 200  # compared before a verdict
    seconds: Annotated[int, msgspec.Meta(ge=1, le=7 * 86400)] = 600  # the verdict comes no later
    agreement: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 950  # of the answers must name the same class


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """A smaller way to a bundle: what to fetch and how it is applied. The rebuilt bundle must be the signed one."""

    method: str  # one of DELTA_METHODS, or one that came later
    length: int  # bytes of the delta
    sha256: str  # of the delta, hex


class Assignment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why and how the Director gives a device this bundle: ``custom.assignment``."""

    rollout: str  # id of the deployment or rollout
    attempt: int = 1  # a (digest, attempt) that failed is final
    forced: bool = False  # hold, maintenance hours and the loop breaker do not bind it
    shadow: ShadowTerms | None = None  # None: it serves after its trial at once
    deltas: dict[str, Delta] = {}  # by the digest of the bundle each starts from, or NO_BASE


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings the fleet gives a device, signed with its desired state. None: the device's own setting stands."""

    window_seconds: int | None = None


class DirectorScope(msgspec.Struct, frozen=True, kw_only=True):
    """``custom`` in the signed part of Director targets: whom it is for, and when it was made."""

    device: str
    issued: int  # UTC ms; also the device's clock floor
    config: DeviceConfig = DeviceConfig()


def release_of(manifest: Manifest, family: str = DEFAULT_FAMILY) -> Release:
    """Return the release that a published manifest stands for."""
    return Release(
        model=manifest.model,
        version=manifest.version,
        variant=manifest.variant,
        family=family,
        task=manifest.task,
        title=manifest.title,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        needs=manifest.needs,
    )


def to_custom(release: Release) -> dict[str, Any]:
    """Return ``custom.release`` as it is signed.

    TUF signs canonical JSON, which has no fractions: a float (a tensor's scale) travels as its shortest exact text.
    """
    signed: dict[str, Any] = _without_floats(msgspec.to_builtins(release))
    return signed


def from_custom(custom: object) -> Release:
    """Return the release that a signed ``custom.release`` stands for; raise `msgspec.ValidationError`."""
    return msgspec.convert(custom, Release, strict=False)  # lax, because floats come as text


def bundle_path(release: Release) -> str:
    """Return the TUF target path of a release. Meaning is never read back from the path."""
    check_name("family", release.family, FAMILY_NAME)
    check_name("model", release.model, MODEL_NAME)
    check_name("variant", release.variant, VARIANT_NAME)
    return f"models/{release.family}/{release.model}-{release.version}-{release.variant}.ewb"


def is_bundle_path(path: str) -> bool:
    """Tell bundles from the other targets of a repository."""
    return _BUNDLE_PATH.fullmatch(path) is not None


def floor_path(family: str, model: str) -> str:
    """Return the TUF target path whose ``custom.floor`` is the lowest version of a model that may run."""
    return f"models/{check_name('family', family, FAMILY_NAME)}/{check_name('model', model, MODEL_NAME)}.floor"


def is_floor_path(path: str) -> bool:
    """Tell floors from bundles."""
    return _FLOOR_PATH.fullmatch(path) is not None


def model_of_floor(path: str) -> str:
    """Return the model that a floor's path is about."""
    match = _FLOOR_PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is not the path of a floor")
    return match[2]


def family_of_path(path: str) -> str:
    """Return the family under which a bundle or floor lives: what a delegation covers."""
    match = _BUNDLE_PATH.fullmatch(path) or _FLOOR_PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is neither the path of a bundle nor of a floor")
    return match[1]


def family_pattern(family: str) -> str:
    """Return the only path pattern of a delegated family. TUF matches segment by segment."""
    return f"models/{check_name('family', family, FAMILY_NAME)}/*"


def yanked_reason(custom: object) -> str | None:
    """Return why a target was yanked, None when it was not; raise ValueError for a mark that is not a reason."""
    reason = custom.get(YANKED) if isinstance(custom, dict) else None
    if reason is not None and not (isinstance(reason, str) and 0 < len(reason) <= MAX_YANK_REASON):
        raise ValueError(f"custom.{YANKED} must be a reason of 1 to {MAX_YANK_REASON} characters")
    return reason


def _without_floats(value: Any) -> Any:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {key: _without_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(item) for item in value]
    return value
