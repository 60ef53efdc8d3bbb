"""The networks in a training loop of a few lines, as other projects have it: no mesh, no step of ours."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import imagenet
from xception_jax.config import override, resolve
from xception_jax.models import create_model


@pytest.mark.slow
def test_statistics_of_a_device_need_no_mesh():
    """`statistics='device'` groups the batch by the devices of the mesh; without one, a single device has it all."""
    small = {"model.width_multiplier": 0.05, "model.middle_blocks": 0, "model.num_classes": 5}
    config = override(resolve(imagenet.get_config()), small)
    assert config.model.batch_norm.statistics == "device"
    model, optimizer = create_model(config.model), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.normal(size=(4, 71, 71, 3)), jnp.float32), jnp.array([0, 1, 2, 3])
    start = jax.jit(model.init)(jax.random.key(0), images)

    @jax.jit
    def step(variables, state, key):
        def loss(params):
            (logits, _), updates = model.apply(
                variables | {"params": params}, images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(grads, state)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, state, grads

    variables, state = start, optimizer.init(start["params"])
    for number in range(2):
        variables, state, grads = step(variables, state, jax.random.key(number))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, variables)))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    before, after = (jax.tree.leaves(each["batch_stats"]) for each in (start, variables))
    assert len(before) > 30
    assert all(np.all(a != b) for a, b in zip(before, after, strict=True))
