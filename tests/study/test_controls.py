import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from tests.study.simulated import small_study
from xception_jax.config import override
from xception_jax.errors import ConfigError
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost
from xception_jax.study.controls import channels_per_segment, solve_costs
from xception_jax.study.design import COSTS, Arm
from xception_jax.training.state import seed_bits


def study_of(*arms, **changes):
    study = small_study()
    config = override(study.config, {"model.middle_blocks": 0})
    reference = Arm("depthwise", {})
    return dataclasses.replace(
        study, config=config, arms=(reference, *arms), reference="depthwise", comparisons=(), interactions=(), **changes
    )


def test_every_arm_costs_what_the_reference_costs():
    control = "live_multiply_adds"
    study = study_of(Arm("regular", {"model.segments": 1}), control=control)
    costs = solve_costs(study, {})
    assert costs["depthwise"].width_multiplier == 0.2
    cost = costs["regular"]
    config = study.arm_config(study.arm("regular"), {"model.width_multiplier": cost.width_multiplier})
    counted = count_cost(create_model(config.model), 32)
    assert all(getattr(cost, name) == getattr(counted, name) for name in COSTS)
    assert getattr(cost, control) == pytest.approx(getattr(costs["depthwise"], control), rel=0.01)
    assert cost.width_multiplier < 0.15


def test_fixed_width_leaves_the_width_and_known_costs_are_not_solved_again():
    study = study_of(Arm("regular", {"model.segments": 1}), control="width")
    costs = solve_costs(study, {})
    assert costs["regular"].width_multiplier == 0.2
    assert costs["regular"].parameters > 3 * costs["depthwise"].parameters
    known = {name: dataclasses.replace(cost, parameters=1) for name, cost in costs.items()}
    assert solve_costs(study, known) == known


def test_a_width_that_cannot_be_matched_is_refused():
    with pytest.raises(ConfigError, match=r"no width gives arm coarse the .* parameters of depthwise within"):
        solve_costs(study_of(Arm("coarse", {"model.segments": 64}), tolerance=1e-4), {})


def test_channels_per_segment():
    study = study_of(Arm("4", {"model.segments": 4}), Arm("pairs", {"model.group_width": 2}))
    for name, expected in (("depthwise", 1.0), ("pairs", 2.0)):
        model = create_model(study.arm_config(study.arm(name)).model)
        assert channels_per_segment(model, 32) == pytest.approx(expected)
    # The inputs of the ten layers at a fifth of the width, in steps of four channels, cut into four.
    inputs = [12, 24, 24, 52, 52, 144, 144, 144, 204, 308]
    model = create_model(study.arm_config(study.arm("4")).model)
    assert channels_per_segment(model, 32) == pytest.approx(np.exp(np.mean(np.log(np.array(inputs) / 4))))


COMMON = (
    "block1_conv1/kernel",
    "block2_shortcut/kernel",
    "block3_sepconv2/pointwise/kernel",
    "block3_sepconv2/spatial/kernel",
    "head/predictions/kernel",
)


def test_arms_share_the_start_of_equal_parameters():
    """Paired seeds: what two networks have in common starts from the same values, whatever else is in them."""
    study = study_of(
        Arm("plain", {"model.residual": False, "model.intermediate_activation": "relu"}),
        Arm("pointwise", {"model.order": "pointwise_first"}),
    )

    def start(arm, seed):
        """Computes a few parameters at their start; the rest of the network is compiled away."""
        config = study.arm_config(study.arm(arm), {"model.width_multiplier": 0.05})

        def chosen(key):
            variables = create_model(config.model).init(key, jnp.zeros((1, 16, 16, 3)), train=False)
            paths, _ = jax.tree_util.tree_flatten_with_path(variables["params"])
            leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
            return {name: leaves[name] for name in COMMON if name in leaves}

        # The equations that these parameters need, without the forward pass around them.
        jaxpr, shapes = jax.make_jaxpr(chosen, return_shape=True)(jax.random.key(seed))
        needed, _ = pe.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
        values = jax.core.eval_jaxpr(needed, jaxpr.consts, jax.random.key(seed))
        return jax.device_get(jax.tree.unflatten(jax.tree.structure(shapes), values))

    reference = start("depthwise", 3)
    for arm, missing in (("plain", 1), ("pointwise", 0)):
        values = start(arm, 3)
        assert len(values) == len(COMMON) - missing
        for name, value in values.items():
            if value.shape == reference[name].shape:
                np.testing.assert_array_equal(value, reference[name], err_msg=f"{arm} {name}")
    assert (start("depthwise", 4)["block1_conv1/kernel"] != reference["block1_conv1/kernel"]).all()


def test_the_seed_is_the_same_key_as_an_argument():
    for seed in (0, 5, 2**33 + 1):
        key = jax.random.wrap_key_data(jnp.asarray(seed_bits(seed)))
        assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(seed))).all()
