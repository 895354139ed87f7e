"""Prints what the bundles here do on the held-out images, on every installed runtime.

python examples/digits/evaluate.py
"""

from pathlib import Path

from converters.inspection import inspect
from protocol.metrics import Proportion, proportion
from protocol.states import RuntimeName
from runtime.arrays import read_arrays
from runtime.calibrator import probabilities, top_class
from runtime.interpreter import available, open_model
from runtime.preprocess import quantise

HERE = Path(__file__).parent
DARKEST = 16.0  # pixel values are 0..16; the models take 0..1
MAX_HELD_OUT = 1024 * 1024  # bytes


def held_out_accuracy(version: str, runtime: RuntimeName) -> Proportion:
    """Return the share of held-out images that a version names rightly."""
    arrays = read_arrays(HERE / "heldout.npz", MAX_HELD_OUT)
    manifest = inspect(HERE / version)
    right = 0
    with open_model(HERE / version / manifest.model_member, runtime=runtime.value) as model:
        for image, truth in zip(quantise(arrays["images"] / DARKEST, model.inputs[0]), arrays["truth"], strict=True):
            model.fill(0, image.tobytes())
            model.invoke()
            best, _ = top_class(probabilities(model.array(0), model.outputs[0], manifest.calibrator))
            right += int(best == truth)
    return proportion(right, len(arrays["truth"]))


def main() -> None:
    """Print the table of README.md."""
    print("| version | runtime | right | n | accuracy | 95 % interval |")
    print("|---|---|---|---|---|---|")
    for version in ("v1", "v2", "v3"):
        for runtime in available():
            share = held_out_accuracy(version, runtime)
            interval = f"{share.low:.1%} to {share.high:.1%}"
            print(f"| {version} | {runtime.value} | {share.successes} | {share.n} | {share.value:.1%} | {interval} |")


if __name__ == "__main__":
    main()
