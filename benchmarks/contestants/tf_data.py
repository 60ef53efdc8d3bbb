"""Runs an input pipeline of tf.data: decodes and crops a random box, resizes, flips, scales to [-1, 1] and batches.

Uses as many threads as cores.
"""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf


def prepare(work: dict, options: dict):
    """Returns (step, None)."""
    files = [path.read_bytes() for path in sorted(Path(work["directory"]).glob("*.jpg"))]

    def view(data):
        box = tf.zeros((1, 0, 4))
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            box,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.05, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        top, left, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(size)
        image = tf.io.decode_and_crop_jpeg(data, tf.stack([top, left, height, width]), channels=3)
        image = tf.image.resize(image, (work["size"], work["size"]))
        return tf.image.random_flip_left_right(image) * (2 / 255) - 1

    dataset = tf.data.Dataset.from_tensor_slices(files).repeat()
    dataset = dataset.map(view, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(work["batch"], drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    threads = tf.data.Options()
    threads.threading.private_threadpool_size = work["cores"]
    batches = dataset.with_options(threads).as_numpy_iterator()
    return lambda: next(batches), None
