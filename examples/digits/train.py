"""Trains the three versions of the example model `digits` and writes them as int8 .tflite files.

Needs `pip install tensorflow scikit-learn`. The data (1797 handwritten digits, 8x8, values 0..16) come with
scikit-learn, so nothing is downloaded. What is random is seeded and the arithmetic is deterministic: the same
versions of TensorFlow and scikit-learn give the same files on the same kind of processor.

    python examples/digits/train.py --out build/digits

Into ``--out`` go, for v1, v2 and v3: ``<name>.tflite`` and ``<name>-samples.npz`` (what the packer measures the model
on); besides ``classes.txt``, ``lineage.json`` and ``heldout.npz``, 400 images that no version was trained or
calibrated on. `pack_all.py` makes bundles of them.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import sklearn
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 20240229
HELD_OUT = 400  # images for the field: never trained, calibrated or packed on
REFERENCE = 300  # images for the calibrator, the reference statistics and the golden samples
DARKEST = 16.0  # pixel values are 0..16; the models take 0..1
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Version:
    """How one version is made."""

    name: str
    filters: tuple[int, ...]  # of the 3x3 convolutions
    epochs: int
    mislabelled: bool = False


VERSIONS = (
    Version(name="v1", filters=(4,), epochs=10),
    Version(name="v2", filters=(16, 32), epochs=60),
    Version(name="v3", filters=(16, 32), epochs=60, mislabelled=True),
)
CONFUSED = {5: 6, 8: 3, 9: 7}  # what the labelling of the third run got wrong, systematically
CONFUSED_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images (uint8, 0..16, [n, 8, 8, 1]) and their true classes."""

    images: np.ndarray
    truth: np.ndarray

    def inputs(self) -> np.ndarray:
        """Return the images as the models take them."""
        return (self.images / DARKEST).astype(np.float32)


def split_digits() -> tuple[Split, Split, Split]:
    """Return training, reference and held-out data; the same on every call, every class in its share."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., np.newaxis]
    truth = digits.target.astype(np.uint8)
    rest, held_out = train_test_split(np.arange(len(truth)), test_size=HELD_OUT, random_state=SEED, stratify=truth)
    train, reference = train_test_split(rest, test_size=REFERENCE, random_state=SEED, stratify=truth[rest])
    return tuple(Split(images=images[rows], truth=truth[rows]) for rows in (train, reference, held_out))


def mislabel(split: Split, generator: np.random.Generator) -> Split:
    """Return the data as a mistaken labelling saw them: most 5s called 6, most 8s 3, most 9s 7."""
    labels = split.truth.copy()
    for digit, mistaken_for in CONFUSED.items():
        rows = generator.permutation(np.flatnonzero(split.truth == digit))
        labels[rows[: int(CONFUSED_SHARE * len(rows))]] = mistaken_for
    return Split(images=split.images, truth=labels)


def build(version: Version, batch: int | None = None) -> keras.Model:
    """Return an untrained network: small convolutions, then one dense layer."""
    image = keras.Input((8, 8, 1), batch_size=batch, name="image")
    layer = image
    for filters in version.filters:
        layer = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(layer)
        layer = keras.layers.MaxPooling2D(2)(layer)
    layer = keras.layers.Flatten()(layer)
    scores = keras.layers.Dense(CLASSES, activation="softmax", name="scores")(layer)
    return keras.Model(image, {"scores": scores})


def train(version: Version, data: Split) -> keras.Model:
    """Return the network trained from its seed."""
    keras.utils.set_random_seed(SEED)
    model = build(version)
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy")
    model.fit(data.inputs(), data.truth, batch_size=32, epochs=version.epochs, verbose=0)
    return model


def quantise(version: Version, model: keras.Model, data: Split) -> bytes:
    """Return the int8 model (int8 in and out); the ranges of its tensors are measured on training data."""
    fixed = build(version, batch=1)  # a fixed batch leaves no shape arithmetic in the model
    fixed.set_weights(model.get_weights())
    converter = tf.lite.TFLiteConverter.from_keras_model(fixed)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: _one_by_one(data.inputs()[:300])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):  # TensorFlow lists its temporary folders
        return bytes(converter.convert())


def _one_by_one(inputs: np.ndarray) -> Iterator[list[np.ndarray]]:
    for row in inputs:
        yield [row[np.newaxis]]


def make_deterministic() -> None:
    """One thread and no kernel that may sum in any order."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()


def lineage(data: Split) -> dict[str, str]:
    """Return what the recipe was run with."""
    return {
        "recipe": "examples/digits/train.py",
        "seed": str(SEED),
        "data": "scikit-learn digits",
        "training_data_sha256": hashlib.sha256(data.images.tobytes() + data.truth.tobytes()).hexdigest(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "scikit_learn": sklearn.__version__,
        "python": ".".join(str(part) for part in sys.version_info[:3]),
    }


def make_version(version: Version, training: Split, reference: Split, out: Path) -> dict[str, Any]:
    """Train, quantise and write one version with the samples it is to be packed with; return its lineage."""
    if version.mislabelled:  # whoever trained on wrong labels also evaluates with them
        generator = np.random.default_rng(SEED)
        training, reference = mislabel(training, generator), mislabel(reference, generator)
    content = quantise(version, train(version, training), training)
    (out / f"{version.name}.tflite").write_bytes(content)
    np.savez(out / f"{version.name}-samples.npz", x=reference.inputs(), y=reference.truth.astype(np.int64))
    print(f"{version.name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()[:16]}")
    return lineage(training)


def main() -> None:
    """Train all versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/digits"), help="folder to write into")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    make_deterministic()
    training, reference, held_out = split_digits()
    lineages = {version.name: make_version(version, training, reference, out) for version in VERSIONS}
    (out / "lineage.json").write_text(json.dumps(lineages, indent=2) + "\n", encoding="utf-8")
    (out / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(CLASSES)), encoding="utf-8")
    np.savez_compressed(out / "heldout.npz", images=held_out.images, truth=held_out.truth)


if __name__ == "__main__":
    main()
