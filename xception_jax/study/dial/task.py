"""Draws images of the dial's task on the device, and computes the accuracy of their Bayes classifier.

An image is white noise on a torus of 12 x 12 pixels, plus `strength` times the template of its class at a place that is
uniformly distributed. Data are endless: an image is a function of a key.

The Bayes classifier knows the templates. Its score of a class is log sum exp, over all places, of the logarithm of the
likelihood ratio against noise: `strength` times the correlation of image and template there, minus half of the squared
norm of what was added.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp
from jaxtyping import Array, Float, Int

from xception_jax import ops

WIDTH = 12
"""Rows and columns of an image."""

TARGET = 0.97
"""Accuracy of the Bayes classifier on each bank, to which `match_strength` sets the strength."""

_CHUNK = 1024  # images whose correlations are in memory at a time
_LOWEST, _HIGHEST = 1.0, 17.0  # strengths
_HALVINGS = 14

# Parts of the stream of images of a seed.
TRAIN, TUNE, TEST, INIT, BAYES, CHECK, PULL = range(7)


def stream(seed: int, part: int) -> Array:
    """Returns the key of one part of the images of a seed."""
    return jax.random.fold_in(jax.random.key(seed), part)


def wrap(x: Float[Array, "b h w c"], width: int = 1) -> Float[Array, "b h2 w2 c"]:
    """Pads images with `width` pixels of the opposite side, so that a VALID convolution sees a torus."""
    return jnp.pad(x, ((0, 0), (width, width), (width, width), (0, 0)), mode="wrap")


def draw(
    key: Array, bank: Float[Array, "k 3 3 c"], strength: Float[Array, ""] | float, count: int
) -> tuple[Float[Array, "b 12 12 c"], Int[Array, " b"], Int[Array, "b 2"]]:
    """Draws images.

    Returns:
      (images, labels, places): a place is the pixel of the template's upper left tap.
    """
    of_label, of_place, of_noise = jax.random.split(key, 3)
    labels = jax.random.randint(of_label, (count,), 0, len(bank))
    places = jax.random.randint(of_place, (count, 2), 0, WIDTH)
    with jax.threefry_partitionable(False):  # a sixth of the time on a CPU; nothing here is sharded
        noise = jax.random.normal(of_noise, (count, WIDTH, WIDTH, bank.shape[-1]))
    return noise.at[_window(places, bank.shape[1])].add(strength * bank[labels]), labels, places


def _window(places: Int[Array, "b 2"], side: int) -> tuple[Array, Array, Array]:
    """Returns the indices of the pixels [b, side, side] below a template at each place."""
    taps = jnp.arange(side)
    rows = (places[:, 0, None, None] + taps[:, None]) % WIDTH
    columns = (places[:, 1, None, None] + taps[None, :]) % WIDTH
    return jnp.arange(len(places))[:, None, None], rows, columns


def crop(images: Float[Array, "b 12 12 c"], places: Int[Array, "b 2"], side: int) -> Float[Array, "b s s c"]:
    """Returns the pixels of each image below a template at its place."""
    return images[_window(places, side)]


def correlate(images: Float[Array, "b 12 12 c"], bank: Float[Array, "k 3 3 c"]) -> Float[Array, "b 12 12 k"]:
    """Correlates images with each template at each place of the torus."""
    return ops.conv(wrap(images, bank.shape[1] // 2), jnp.transpose(bank, (1, 2, 3, 0)), padding="VALID")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """An accuracy by Monte Carlo.

    Attributes:
      value: the mean.
      error: its standard error.
    """

    value: float
    error: float


def bayes_accuracy(bank: Float[np.ndarray, "k s s c"], strength: float, key: Array, count: int = 61_440) -> Accuracy:
    """Returns the accuracy of the Bayes classifier.

    A draw contributes the largest posterior probability, which has the same mean as being right, and less variance.

    Args:
      bank: the templates, which may differ in norm.
      strength: factor of the templates.
      key: key of the draws.
      count: number of draws, rounded up to whole chunks.
    """
    keys = jax.random.split(key, -(-count // _CHUNK))
    found = _check(keys, jnp.asarray(bank, jnp.float32), jnp.float32(strength))
    posterior = np.asarray(found, np.float64).ravel()
    return Accuracy(float(posterior.mean()), float(posterior.std(ddof=1) / np.sqrt(len(posterior))))


@jax.jit
def _check(keys: Array, bank: Array, strength: Array) -> Array:
    templates = _of_templates(bank)

    def chunk(key: Array) -> Array:
        return _largest_posterior(*_of_noise(key, bank), templates, strength, bank)

    return jax.lax.map(chunk, keys)


def match_strength(
    bank: Float[np.ndarray, "k 3 3 c"], key: Array, target: float = TARGET, count: int = 40_960
) -> float:
    """Returns the strength at which the Bayes classifier has the accuracy `target`, by bisection.

    All strengths see the same noise, so the accuracy is a smooth function of the strength.
    """
    keys = jax.random.split(key, -(-count // _CHUNK))
    return float(_bisect(keys, jnp.asarray(bank, jnp.float32), target))


@jax.jit
def _bisect(keys: Array, bank: Array, target: Array) -> Array:
    noise, templates = jax.lax.map(partial(_of_noise, bank=bank), keys), _of_templates(bank)

    def accuracy(strength: Array) -> Array:
        def chunk(drawn: tuple[Array, Array]) -> Array:
            return _largest_posterior(drawn[0], drawn[1], templates, strength, bank).mean()

        return jax.lax.map(chunk, noise).mean()

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = accuracy(middle) >= target
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.float32(_LOWEST), jnp.float32(_HIGHEST)))
    return (low + high) / 2


def _of_noise(key: Array, bank: Array) -> tuple[Float[Array, "n k p"], Int[Array, " n"]]:
    """Returns the correlations of noise with all templates at all places, and the classes of the images."""
    of_label, of_noise = jax.random.split(key)
    labels = jax.random.randint(of_label, (_CHUNK,), 0, len(bank))
    return _flat(correlate(jax.random.normal(of_noise, (_CHUNK, WIDTH, WIDTH, bank.shape[-1])), bank)), labels


def _of_templates(bank: Array) -> Float[Array, "k k p"]:
    """Returns the correlations of each template, alone in an image, with all templates at all places.

    It stands at one place: noise on a torus looks the same from everywhere.
    """
    side, channels = bank.shape[2:]
    alone = jnp.zeros((len(bank), WIDTH, WIDTH, channels)).at[:, :side, :side].set(bank)
    return _flat(correlate(alone, bank))


def _flat(correlation: Float[Array, "b h w k"]) -> Float[Array, "b k p"]:
    return jnp.moveaxis(correlation, -1, 1).reshape(len(correlation), correlation.shape[-1], -1)


def _scores(correlation: Float[Array, "b k p"], strength: Array | float, bank: Array) -> Float[Array, "b k"]:
    return logsumexp(strength * correlation, axis=-1) - strength**2 * jnp.square(bank).sum((1, 2, 3)) / 2


def _largest_posterior(
    noise: Array, labels: Array, templates: Array, strength: Array, bank: Array
) -> Float[Array, " n"]:
    return jax.nn.softmax(_scores(noise + strength * templates[labels], strength, bank)).max(-1)


def bayes_scores(
    images: Float[Array, "b 12 12 c"], bank: Float[Array, "k 3 3 c"], strength: float
) -> Float[Array, "b k"]:
    """Returns the scores of the Bayes classifier for given images, up to a constant of each image."""
    return _scores(_flat(correlate(images, bank)), strength, bank)


def marginal_accuracies(
    bank: Float[np.ndarray, "k 3 3 c"], strength: float, key: Array, count: int = 20_480
) -> tuple[float, float]:
    """Returns what the best classifiers reach that see only one marginal of an image.

    Returns:
      (accuracy from the mean of each channel, accuracy from the sum of the channels of each pixel).
    """
    of_means, of_sums = jax.random.split(key)
    # The mean over n pixels has noise of variance 1 / n. In units of it, a class adds this to the channels.
    means = jnp.asarray(strength * bank.sum((1, 2)) / WIDTH, jnp.float32)
    channels = bank.shape[-1]
    from_sums = bayes_accuracy(bank.sum(-1, keepdims=True) / np.sqrt(channels), strength, of_sums, count)
    return float(accuracy_of_means(of_means, means)), from_sums.value


@jax.jit
def accuracy_of_means(key: Array, means: Float[Array, "k c"]) -> Array:
    """Returns the accuracy of the Bayes classifier of classes with these means and noise of variance one."""
    of_label, of_noise = jax.random.split(key)
    labels = jax.random.randint(of_label, (102_400,), 0, len(means))
    seen = means[labels] + jax.random.normal(of_noise, (len(labels), means.shape[-1]))
    return jax.nn.softmax(seen @ means.T - jnp.square(means).sum(-1) / 2).max(-1).mean()
