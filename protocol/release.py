"""What both TUF repositories say of a bundle in ``custom``, and the paths it lives under.

The Image repository (offline keys) says what may run at all; the Director (online keys) says what one device should
run. A device installs only where both agree on length, hashes and `Release`; see docs/explanation/trust.md. TUF's own
rules are python-tuf's; the decision to install is ``agent/core/admission.py``'s.
"""

import re
from typing import Any

import msgspec

from protocol.manifest import Manifest, Needs, TensorSpec
from protocol.names import FAMILY_NAME, MODEL_NAME, VARIANT_NAME, check_name
from protocol.states import Task

DEFAULT_FAMILY = "main"
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


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """Why the Director gives a device this bundle: ``custom.assignment``."""

    rollout: str  # id of the deployment or rollout
    attempt: int = 1  # a (digest, attempt) that failed is final


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


def _without_floats(value: Any) -> Any:
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {key: _without_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(item) for item in value]
    return value
