"""Computes convolutions and their gradients in NumPy in float64, as an oracle that needs no compilation."""

from __future__ import annotations

import numpy as np

from xception_jax.ops.padding import explicit_padding


def conv_with_gradients(x, kernel, dy_of, *, segments, stride, padding):
    """Returns the convolution y of NHWC images, and its gradients for the cotangent `dy_of(y.shape)`.

    Each tap of the kernel contributes one matrix product per segment.

    Args:
      x: images, [batch, rows, columns, channels].
      kernel: [rows, columns, channels / segments, filters].
      dy_of: a function that returns a cotangent of the given shape.
      segments: the number of groups of channels.
      stride: the step in both directions, in pixels.
      padding: "SAME", "VALID" or "SYMMETRIC".

    Returns:
      y and the gradients of `x` and `kernel`.
    """
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    taps, filters = kernel.shape[:2], kernel.shape[3]
    pads = explicit_padding(padding, x.shape[1:3], taps, stride)
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((padded.shape[1 + i] - taps[i]) // stride + 1 for i in range(2))
    split = (*x.shape[:1], rows, columns, segments, -1)
    y = np.zeros((len(x), rows, columns, filters))
    dy = np.asarray(dy_of(y.shape), np.float64)
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(*taps):
        seen = np.s_[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        # The segments come first, as in a batch of matrix products.
        pixels = np.moveaxis(padded[seen].reshape(split), 3, 0).reshape(segments, len(x) * rows * columns, -1)
        weights = np.moveaxis(kernel[i, j].reshape(-1, segments, filters // segments), 1, 0)
        cotangent = np.moveaxis(dy.reshape(split), 3, 0).reshape(segments, len(x) * rows * columns, -1)
        image = (segments, len(x), rows, columns, -1)
        y += np.moveaxis((pixels @ weights).reshape(image), 0, 3).reshape(y.shape)
        back = cotangent @ np.swapaxes(weights, 1, 2)
        dx[seen] += np.moveaxis(back.reshape(image), 0, 3).reshape(*y.shape[:3], -1)
        products = np.swapaxes(pixels, 1, 2) @ cotangent
        dkernel[i, j] = np.moveaxis(products, 0, 1).reshape(-1, filters)
    inside = np.s_[:, pads[0][0] : pads[0][0] + x.shape[1], pads[1][0] : pads[1][0] + x.shape[2]]
    return y, dx[inside], dkernel
