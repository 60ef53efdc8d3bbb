"""Implements Xception in plain Flax: `nn.Conv(feature_group_count=...)`, `nn.BatchNorm` and `nn.max_pool`."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Xception(nn.Module):
    """Figure 5, with the same parameters as `xception_jax`."""

    @nn.compact
    def __call__(self, x, train: bool):
        """Returns logits [b, 1000]."""

        def norm(x):
            return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3)(x)

        def conv_bn(x, features, side, stride=1, padding="SAME"):
            return norm(nn.Conv(features, (side, side), stride, padding, use_bias=False)(x))

        def sepconv_bn(x, features):
            channels = x.shape[-1]
            x = nn.Conv(channels, (3, 3), feature_group_count=channels, use_bias=False)(x)
            return conv_bn(x, features, 1)

        x = nn.relu(conv_bn(x, 32, 3, 2, "VALID"))
        x = nn.relu(conv_bn(x, 64, 3, 1, "VALID"))
        for block, (first, second) in enumerate([(128, 128), (256, 256), (728, 728), *[(728, 728)] * 8, (728, 1024)]):
            if 3 <= block < 11:
                y = x
                for _ in range(3):
                    y = sepconv_bn(nn.relu(y), 728)
                x = x + y
            else:
                y = sepconv_bn(nn.relu(x) if block else x, first)
                y = sepconv_bn(nn.relu(y), second)
                x = nn.max_pool(y, (3, 3), (2, 2), "SAME") + conv_bn(x, second, 1, 2)
        x = nn.relu(sepconv_bn(x, 1536))
        x = nn.relu(sepconv_bn(x, 2048))
        return nn.Dense(1000)(x.mean((1, 2)))


def prepare(work: dict, options: dict):
    """Returns (step, parameters)."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (work["batch"], work["size"], work["size"], 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(1000, size=work["batch"]))
    model, optimizer = Xception(), optax.sgd(0.01, momentum=0.9)
    variables = jax.jit(lambda key: model.init(key, images[:1], train=False))(jax.random.key(0))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    if work["kind"] == "infer":
        apply = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
        return lambda: apply(variables, images).block_until_ready(), parameters

    def loss(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_step(params, batch_stats, opt_state):
        (_, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch_stats)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    def step():
        nonlocal state
        state = jax.block_until_ready(train_step(*state))

    return step, parameters
