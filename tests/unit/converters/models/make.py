"""Makes the tiny models beside this file, with TensorFlow. They are committed; run again only to change them.

Each takes four numbers per sample and has one dense layer with fixed weights.
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent
WEIGHTS = np.array([[2, -1, 0], [-1, 2, 0], [0, -1, 2], [1, 1, -2]], np.float32)
BIAS = np.array([0.1, 0.2, 0.3], np.float32)


def dense(activation: str | None) -> keras.layers.Layer:
    """Return the layer, with its weights to come."""
    return keras.layers.Dense(3, activation=activation, name="scores")


def write(name: str, model: keras.Model) -> None:
    """Set the weights and convert to a float32 model."""
    model.get_layer("scores").set_weights([WEIGHTS, BIAS])
    (HERE / f"{name}.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def main() -> None:
    """Write all models."""
    one = keras.Input((4,), batch_size=1, name="values")
    write("float_softmax", keras.Model(one, {"scores": dense("softmax")(one)}))
    write("float_logits", keras.Model(one, {"scores": dense(None)(one)}))
    two = keras.Input((4,), batch_size=2, name="values")
    write("batch_of_two", keras.Model(two, {"scores": dense("softmax")(two)}))
    other = keras.Input((4,), batch_size=1, name="offsets")
    write("two_inputs", keras.Model([one, other], {"scores": dense("softmax")(keras.layers.Add()([one, other]))}))


if __name__ == "__main__":
    main()
