"""BatchNorm in its three kinds of statistics against plain numpy, also on several devices."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_variables

from xception_jax.models.layers import BatchNorm, Conv

MOMENTUM, EPSILON = 0.9, 1e-3
IMAGES, SIDE, CHANNELS = 16, 3, 5


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # Each image has a mean and a spread of its own, so that every way of grouping gives another result.
    x = rng.normal(rng.normal(0, 2, (IMAGES, 1, 1, CHANNELS)), rng.uniform(0.5, 2, (IMAGES, 1, 1, CHANNELS)))
    x = x + rng.normal(size=(IMAGES, SIDE, SIDE, CHANNELS))
    return {
        "x": x,
        "dy": rng.normal(size=x.shape),
        "scale": rng.uniform(0.5, 2, CHANNELS),
        "bias": rng.normal(size=CHANNELS),
        "mean": rng.normal(size=CHANNELS),
        "var": rng.uniform(0.5, 2, CHANNELS),
    }


def numpy_batch_norm(x, dy, scale, bias, mean, var, group_size):
    """Returns (y, dx, dscale, dbias, running mean, running variance), from the textbook's formulas."""
    y, dx = np.empty_like(x), np.empty_like(x)
    dscale, means, variances = np.zeros(CHANNELS), [], []
    for first in range(0, len(x), group_size):
        group = slice(first, first + group_size)
        values, count = x[group], x[group].size // CHANNELS
        means.append(values.sum((0, 1, 2)) / count)
        variances.append(((values - means[-1]) ** 2).sum((0, 1, 2)) / count)
        deviation = np.sqrt(variances[-1] + EPSILON)
        normalised = (values - means[-1]) / deviation
        y[group] = normalised * scale + bias
        dscale += (dy[group] * normalised).sum((0, 1, 2))
        dnormalised = dy[group] * scale
        along = (dnormalised * normalised).sum((0, 1, 2)) / count
        dx[group] = (dnormalised - dnormalised.sum((0, 1, 2)) / count - normalised * along) / deviation
    new_mean = MOMENTUM * mean + (1 - MOMENTUM) * np.mean(means, axis=0)
    new_var = MOMENTUM * var + (1 - MOMENTUM) * np.mean(variances, axis=0)
    return y, dx, dscale, dy.sum((0, 1, 2)), new_mean, new_var


# Runs with any number of devices, the batch sharded over them; prints what one training step computes.
PROGRAM = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from xception_jax.models.layers import BatchNorm

jax.config.update("jax_enable_x64", True)
jobs, inputs, momentum, epsilon = json.loads(sys.stdin.read())
mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
jax.set_mesh(mesh)
inputs = {name: jnp.asarray(value, jnp.float64) for name, value in inputs.items()}
by_image, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("data",), ()))
x, dy = (jax.device_put(inputs[name], by_image) for name in ("x", "dy"))
params = {name: inputs[name] for name in ("scale", "bias")}
batch_stats = {name: inputs[name] for name in ("mean", "var")}
results = {}
for statistics in jobs:
    norm = BatchNorm(momentum=momentum, epsilon=epsilon, statistics=statistics, dtype=jnp.dtype("float64"))

    def forward(params, x):
        return norm.apply({"params": params, "batch_stats": batch_stats}, x, True, mutable=["batch_stats"])

    def step(params, x, dy):
        y, vjp, updated = jax.vjp(forward, params, x, has_aux=True)
        return y, *vjp(dy), updated["batch_stats"]

    shardings = {"in_shardings": (everywhere, by_image, by_image)}
    y, dparams, dx, updated = jax.jit(step, **shardings)(params, x, dy)
    values = (y, dx, dparams["scale"], dparams["bias"], updated["mean"], updated["var"])

    def normalise(params, x):
        return forward(params, x)[0]

    if statistics == "device":  # a group is what `shard_map` gives to a device
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec("data")}
        assert jnp.abs(jax.jit(jax.shard_map(normalise, **specs))(params, x) - y).max() < 1e-12

    alone = jax.jit(normalise, in_shardings=(everywhere, by_image), out_shardings=by_image)
    compiled = alone.lower(params, x).compile()
    collectives = re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", compiled.as_text())
    results[statistics] = [[value.tolist() for value in values], sorted(set(collectives))]
print(json.dumps(results))
"""


@pytest.fixture(scope="module", params=[1, 4, 8])
def on_devices(request, run_python):
    """Returns (devices, what `PROGRAM` printed) for 'global', 'device' and groups of 8 images."""
    inputs = {name: value.tolist() for name, value in make_inputs().items()}
    job = json.dumps([["global", "device", 8], inputs, MOMENTUM, EPSILON])
    process = run_python("-c", PROGRAM, devices=request.param, input=job)
    assert process.returncode == 0, process.stderr
    return request.param, json.loads(process.stdout)


@pytest.mark.parametrize("statistics", ["global", "device", "8"])
def test_statistics_equal_numpy(on_devices, statistics):
    devices, results = on_devices
    group_size = {"global": IMAGES, "device": IMAGES // devices, "8": 8}[statistics]
    expected = numpy_batch_norm(**make_inputs(), group_size=group_size)
    names = ("value", "input gradient", "scale gradient", "bias gradient", "running mean", "running variance")
    for name, ours, theirs in zip(names, results[statistics][0], expected, strict=True):
        np.testing.assert_allclose(np.array(ours), theirs, rtol=0, atol=1e-12, err_msg=name)


def test_device_statistics_need_no_communication(on_devices):
    """Before the next layer: the running averages are merged beside it. Global statistics do need it."""
    devices, results = on_devices
    assert results["device"][1] == []
    assert results["global"][1] == ([] if devices == 1 else ["all-reduce"])


def apply(norm, x, train):
    inputs = make_inputs()
    variables = {
        "params": {name: jnp.asarray(inputs[name], jnp.float32) for name in ("scale", "bias")},
        "batch_stats": {name: jnp.asarray(inputs[name], jnp.float32) for name in ("mean", "var")},
    }
    return norm.apply(variables, x, train, mutable=["batch_stats"])


def test_evaluation_uses_the_running_averages():
    inputs = make_inputs()
    x = jnp.asarray(inputs["x"], jnp.float32)
    y, updated = jax.jit(lambda x: apply(BatchNorm(epsilon=EPSILON), x, False))(x)
    expected = (inputs["x"] - inputs["mean"]) / np.sqrt(inputs["var"] + EPSILON) * inputs["scale"] + inputs["bias"]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(updated["batch_stats"]["mean"], np.float32(inputs["mean"]))
    np.testing.assert_array_equal(updated["batch_stats"]["var"], np.float32(inputs["var"]))


@pytest.mark.parametrize(("batch", "statistics"), [(16, 5), (12, 8), (10, 4), (2, 8)])
def test_a_batch_that_does_not_fit_is_refused(batch, statistics):
    x = jnp.ones((batch, 2, 2, CHANNELS))
    with pytest.raises(ValueError, match=f"{batch} images does not fit statistics={statistics}"):
        apply(BatchNorm(statistics=statistics), x, True)


def test_without_scale_there_is_no_gamma():
    norm = BatchNorm(use_scale=False)
    variables = jax.jit(lambda: norm.init(jax.random.key(0), jnp.ones((2, 2, 2, 3)), True))()
    assert sorted(variables["params"]) == ["bias"]
    # Initialising counts as no step.
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    inputs = make_inputs()
    x = jnp.asarray(inputs["x"] + 100, jnp.bfloat16)
    y, updated = jax.jit(lambda x: apply(BatchNorm(momentum=0.0, dtype=jnp.bfloat16), x, True))(x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    for name, value in (("mean", exact.mean((0, 1, 2))), ("var", exact.var((0, 1, 2)))):
        running = updated["batch_stats"][name]
        assert running.dtype == jnp.float32
        # In bfloat16 the mean near 100 would be off by up to 0.25, and the variance be noise.
        np.testing.assert_allclose(running, value, rtol=2e-3, err_msg=name)
    for layer in (BatchNorm(dtype=jnp.bfloat16), Conv(4, (3, 3), dtype=jnp.bfloat16)):
        arguments = (True,) if isinstance(layer, BatchNorm) else ()
        variables = random_variables(layer, x, *arguments)
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        y = jax.eval_shape(lambda x: layer.apply(variables, x, *arguments, mutable=["batch_stats"])[0], x)  # noqa: B023
        assert y.dtype == jnp.bfloat16


def test_kept_share_of_the_running_averages():
    inputs = make_inputs()
    x = jnp.asarray(inputs["x"], jnp.float32)
    _, updated = jax.jit(lambda x: apply(BatchNorm(momentum=0.75), x, True))(x)
    np.testing.assert_allclose(
        updated["batch_stats"]["mean"], 0.75 * inputs["mean"] + 0.25 * inputs["x"].mean((0, 1, 2)), rtol=0, atol=1e-5
    )
