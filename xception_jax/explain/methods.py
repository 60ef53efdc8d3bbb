"""Attributes the logit of a class to positions of an image: Grad-CAM, HiResCAM and integrated gradients.

All of them are pure functions of (module, variables, images, classes, ...) that work under `jax.jit`. A module is any
whose `apply(variables, images, train=False)` returns `(logits, endpoints)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from xception_jax.explain.endpoints import cut
from xception_jax.explain.options import STEPS

Classes = int | Int[Array, " b"] | None


class Explanation(NamedTuple):
    """Maps of a batch.

    Attributes:
      maps: evidence for the class at each position, in units of its logit.
      classes: the explained class of each image.
      signs: 1, or -1 where the map explains the absence of the class.
      logits: the logits of the images.
      residuals: for integrated gradients, the sum of a map minus the difference of the logits that it should be.
    """

    maps: Float[Array, "b h w"]
    classes: Int[Array, " b"]
    signs: Int[Array, " b"]
    logits: Float[Array, "b n"]
    residuals: Float[Array, " b"] | None = None


def grad_cam(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Float[Array, "b s s 3"],
    classes: Classes = None,
    endpoint: str | None = None,
) -> Explanation:
    """Computes Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2).

    Channels are weighted by the mean of their gradient over all positions, summed, and negative sums are set to zero.
    At the last endpoint of a network with one Dense layer this is CAM (Zhou et al. 2016) divided by the number of
    positions. At inner endpoints it can point to positions that the network does not use; prefer HiResCAM there.

    Args:
      model: the network.
      variables: its variables.
      images: preprocessed images.
      classes: the class to explain, one for all images or one each. A negative number ~c explains the absence of class
        c. None is the most probable class of each image; for a network with a single logit it is its decision: class 0,
        or its absence if the logit is negative.
      endpoint: name of the activation to which the logit is attributed; None is the last one that has positions.
    """
    activation, gradient, target = _differentiate(model, variables, images, classes, endpoint)
    weights = gradient.mean((1, 2), keepdims=True)
    return target._replace(maps=jax.nn.relu((weights * activation).sum(-1)))


def hires_cam(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Float[Array, "b s s 3"],
    classes: Classes = None,
    endpoint: str | None = None,
) -> Explanation:
    """Computes HiResCAM (Draelos and Carin 2020, arXiv 2011.08891): gradient times activation, summed over channels.

    Negative values are evidence against the class. At the last endpoint of a network with one Dense layer, a map sums
    to the logit without its bias. Arguments are those of `grad_cam`.
    """
    activation, gradient, target = _differentiate(model, variables, images, classes, endpoint)
    return target._replace(maps=(gradient * activation).sum(-1))


def integrated_gradients(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Float[Array, "b s s 3"],
    classes: Classes = None,
    *,
    baseline: Float[Array, "#b #s #s 3"] | float = 0.0,
    steps: int = STEPS,
    batch_size: int = 1,
) -> Explanation:
    """Computes integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365), summed over the colours.

    The gradient is averaged over the straight path from the baseline to the image (midpoint rule) and multiplied by
    their difference. A map sums to the logit of the image minus that of the baseline, up to `residuals`, which shrink
    with more steps.

    Args:
      model: the network.
      variables: its variables.
      images: preprocessed images.
      classes: the class to explain, see `grad_cam`.
      baseline: preprocessed images without evidence. The default is the mean colour of the preprocessing.
      steps: number of points on the path.
      batch_size: number of images that the network sees at once, if there are fewer images than that.

    Raises:
      ValueError: there is no class of this number, or `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; integrated gradients need at least one point")

    def logits_of(images: Array) -> Array:
        return model.apply(variables, images, train=False)[0]

    images = jnp.asarray(images, jnp.promote_types(images.dtype, jnp.float32))  # for sums and points on the path
    count, together = len(images), max(1, batch_size // max(1, len(images)))
    start = jnp.broadcast_to(baseline, images.shape).astype(images.dtype)
    logits, difference = logits_of(images), images - start
    target = _target(logits, classes)
    weights = _weights(target)
    passes = -(-steps // together)
    points = jnp.arange(passes * together, dtype=images.dtype).reshape(passes, together)  # the last pass is padded

    def add_gradients(total: Array, points: Array) -> tuple[Array, None]:
        shares = ((points + 0.5) / steps).reshape(together, 1, 1, 1, 1)
        inputs = (start + shares * difference).reshape(together * count, *images.shape[1:])
        (gradient,) = jax.vjp(logits_of, inputs)[1](jnp.tile(weights, (together, 1)))
        gradient = gradient.reshape(together, *images.shape)
        return total + jnp.where(shares < 1, gradient, 0).sum(0), None

    total, _ = jax.lax.scan(add_gradients, jnp.zeros_like(images), points)
    maps = (difference * total).sum(-1) / steps
    expected = (weights * (logits - logits_of(start))).sum(-1)
    return target._replace(maps=maps, residuals=maps.sum((1, 2)) - expected)


FUNCTIONS: dict[str, Callable[..., Explanation]] = {
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "integrated_gradients": integrated_gradients,
}
"""The methods of `options.METHODS`."""


def _differentiate(
    model: nn.Module, variables: Mapping[str, Any], images: Array, classes: Classes, endpoint: str | None
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"], Explanation]:
    """Returns the activation at an endpoint, the gradient there, and the explanation without its maps."""
    activation, logits_of = cut(model, variables, images, endpoint)
    logits, gradient_of = jax.vjp(logits_of, activation)
    target = _target(logits, classes)
    (gradient,) = gradient_of(_weights(target))
    dtype = jnp.promote_types(activation.dtype, jnp.float32)
    return activation.astype(dtype), gradient.astype(dtype), target


def _target(logits: Float[Array, "b n"], classes: Classes) -> Explanation:
    """Returns the explanation without its maps."""
    if classes is None:
        classes = logits.argmax(-1)
        if logits.shape[-1] == 1:
            classes = jnp.where(logits[:, 0] < 0, ~classes, classes)
    if not isinstance(classes, jax.core.Tracer):
        given, highest = np.atleast_1d(classes), logits.shape[-1]
        if (outside := given[(given >= highest) | (~given >= highest)]).size:
            raise ValueError(f"there is no class {int(outside[0])}: the network has {highest} logits")
    classes = jnp.broadcast_to(jnp.asarray(classes), len(logits))
    signs = jnp.where(classes < 0, -1, 1)
    return Explanation(jnp.zeros(()), jnp.where(classes < 0, ~classes, classes), signs, logits)


def _weights(target: Explanation) -> Float[Array, "b n"]:
    """Returns the weights of the logits in the explained score: zero, and the sign for the class."""
    logits = target.logits
    return jax.nn.one_hot(target.classes, logits.shape[-1], dtype=logits.dtype) * target.signs[:, None]
