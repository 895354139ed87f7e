"""Makes build/benchmarks/mobilenet_v2_int8.tflite: MobileNetV2 1.0/224, int8 throughout, with random weights.

Run it in any environment with TensorFlow: ``python benchmarks/models.py``. How fast a model runs does not depend on
what its weights say, so nothing is trained and nothing is downloaded; what it answers means nothing.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHAPE = (1, 224, 224, 3)
SAMPLES = 8  # random images that the ranges of the activations are taken from
TARGET = Path(__file__).resolve().parents[1] / "build" / "benchmarks" / "mobilenet_v2_int8.tflite"


def convert() -> bytes:
    """Return the quantised model."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    converter = tf.lite.TFLiteConverter.from_keras_model(tf.keras.applications.MobileNetV2(weights=None))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = images
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return bytes(converter.convert())


def images() -> Iterator[list[np.ndarray]]:
    """Yield random images, -1…1."""
    dice = np.random.default_rng(0)
    for _ in range(SAMPLES):
        yield [dice.uniform(-1, 1, SHAPE).astype(np.float32)]


if __name__ == "__main__":
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(convert())
    print(f"{TARGET}: {TARGET.stat().st_size} bytes", file=sys.stderr)
