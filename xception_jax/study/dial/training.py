"""Trains one cell of the dial study on endless data, and tests the network.

The steps of an arm are one compiled program for all its cells: bank, strength, rate and seed are arguments. Steps run
in `lax.scan`, and images are drawn inside it, so a step needs nothing from the host.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from xception_jax.study.dial import task
from xception_jax.study.dial.banks import CHANNELS, CLASSES, SIDE, Dial, measure
from xception_jax.study.dial.network import DialArm, DialNetwork

_CHUNK = 50  # steps of one call
_TEST_BATCH = 512
_PULLED, _PULL_BATCH = 4096, 256  # images over which templates are pulled back

CURVE = 8
"""Points of the learning curve, and the fewest steps."""

State = Any  # variables of the network, and the momentum of its parameters


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How all cells are trained: SGD with momentum, a warmup over a tenth of the steps, and a cosine that ends at zero.

    Attributes:
      steps: number of steps.
      batch_size: images in a step.
      momentum: momentum of SGD.
      test_images: images on which a network is tested.
    """

    steps: int
    batch_size: int = 128
    momentum: float = 0.9
    test_images: int = 40_960


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trained network reaches.

    Attributes:
      accuracy: on images of its own part of the stream.
      train_accuracy: mean over the last eighth of the steps, before each step sees its images.
      loss: mean over the same steps.
      curve: the mean training accuracy in each eighth of the steps.
      pulled: dial of the templates pulled back to the input.
      seconds: wall time of training and testing, with compilation.
      cpu_seconds: the same in processor time, summed over the cores.
    """

    accuracy: float
    train_accuracy: float
    loss: float
    curve: tuple[float, ...]
    pulled: Dial
    seconds: float
    cpu_seconds: float


def train(
    arm: DialArm,
    widths: tuple[int, ...],
    bank: Float[np.ndarray, "k 3 3 c"],
    strength: float,
    *,
    rate: float,
    seed: int,
    recipe: Recipe,
    test_part: int = task.TEST,
) -> tuple[Outcome, dict[str, np.ndarray]]:
    """Trains a network and tests it.

    Args:
      arm: kind of network.
      widths: output channels of its blocks.
      bank: the templates.
      strength: factor of the templates.
      rate: highest learning rate.
      seed: seed of the images and the initial parameters.
      recipe: see `Recipe`.
      test_part: part of the stream for the test: `task.TEST`, or `task.TUNE` to choose a rate.

    Returns:
      (outcome, variables of the network by path).
    """
    start, cpu_start = time.monotonic(), time.process_time()
    programs = _Programs.of(arm, widths, recipe)
    templates, strength_ = jnp.asarray(bank, jnp.float32), jnp.float32(strength)
    state = programs.init(task.stream(seed, task.INIT))
    history = []
    for first in range(0, recipe.steps, _CHUNK):
        state, values = programs.steps(
            state,
            task.stream(seed, task.TRAIN),
            templates,
            strength_,
            jnp.float32(rate),
            first,
            count=min(_CHUNK, recipe.steps - first),
        )
        history.append(values)
    loss, right = np.concatenate(history, axis=1)
    variables = state[0]
    batches = -(-recipe.test_images // _TEST_BATCH)
    accuracy = float(programs.test(variables, task.stream(seed, test_part), templates, strength_, batches))
    pulled = programs.pull(variables, task.stream(seed, task.PULL), templates, strength_)
    curve = tuple(float(part.mean()) for part in np.array_split(right, CURVE))
    last_loss = float(np.array_split(loss, CURVE)[-1].mean())
    dial = measure(np.asarray(pulled)) if np.isfinite(pulled).all() else Dial(np.nan, np.nan, 0, 0)
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    outcome = Outcome(accuracy, curve[-1], last_loss, curve, dial, round(seconds, 1), round(cpu_seconds, 1))
    return outcome, {path: np.asarray(value) for path, value in flatten_dict(variables, sep="/").items()}


class _Programs:
    """The compiled programs of one arm."""

    @staticmethod
    @functools.cache
    def of(arm: DialArm, widths: tuple[int, ...], recipe: Recipe) -> _Programs:
        """Returns the programs of an arm, which are compiled once in a process."""
        return _Programs(DialNetwork(arm, widths), recipe)

    def __init__(self, network: DialNetwork, recipe: Recipe):
        self._network, self._recipe = network, recipe
        self.init = jax.jit(self._init)
        self.steps = jax.jit(self._steps, static_argnames="count")
        self.test = jax.jit(self._test, static_argnames="batches")
        self.pull = jax.jit(self._pull)

    def _init(self, key: Array) -> State:
        images = jnp.zeros((1, task.WIDTH, task.WIDTH, CHANNELS))
        variables = self._network.init(key, images, train=False)
        return variables, jax.tree.map(jnp.zeros_like, variables["params"])

    def _steps(
        self, state: State, key: Array, bank: Array, strength: Array, rate: Array, first: Array, count: int
    ) -> tuple[State, Float[Array, "2 steps"]]:
        """Trains for `count` steps, from step `first` on."""
        recipe = self._recipe
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, recipe.steps // 10, recipe.steps)

        def loss_of(params: Any, statistics: Any, images: Array, labels: Array) -> tuple[Array, tuple[Array, Any]]:
            variables = {"params": params, "batch_stats": statistics}
            logits, updated = self._network.apply(variables, images, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, ((logits.argmax(-1) == labels).mean(), updated["batch_stats"])

        def step(state: State, number: Array) -> tuple[State, Array]:
            variables, momentum = state
            images, labels, _ = task.draw(jax.random.fold_in(key, number), bank, strength, recipe.batch_size)
            gradient_of = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (right, statistics)), gradient = gradient_of(
                variables["params"], variables["batch_stats"], images, labels
            )
            now = rate * schedule(number)
            momentum = jax.tree.map(lambda old, new: recipe.momentum * old + new, momentum, gradient)
            params = jax.tree.map(lambda value, change: value - now * change, variables["params"], momentum)
            return ({"params": params, "batch_stats": statistics}, momentum), jnp.stack([loss, right])

        state, values = jax.lax.scan(step, state, first + jnp.arange(count))
        return state, values.T

    def _logits(self, variables: Any, images: Array) -> Array:
        return cast(Array, self._network.apply(variables, images, train=False))

    def _test(self, variables: Any, key: Array, bank: Array, strength: Array, batches: int) -> Array:
        def test_batch(key: Array) -> Array:
            images, labels, _ = task.draw(key, bank, strength, _TEST_BATCH)
            return (self._logits(variables, images).argmax(-1) == labels).mean()

        return jax.lax.map(test_batch, jax.random.split(key, batches)).mean()

    def _pull(self, variables: Any, key: Array, bank: Array, strength: Array) -> Float[Array, "k 3 3 c"]:
        """Pulls the network's templates back to the input.

        The template of a class is the gradient of its logit, minus the mean over the classes, for the pixels where the
        class's template stands, averaged over images of this class. For the Bayes classifier it is nearly the bank.
        """

        def centred(images: Array, labels: Array) -> Array:
            logits = self._logits(variables, images)
            return (jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] - logits.mean(-1)).sum()

        def batch(key: Array) -> Array:
            images, labels, places = task.draw(key, bank, strength, _PULL_BATCH)
            windows = task.crop(jax.grad(centred)(images, labels), places, SIDE)
            return jnp.einsum("bk,bijc->kijc", jax.nn.one_hot(labels, CLASSES), windows)

        count = min(_PULLED, self._recipe.test_images)
        return jax.lax.map(batch, jax.random.split(key, -(-count // _PULL_BATCH))).sum(0)
