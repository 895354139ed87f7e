"""What a bundle says of itself: ``manifest.json``, strict.

The manifest lists every other member with its SHA-256, the tensor contract, what the model needs to run, and how
it was tested and calibrated. Unknown fields are errors. It is written by ``converters/pack.py``; publishing only
fills in the version.
"""

import math
from enum import Enum

import msgspec

from protocol.names import (
    MAX_CLASSES,
    MAX_MANIFEST,
    MAX_MEMBERS,
    MAX_VERSION,
    MEMBER_NAME,
    MODEL_NAME,
    SHA256_HEX,
    VARIANT_NAME,
    IllegalName,
    check_name,
)
from protocol.states import RuntimeName, Task

MANIFEST_FORMAT = 1
MANIFEST_NAME = "manifest.json"
UNPUBLISHED = 0  # version of a bundle that has not been published yet


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a manifest."""


class TensorSpec(Strict, frozen=True, kw_only=True):
    """One input or output. ``shape`` has -1 where the size may vary; the batch dimension comes first."""

    name: str
    dtype: str  # Open Inference Protocol names: INT8, UINT8, FP32, …
    shape: tuple[int, ...]
    scale: float | None = None  # quantisation: real = (q - zero_point) * scale
    zero_point: int | None = None


class Needs(Strict, frozen=True, kw_only=True):
    """What a device must have."""

    runtimes: tuple[RuntimeName, ...] = (RuntimeName.LITERT, RuntimeName.TFLITE_RUNTIME)
    memory: int  # bytes that loading and running takes, measured in the trial child at packing
    device_classes: tuple[str, ...] = ()  # empty: any


class Golden(Strict, frozen=True, kw_only=True):
    """Golden samples: an ``.npz`` with an array per input (``in_<k>``) and output (``out_<k>``), samples first."""

    member: str = "golden.npz"
    samples: int
    tolerance: float  # highest allowed absolute difference in the output's own units (quantised: steps)


class Calibrator(Strict, frozen=True, kw_only=True):
    """Turns scores into probabilities: softmax(log(p) / temperature), fitted on held-out data (Guo et al. 2017)."""

    temperature: float
    samples: int  # n it was fitted on


class Reference(Strict, frozen=True, kw_only=True):
    """What the model did on held-out data, through the quantised model; drift is measured against it."""

    samples: int
    confidence: tuple[int, ...]  # counts in the wire's CONFIDENCE_BINS bins
    classes: tuple[int, ...]  # predictions per class
    right: int  # how many of them were right


class Resize(str, Enum):
    """How a picture of another shape becomes the model's."""

    STRETCH = "stretch"  # the whole picture; its proportions may change
    CROP = "crop"  # the largest part in the middle that has the model's proportions


class Preprocess(Strict, frozen=True, kw_only=True):
    """How a picture becomes the first input: real = (pixel - mean) * scale, pixel in 0…255, one of each a channel."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    resize: Resize = Resize.STRETCH


class Manifest(Strict, frozen=True, kw_only=True):
    """The whole manifest."""

    format: int = MANIFEST_FORMAT
    model: str
    version: int = UNPUBLISHED
    variant: str = "int8"
    title: str = ""
    task: Task = Task.CLASSIFICATION
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    classes: tuple[str, ...] = ()
    needs: Needs
    golden: Golden
    reference: Reference | None = None
    calibrator: Calibrator | None = None
    members: dict[str, str]  # member name -> sha256 hex; the manifest itself is not among them
    model_member: str = "model.tflite"
    lineage: dict[str, str] = {}  # recipe, data hash, tool versions
    preprocess: Preprocess | msgspec.UnsetType = msgspec.UNSET  # absent: the model takes tensors only


class BadManifest(ValueError):
    """A manifest is unreadable or contradicts itself; the message names the field."""


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the canonical bytes: sorted keys, two-space indent, final newline."""
    body = msgspec.json.encode(manifest, order="deterministic")
    return msgspec.json.format(body, indent=2) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Return the manifest; raise `BadManifest` naming the field that is wrong."""
    if len(data) > MAX_MANIFEST:
        raise BadManifest(f"{len(data)} bytes are over the cap of {MAX_MANIFEST}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadManifest(str(error)) from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise `BadManifest` when the parts of a manifest do not fit each other."""
    if manifest.format != MANIFEST_FORMAT:
        raise BadManifest(f"format {manifest.format} is not known; this version reads {MANIFEST_FORMAT}")
    _check_names(manifest)
    if not 0 <= manifest.version <= MAX_VERSION:
        raise BadManifest(f"version: {manifest.version} is not in 0…{MAX_VERSION}")
    if not manifest.inputs or not manifest.outputs:
        raise BadManifest("inputs, outputs: a model has at least one of each")
    if manifest.calibrator is not None and not manifest.calibrator.temperature > 0:
        raise BadManifest(f"calibrator.temperature: {manifest.calibrator.temperature} is not above 0")
    _check_members(manifest)
    _check_classes(manifest)
    if manifest.preprocess is not msgspec.UNSET:
        _check_preprocess(manifest.preprocess, manifest.inputs[0])


def _check_names(manifest: Manifest) -> None:
    try:
        check_name("model", manifest.model, MODEL_NAME)
        check_name("variant", manifest.variant, VARIANT_NAME)
        for name, digest in manifest.members.items():
            check_name("members: name", name, MEMBER_NAME)
            check_name(f"members: {name}", digest, SHA256_HEX)
    except IllegalName as error:
        raise BadManifest(str(error)) from error


def _check_members(manifest: Manifest) -> None:
    if len(manifest.members) > MAX_MEMBERS or len(manifest.classes) > MAX_CLASSES:
        raise BadManifest(f"at most {MAX_MEMBERS} members and {MAX_CLASSES} classes are allowed")
    if MANIFEST_NAME in manifest.members:
        raise BadManifest(f"members: {MANIFEST_NAME} cannot list itself")
    for field, name in (("model_member", manifest.model_member), ("golden.member", manifest.golden.member)):
        if name not in manifest.members:
            raise BadManifest(f"{field}: {name!r} is not among the members {sorted(manifest.members)}")


def _check_classes(manifest: Manifest) -> None:
    if manifest.task is not Task.CLASSIFICATION:
        return
    width = manifest.outputs[0].shape[-1] if manifest.outputs[0].shape else 0
    if len(manifest.classes) != width:
        raise BadManifest(
            f"classes: {len(manifest.classes)} names for {width} outputs of {manifest.outputs[0].name!r}"
        )


def _check_preprocess(preprocess: Preprocess, spec: TensorSpec) -> None:
    if len(spec.shape) != len(_NHWC) or spec.shape[3] not in _CHANNELS or min(spec.shape[1:]) < 1:
        raise BadManifest(
            f"preprocess: input {spec.name!r} of shape {list(spec.shape)} takes no picture; "
            f"{_NHWC} with 1 or 3 channels does"
        )
    channels = spec.shape[3]
    if (len(preprocess.mean), len(preprocess.scale)) != (channels, channels):
        raise BadManifest(f"preprocess: mean and scale need {channels} numbers each, one a channel")
    if not all(map(math.isfinite, (*preprocess.mean, *preprocess.scale))) or 0 in preprocess.scale:
        raise BadManifest("preprocess: mean and scale must be numbers, and no scale may be 0")


_NHWC = "NHWC"
_CHANNELS = (1, 3)
