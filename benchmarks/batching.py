"""Measures what a batch would bring: time per sample when a model is resized to take several samples at once.

Waiting for companions costs a request time, so it pays only where a sample of a batch is much cheaper than one alone.
Every size has an interpreter of its own, of one thread; all take turns within a round. A model whose graph names its
batch somewhere else too cannot be resized; it is listed with why.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from parts import DIGITS, RUNTIMES, need_mobilenet, note, options, ratio, result, side_by_side

from runtime.interpreter import MODULES, import_runtime

SIZES = (1, 2, 4, 8)
WORTHWHILE = 1.3  # times quicker per sample: below, batches are not built


def main() -> None:
    """Answer the question."""
    given = options(__doc__ or "", 5)
    rounds, factor, sizes = (1, 10, SIZES[:2]) if given.quick else (given.rounds, 1, SIZES)
    figures: dict[str, dict[str, object]] = {}
    for path, times in ((DIGITS / "model.tflite", 2000 // factor), (need_mobilenet(), 10)):
        name = "digits" if path.parent == DIGITS else path.stem
        for runtime in RUNTIMES:
            note(f"{name} on {runtime}, batches of {', '.join(map(str, sizes))}")
            figures[f"{name} {runtime}"] = per_sample(path, runtime, sizes, rounds, times)
    best = max(gain for one in figures.values() if isinstance(gain := one.get("best_gain"), float))
    result("batching", **figures, worthwhile=best >= WORTHWHILE)


def per_sample(path: Path, runtime: str, sizes: Sequence[int], rounds: int, times: int) -> dict[str, object]:
    """Return the p50 of a sample by the size of its batch, and how many times quicker than alone it is at best."""
    acts: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for size in sizes:
        try:
            acts[str(size)] = resized(path, runtime, size)
        except (RuntimeError, ValueError) as error:
            refused[str(size)] = str(error).splitlines()[0][:120]
    took = side_by_side(acts, rounds=rounds, times=times)
    each = {size: [value / int(size) for value in values] for size, values in took.items()}
    gains = {size: ratio(each["1"], values) for size, values in each.items()}
    return {
        "us_per_sample": {size: [round(value, 2) for value in values] for size, values in each.items()},
        "gain": gains,
        "best_gain": max(gains.values()),
        **({"refused": refused} if refused else {}),
    }


def resized(path: Path, runtime: str, size: int) -> Callable[[], object]:
    """Return an act that fills, invokes and reads a batch; raise what the runtime does if it cannot be made."""
    module = importlib.import_module(f"{MODULES[import_runtime(runtime)]}.interpreter")
    interpreter = module.Interpreter(model_path=str(path), num_threads=1)
    index = interpreter.get_input_details()[0]["index"]
    shape = [size, *interpreter.get_input_details()[0]["shape"][1:]]
    interpreter.resize_tensor_input(index, shape)
    interpreter.allocate_tensors()
    samples = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    output = interpreter.get_output_details()[0]["index"]

    def act() -> object:
        interpreter.set_tensor(index, samples)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    answered = act()
    if getattr(answered, "shape", (0,))[0] != size:
        raise RuntimeError(f"{size} samples went in, {getattr(answered, 'shape', None)} came out")
    return act


if __name__ == "__main__":
    main()
