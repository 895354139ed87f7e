"""A quantised model, labelled samples and class names become a bundle folder.

Everything in the manifest is measured, not claimed: the samples run through the quantised model on every installed
runtime, in a child process. A model that one of them cannot load or run, or that answers differently on two of
them, is refused. (A few samples may differ: where a model is undecided, one rounded accumulator moves a softmax by
several steps. Golden samples are taken from those on which all runtimes agree.) Reference statistics and calibrator
come from the same runs, through the functions that the device uses (`runtime.calibrator`).

It stops before publishing: the version stays `UNPUBLISHED`, and nothing is signed.
"""

import itertools
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt

import protocol
from converters.refusal import Refused
from converters.samples import Samples, read_classes, read_samples
from converters.trial import DISTRIBUTIONS, TrialRun, run_trial
from protocol.bundle import digest_of, write_bundle
from protocol.manifest import (
    MANIFEST_NAME,
    BadManifest,
    Golden,
    Manifest,
    Needs,
    Preprocess,
    Reference,
    TensorSpec,
    check_manifest,
    encode_manifest,
)
from protocol.names import MAX_BUNDLE
from protocol.statistics import CONFIDENCE_BINS
from runtime.calibrator import confidence_bin, fit_calibrator, probabilities, top_class
from runtime.golden import MAX_GOLDEN, GoldenSamples, difference, save_golden
from runtime.interpreter import available

MODEL_MEMBER = "model.tflite"
GOLDEN_MEMBER = "golden.npz"
FEWEST_GOLDEN, MOST_GOLDEN, GOLDEN_PER_CLASS = 8, 32, 2
QUANTISED_TOLERANCE = 1.0  # steps: runtimes round differently
LEAST_AGREEMENT = 0.95  # share of samples on which all runtimes must agree within the tolerance
FLOAT_TOLERANCE = 1e-3  # runtimes sum in different orders
SUM_TOLERANCE = 0.05  # how far a softmax may be from 1, besides what quantising its parts takes
MIB = 1024**2
Numbers = npt.NDArray[np.int64]
_NO_LINEAGE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to pack."""

    model: Path
    samples: Path
    classes: Path
    name: str
    title: str = ""
    variant: str = "int8"
    device_classes: tuple[str, ...] = ()
    tolerance: float | None = None  # None: by the type of the outputs
    lineage: Mapping[str, str] = field(default_factory=lambda: _NO_LINEAGE)  # what the recipe says of itself
    pictures: Preprocess | None = None  # how a picture becomes the input; one mean and scale stand for every channel


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A bundle in memory, and what was found while packing it."""

    manifest: Manifest
    members: Mapping[str, bytes]
    agreement: "Agreement"
    absent_classes: tuple[str, ...]  # no sample shows them, so nothing is known of them


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike the runtimes answer."""

    agreeing: Numbers  # the samples on which all runtimes agree within the tolerance
    samples: int
    worst: float  # the largest difference seen, in the output's own units


def pack(order: Order) -> Packed:
    """Measure a model on every installed runtime and describe it; raise `Refused`."""
    content = _read_model(order.model)
    classes = read_classes(order.classes)
    samples = read_samples(order.samples, len(classes))
    runs = _run_everywhere(content, order)
    tolerance = _tolerance(order, runs[0].report.outputs)
    agreement = _check_agreement(order, runs, tolerance)
    _check_classes(order, runs[0], classes)
    chosen = choose_golden(samples.y, agreement.agreeing, _golden_limit(runs[0].tensors, len(classes)))
    members = {MODEL_MEMBER: content, GOLDEN_MEMBER: _golden_bytes(runs[0].tensors, chosen)}
    golden = Golden(member=GOLDEN_MEMBER, samples=len(chosen), tolerance=tolerance)
    manifest = _describe(order, samples, classes=classes, runs=runs, members=members, golden=golden)
    absent = tuple(name for k, name in enumerate(classes) if k not in samples.y)
    return Packed(manifest=manifest, members=members, agreement=agreement, absent_classes=absent)


def write_folder(packed: Packed, folder: Path) -> None:
    """Write a bundle folder; the manifest comes last, and each file is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in packed.members.items():
        _replace(folder / name, content)
    _replace(folder / MANIFEST_NAME, encode_manifest(packed.manifest))


def write_file(packed: Packed, target: Path) -> None:
    """Write the bundle as one ``.ewb`` file."""
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        write_bundle(file, packed.manifest, packed.members)
    partial.replace(target)


def choose_golden(truth: Numbers, candidates: Numbers, wanted: int) -> list[int]:
    """Return the numbers of ``wanted`` candidates (or all there are), spread evenly over the true classes."""
    queues = [candidates[truth[candidates] == k].tolist() for k in np.unique(truth[candidates])]
    turns = itertools.zip_longest(*queues)  # the first of each class, the second of each class, …
    chosen = [number for turn in turns for number in turn if number is not None]
    return sorted(chosen[:wanted])


# ---------------------------------------------------------------- running
def _read_model(path: Path) -> bytes:
    if not path.is_file():
        raise Refused(f"{path}: there is no such file")
    size = path.stat().st_size
    if not 0 < size <= MAX_BUNDLE:
        raise Refused(f"{path}: {size} bytes; a model has at least one and at most {MAX_BUNDLE}")
    return path.read_bytes()


def _run_everywhere(content: bytes, order: Order) -> list[TrialRun]:
    runtimes = available()
    if not runtimes:
        raise Refused("no TFLite runtime is installed; install one with: pip install 'edgewarden[converters]'")
    with tempfile.TemporaryDirectory(prefix="edgewarden-pack-") as scratch:
        tried = Path(scratch, order.model.name)  # exactly the bytes that go into the bundle, under a known name
        tried.write_bytes(content)
        runs = []
        for runtime in runtimes:
            try:
                runs.append(run_trial(tried, runtime, order.samples, Path(scratch)))
            except Refused as error:
                raise Refused(f"{order.model}: {str(error).removeprefix(f'{tried}: ')}") from error
        return runs


def _tolerance(order: Order, outputs: tuple[TensorSpec, ...]) -> float:
    if order.tolerance is not None:
        return order.tolerance
    return FLOAT_TOLERANCE if any(spec.dtype.startswith("FP") for spec in outputs) else QUANTISED_TOLERANCE


def _check_agreement(order: Order, runs: list[TrialRun], tolerance: float) -> Agreement:
    """Compare the first runtime's answers with every other's; raise `Refused` when they are not the same model."""
    first = runs[0]
    worst = _own_difference(first)
    for other in runs[1:]:
        if (other.report.inputs, other.report.outputs) != (first.report.inputs, first.report.outputs):
            raise Refused(
                f"{order.model}: its tensors are not the same on {first.runtime.value}, {other.runtime.value}"
            )
        worst = np.maximum(worst, _differences(first.tensors, other.tensors))
    agreeing = np.flatnonzero(worst <= tolerance)
    if len(agreeing) < LEAST_AGREEMENT * len(worst):
        where = " and ".join(run.runtime.value for run in runs)
        raise Refused(
            f"{order.model}: only {len(agreeing)} of {len(worst)} samples have answers on {where} that are numbers "
            f"and differ by at most {tolerance:g}; the largest difference is {worst.max():g}"
        )
    return Agreement(agreeing=agreeing, samples=len(worst), worst=float(worst.max()))


def _own_difference(run: TrialRun) -> npt.NDArray[np.float64]:
    return _differences(run.tensors, run.tensors)  # 0, but infinite where an answer is not a number


def _differences(first: GoldenSamples, other: GoldenSamples) -> npt.NDArray[np.float64]:
    """Return each sample's largest difference over all outputs."""
    return np.array(
        [
            max(difference(a[number], b[number]) for a, b in zip(first.outputs, other.outputs, strict=True))
            for number in range(first.count)
        ]
    )


def _check_classes(order: Order, run: TrialRun, classes: tuple[str, ...]) -> None:
    spec = run.report.outputs[0]
    if spec.shape != (1, len(classes)):
        raise Refused(
            f"{order.classes}: {len(classes)} class names, but output {spec.name!r} of {order.model} has shape "
            f"{spec.shape}; (1, {len(classes)}) is expected"
        )
    scores = probabilities(run.tensors.outputs[0], spec)
    step = spec.scale or 0.0
    allowed = SUM_TOLERANCE + len(classes) * step / 2
    if scores.min() < -step or not (np.abs(scores.sum(axis=-1) - 1) <= allowed).all():
        raise Refused(
            f"{order.model}: output {spec.name!r} holds values from {scores.min():g} to {scores.max():g} "
            "that are not probabilities; end the model with a softmax"
        )


# ---------------------------------------------------------------- describing
def _describe(
    order: Order,
    samples: Samples,
    *,
    classes: tuple[str, ...],
    runs: list[TrialRun],
    members: Mapping[str, bytes],
    golden: Golden,
) -> Manifest:
    report, answers = runs[0].report, runs[0].tensors.outputs[0]
    calibrator = fit_calibrator(answers, samples.y, report.outputs[0])
    manifest = Manifest(
        model=order.name,
        variant=order.variant,
        title=order.title,
        inputs=report.inputs,
        outputs=report.outputs,
        classes=classes,
        needs=_needs(order, runs),
        golden=golden,
        reference=_reference(probabilities(answers, report.outputs[0], calibrator), samples.y, len(classes)),
        calibrator=calibrator,
        members={name: digest_of(content) for name, content in members.items()},
        lineage=_lineage(order, samples, runs),
        preprocess=_preprocess(order.pictures, report.inputs[0]) if order.pictures else msgspec.UNSET,
    )
    try:
        check_manifest(manifest)
    except BadManifest as error:
        raise Refused(f"{MANIFEST_NAME}: {error}") from error
    return manifest


def _preprocess(pictures: Preprocess, spec: TensorSpec) -> Preprocess:
    """Return the block with a number for every channel; what does not fit the input is left for the check."""
    channels = spec.shape[-1] if spec.shape else 1
    return msgspec.structs.replace(
        pictures,
        mean=pictures.mean * channels if len(pictures.mean) == 1 else pictures.mean,
        scale=pictures.scale * channels if len(pictures.scale) == 1 else pictures.scale,
    )


def _needs(order: Order, runs: list[TrialRun]) -> Needs:
    most = max(run.report.memory for run in runs)
    return Needs(
        runtimes=tuple(run.runtime for run in runs),
        memory=max(1, -(-most // MIB)) * MIB,  # whole MiB: a reading is no more exact than that
        device_classes=order.device_classes,
    )


def _reference(scores: npt.NDArray[np.float64], truth: Numbers, classes: int) -> Reference:
    answers = [top_class(row) for row in scores]
    predicted = np.array([best for best, _ in answers])
    bins = np.array([confidence_bin(confidence) for _, confidence in answers])
    return Reference(
        samples=len(truth),
        confidence=tuple(np.bincount(bins, minlength=CONFIDENCE_BINS).tolist()),
        classes=tuple(np.bincount(predicted, minlength=classes).tolist()),
        right=int((predicted == truth).sum()),
    )


def _lineage(order: Order, samples: Samples, runs: list[TrialRun]) -> dict[str, str]:
    tools = {DISTRIBUTIONS[run.runtime]: run.report.runtime_version for run in runs}
    return {
        **order.lineage,
        **tools,
        "edgewarden": protocol.__version__,
        "numpy": version("numpy"),
        "samples_sha256": samples.sha256,
    }


# ---------------------------------------------------------------- writing
def _golden_limit(tensors: GoldenSamples, classes: int) -> int:
    """Return how many golden samples to take: two a class, 8 to 32, fewer only when they are too large."""
    one = sum(int(array[0].nbytes) for array in (*tensors.inputs, *tensors.outputs))
    wanted = min(MOST_GOLDEN, max(FEWEST_GOLDEN, GOLDEN_PER_CLASS * classes))
    return max(1, min(wanted, (MAX_GOLDEN - MIB) // one))


def _golden_bytes(tensors: GoldenSamples, chosen: list[int]) -> bytes:
    subset = GoldenSamples(
        inputs=[array[chosen] for array in tensors.inputs],
        outputs=[array[chosen] for array in tensors.outputs],
    )
    with tempfile.TemporaryDirectory(prefix="edgewarden-pack-") as scratch:
        target = Path(scratch, GOLDEN_MEMBER)
        save_golden(target, subset)
        return target.read_bytes()


def _replace(target: Path, content: bytes) -> None:
    partial = target.with_name(target.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
