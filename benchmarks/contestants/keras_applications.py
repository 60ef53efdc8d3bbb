"""Runs keras.applications on the backend given by KERAS_BACKEND: jit on JAX, a graph with oneDNN on TensorFlow."""

from __future__ import annotations

import keras
import numpy as np


def prepare(work: dict, options: dict):
    """Returns (step, parameters)."""
    networks = {"xception": keras.applications.Xception, "inception_v3": keras.applications.InceptionV3}
    model = networks[work["network"]](weights=None, classifier_activation=None)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (work["batch"], work["size"], work["size"], 3)).astype(np.float32)
    labels = rng.integers(1000, size=work["batch"], dtype=np.int32)
    parameters = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    on_jax = keras.config.backend() == "jax"
    if work["kind"] == "infer":
        return (_infer_jax if on_jax else _infer_tensorflow)(model, images), parameters
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=on_jax,  # with TensorFlow, XLA would replace oneDNN
    )
    return lambda: model.train_on_batch(images, labels), parameters


def _infer_jax(model, images):
    import jax

    @jax.jit
    def apply(trainable, other, images):
        return model.stateless_call(trainable, other, images, training=False)[0]

    trainable = [variable.value for variable in model.trainable_variables]
    other = [variable.value for variable in model.non_trainable_variables]
    images = jax.numpy.asarray(images)
    return lambda: apply(trainable, other, images).block_until_ready()


def _infer_tensorflow(model, images):
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    images = tf.constant(images)
    graph = tf.function(lambda images: model(images, training=False))
    # If the weights are constants, TensorFlow folds BatchNorm into the convolutions.
    frozen = convert_variables_to_constants_v2(graph.get_concrete_function(tf.TensorSpec(images.shape, tf.float32)))
    return lambda: frozen(images)[0].numpy()
