"""Runs a model over all samples on one runtime, in a child process: a model that crashes does so there.

The child (``python -m converters.trial MODEL RUNTIME SAMPLES ANSWERS``) quantises the samples, runs them, writes
inputs and answers as golden samples, and prints one JSON line: the tensors, the memory it took, or why it could not.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from converters.refusal import Refused
from protocol.manifest import TensorSpec
from protocol.states import RuntimeName
from runtime.golden import GoldenSamples, run_sample, save_golden
from runtime.interpreter import LoadedModel, ModelUnloadable, RuntimeMissing, import_runtime, open_model
from runtime.measure import growth, memory_use
from runtime.preprocess import quantise

TIME_LIMIT = 600.0  # seconds; a model that hangs is refused
DISTRIBUTIONS = {RuntimeName.LITERT: "ai-edge-litert", RuntimeName.TFLITE_RUNTIME: "tflite-runtime"}
_ARGUMENTS = 4
Tensor = npt.NDArray[Any]


class TrialReport(msgspec.Struct, frozen=True, kw_only=True):
    """The child's one line."""

    problem: str = ""  # not empty: the model cannot be used, and why
    runtime_version: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    memory: int = 0  # bytes that loading and running took


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """A model ran over all samples on one runtime."""

    runtime: RuntimeName
    report: TrialReport
    tensors: GoldenSamples  # every sample's input and outputs, as the model's own values


# ---------------------------------------------------------------- parent
def run_trial(model: Path, runtime: RuntimeName, samples: Path, scratch: Path) -> TrialRun:
    """Run a model over samples in a child process; raise `Refused` when it cannot, crashes or hangs."""
    answers = scratch / f"{runtime.value}.npz"
    command = [sys.executable, "-m", "converters.trial", str(model), runtime.value, str(samples), str(answers)]
    try:
        child = subprocess.run(
            command, env=_quiet_environment(), capture_output=True, check=False, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired as error:
        raise Refused(
            f"the model did not get through the samples in {TIME_LIMIT:.0f} s on {runtime.value}"
        ) from error
    report = _read_report(child, runtime)
    with np.load(answers, allow_pickle=False) as arrays:
        tensors = GoldenSamples(
            inputs=[arrays[f"in_{k}"] for k in range(len(report.inputs))],
            outputs=[arrays[f"out_{k}"] for k in range(len(report.outputs))],
        )
    return TrialRun(runtime=runtime, report=report, tensors=tensors)


def _quiet_environment() -> dict[str, str]:
    # One BLAS thread: the thread pool's buffers would be counted as the model's memory.
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


def _read_report(child: "subprocess.CompletedProcess[bytes]", runtime: RuntimeName) -> TrialReport:
    if child.returncode != 0:
        last_words = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise Refused(f"the model ended its process on {runtime.value} ({how}): {' '.join(last_words)}")
    report = msgspec.json.decode(child.stdout, type=TrialReport)
    if report.problem:
        raise Refused(report.problem)
    return report


# ---------------------------------------------------------------- child
def try_model(model: Path, runtime: RuntimeName, samples: Path, answers: Path) -> TrialReport:
    """Load, run and measure in this process; problems of the model or the samples come back in the report."""
    try:
        import_runtime(runtime.value)
        before = memory_use()
        with open_model(model, runtime=runtime.value) as loaded:
            loaded.invoke()
            memory = growth(before, memory_use())
            save_golden(answers, _run_all(loaded, samples))
            return TrialReport(
                runtime_version=version(DISTRIBUTIONS[runtime]),
                inputs=loaded.inputs,
                outputs=loaded.outputs,
                memory=memory,
            )
    except (ModelUnloadable, RuntimeMissing, Refused) as error:
        return TrialReport(problem=str(error))
    except RuntimeError as error:
        return TrialReport(problem=f"{model}: {runtime.value} loaded the model but cannot run it: {error}")


def _run_all(model: LoadedModel, samples: Path) -> GoldenSamples:
    inputs = [_quantised_inputs(model, samples)]
    answers: list[list[Tensor]] = [[] for _ in model.outputs]
    for number in range(len(inputs[0])):
        run_sample(model, inputs, number)
        for index, collected in enumerate(answers):
            collected.append(model.array(index))
    return GoldenSamples(inputs=inputs, outputs=[_without_batch(collected) for collected in answers])


def _quantised_inputs(model: LoadedModel, samples: Path) -> Tensor:
    if len(model.inputs) != 1:
        raise Refused(f"the model has {len(model.inputs)} inputs; samples can be given for one only")
    spec = model.inputs[0]
    if spec.shape[:1] != (1,):
        raise Refused(f"input {spec.name!r} has shape {spec.shape}; a batch of 1 in front is expected")
    with np.load(samples, allow_pickle=False) as arrays:
        x = arrays["x"]
    if x.shape[1:] != spec.shape[1:]:
        raise Refused(f"{samples}: x: a sample has shape {x.shape[1:]}, input {spec.name!r} takes {spec.shape[1:]}")
    return quantise(x, spec)


def _without_batch(answers: list[Tensor]) -> Tensor:
    stacked: Tensor = np.stack(answers)
    return stacked[:, 0] if stacked.shape[1:2] == (1,) else stacked


def main(arguments: list[str]) -> int:
    """Entry point of the child."""
    if len(arguments) != _ARGUMENTS:
        sys.stderr.write("usage: python -m converters.trial MODEL RUNTIME SAMPLES ANSWERS\n")
        return 2
    model, runtime, samples, answers = arguments
    report = try_model(Path(model), RuntimeName(runtime), Path(samples), Path(answers))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
