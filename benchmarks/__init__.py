"""Compares this repository with Keras, timm, PyTorch, plain Flax and tf.data: python -m benchmarks --help."""
