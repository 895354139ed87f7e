"""From files to loaded, checked models: bundle folders, and for unmanaged serving bundle files and bare ``.tflite``.

Nothing serves before its tensors are those the manifest promises and its golden samples agree; running them warms
it up too. Whether a bundle may be trusted is decided before it gets here. `CannotServe` carries the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from agent.core.delegates import Delegate
from agent.inference.tensors import Signature
from protocol.bundle import BadBundle, digest_of_stream, unpack
from protocol.manifest import MANIFEST_NAME, BadManifest, Calibrator, Golden, Manifest, TensorSpec, decode_manifest
from protocol.names import MAX_MANIFEST, MODEL_NAME
from protocol.states import RuntimeName, Task
from runtime.golden import GoldenMismatch, GoldenUnreadable, check_golden
from runtime.images import ImageReader
from runtime.interpreter import (
    AUTO,
    ExternalDelegate,
    LoadedModel,
    ModelUnloadable,
    RuntimeMissing,
    available,
    open_model,
)

QUANTISATION_TOLERANCE = 1e-6  # relative: a scale is a float32 in the file and a decimal in the manifest


class CannotServe(Exception):
    """This bundle cannot be served here; the message says why."""


class WrongTensors(CannotServe):
    """The model's tensors are not those that its manifest promises."""


@dataclass(frozen=True, kw_only=True)
class Servable:
    """What there is to serve: where the model is, and what is known of it."""

    model: str
    version: int
    digest: str
    path: Path
    manifest: Manifest | None = None  # a bare .tflite has none

    @property
    def calibrator(self) -> Calibrator | None:
        """Return the calibrator of the confidence, if there is one."""
        return self.manifest.calibrator if self.manifest else None

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the class names; empty for what is not a classifier."""
        is_classifier = self.manifest and self.manifest.task is Task.CLASSIFICATION
        return self.manifest.classes if self.manifest and is_classifier else ()

    @property
    def golden(self) -> Golden | None:
        """Return what is known of the golden samples."""
        return self.manifest.golden if self.manifest else None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are loaded."""

    runtime: str = AUTO
    threads: int = 1  # of one interpreter
    kernels: str = ""  # see `runtime.interpreter.KERNELS`
    delegate: Delegate | None = None
    instances: int = 1  # interpreters of one model, each with its own copy of the weights


# ---------------------------------------------------------------- finding
def from_folder(folder: Path, digest: str) -> Servable:
    """Return what an extracted bundle holds; raise `CannotServe`. An unpublished one counts as version 1."""
    manifest = _read_manifest(folder / MANIFEST_NAME)
    return Servable(
        model=manifest.model,
        version=manifest.version or 1,
        digest=digest,
        path=folder / manifest.model_member,
        manifest=manifest,
    )


def from_argument(path: Path, scratch: Path) -> Servable:
    """Return what a bundle folder, an ``.ewb`` (unpacked into ``scratch``) or a ``.tflite`` holds."""
    if path.is_dir():
        return from_folder(path, _digest(path / MANIFEST_NAME))
    if path.suffix == ".ewb":
        folder = scratch / path.stem
        folder.mkdir()
        unpack_file(path, folder)
        return from_folder(folder, _digest(path))
    if path.suffix == ".tflite":
        name = re.sub(r"[^a-z0-9_-]", "-", path.stem.lower()).lstrip("_-")[:63]
        if not MODEL_NAME.fullmatch(name):
            raise CannotServe(f"{path}: no model name can be made of {path.stem!r}; rename the file")
        return Servable(model=name, version=1, digest=_digest(path), path=path)
    raise CannotServe(f"{path}: not a bundle folder, an .ewb bundle or a .tflite model")


def unpack_file(path: Path, folder: Path) -> Manifest:
    """Unpack a bundle into an empty folder; raise `CannotServe`."""
    try:
        with path.open("rb") as source:
            return unpack(source, lambda name: _create(folder / name))
    except BadBundle as error:
        raise CannotServe(f"{path}: {error}") from error
    except OSError as error:
        raise CannotServe(f"{path}: cannot be unpacked: {error}") from error


def _create(path: Path) -> IO[bytes]:
    return path.open("xb")


def _read_manifest(path: Path) -> Manifest:
    try:
        with path.open("rb") as source:
            return decode_manifest(source.read(MAX_MANIFEST + 1))
    except OSError as error:
        raise CannotServe(f"{path}: cannot be read: {error.strerror}") from error
    except BadManifest as error:
        raise CannotServe(f"{path}: {error}") from error


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as source:
            return digest_of_stream(source)
    except OSError as error:
        raise CannotServe(f"{path}: cannot be read: {error.strerror}") from error


# ---------------------------------------------------------------- loading
def load(servable: Servable, settings: Settings) -> tuple[tuple[LoadedModel, ...], Signature]:
    """Load every worker's copy, check and warm it; raise `CannotServe` with nothing left open."""
    models: list[LoadedModel] = []
    try:
        for _ in range(settings.instances):
            models.append(load_one(servable, settings))
            run_golden(servable, models[-1])
    except CannotServe:
        for model in models:
            model.close()
        raise
    return tuple(models), _signature(servable, models[0])


def load_one(servable: Servable, settings: Settings) -> LoadedModel:
    """Load one copy and check its tensors; raise `CannotServe`."""
    try:
        model = open_model(
            servable.path,
            runtime=choose_runtime(servable, settings),
            threads=settings.threads,
            kernels=settings.kernels,
            delegate=_external(settings.delegate),
        )
    except (ModelUnloadable, RuntimeMissing, ValueError, MemoryError) as error:
        raise CannotServe(f"{servable.model} {servable.version}: {_said(error)}") from error
    try:
        check_tensors(servable, model)
    except CannotServe:
        model.close()
        raise
    return model


def _external(delegate: Delegate | None) -> ExternalDelegate | None:
    if delegate is None:
        return None
    return ExternalDelegate(delegate.library, {name: str(value) for name, value in delegate.options.items()})


def choose_runtime(servable: Servable, settings: Settings) -> str:
    """Return the runtime for a model: the one that is set, else the first here that the manifest allows."""
    if settings.runtime != AUTO or servable.manifest is None:
        return settings.runtime
    allowed = servable.manifest.needs.runtimes
    usable: Sequence[RuntimeName] = [name for name in available() if name in allowed]
    if not usable:
        names = ", ".join(name.value for name in allowed)
        raise CannotServe(f"{servable.model} {servable.version} needs one of {names}, which this device has not")
    return usable[0].value


def check_tensors(servable: Servable, model: LoadedModel) -> None:
    """Raise `WrongTensors` when the model's tensors are not those that the manifest promises."""
    if servable.manifest is None:
        return
    for kind, promised, actual in (
        ("input", servable.manifest.inputs, model.inputs),
        ("output", servable.manifest.outputs, model.outputs),
    ):
        if len(promised) != len(actual):
            raise WrongTensors(f"the manifest promises {len(promised)} {kind}s, the model has {len(actual)}")
        for spec, found in zip(promised, actual, strict=True):
            _check_tensor(kind, spec, found)


def _check_tensor(kind: str, promised: TensorSpec, found: TensorSpec) -> None:
    if promised.dtype != found.dtype or not _shape_fits(promised.shape, found.shape):
        raise WrongTensors(
            f"{kind} {promised.name!r}: the manifest promises {promised.dtype} {list(promised.shape)}, "
            f"the model has {found.dtype} {list(found.shape)}"
        )
    if promised.scale is not None and not _same_quantisation(promised, found):
        raise WrongTensors(
            f"{kind} {promised.name!r}: the manifest promises scale {promised.scale} and zero point "
            f"{promised.zero_point}, the model has {found.scale} and {found.zero_point}"
        )


def _shape_fits(promised: Sequence[int], found: Sequence[int]) -> bool:
    return len(promised) == len(found) and all(p in (-1, f) for p, f in zip(promised, found, strict=True))


def _same_quantisation(promised: TensorSpec, found: TensorSpec) -> bool:
    if promised.scale is None or found.scale is None:
        return promised.scale is found.scale
    close = abs(promised.scale - found.scale) <= QUANTISATION_TOLERANCE * abs(found.scale)
    return close and (promised.zero_point or 0) == (found.zero_point or 0)


def run_golden(servable: Servable, model: LoadedModel) -> int:
    """Run the golden samples and return how many agreed; raise `CannotServe` at the first that does not."""
    if servable.golden is None:
        return 0
    try:
        return check_golden(model, servable.path.parent / servable.golden.member, servable.golden).samples
    except (GoldenMismatch, GoldenUnreadable, RuntimeError, ValueError, MemoryError) as error:
        raise CannotServe(f"{servable.model} {servable.version}: {_said(error)}") from error


def _said(error: Exception) -> str:
    return "out of memory" if isinstance(error, MemoryError) else str(error).strip()


def _signature(servable: Servable, model: LoadedModel) -> Signature:
    """Return the tensors under the manifest's names, with the sizes that were really allocated."""
    promised = servable.manifest
    return Signature(
        model=servable.model,
        version=servable.version,
        inputs=_named(promised.inputs if promised else model.inputs, model.inputs),
        outputs=_named(promised.outputs if promised else model.outputs, model.outputs),
        classes=servable.classes,
        image=_image_reader(promised, model),
    )


def _image_reader(promised: Manifest | None, model: LoadedModel) -> ImageReader | None:
    if promised is None or promised.preprocess is msgspec.UNSET:
        return None
    return ImageReader(model.inputs[0], promised.preprocess)


def _named(named: Sequence[TensorSpec], actual: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name.name, dtype=spec.dtype, shape=spec.shape, scale=spec.scale, zero_point=spec.zero_point)
        for name, spec in zip(named, actual, strict=True)
    )
