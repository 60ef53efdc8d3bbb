"""No field of `config.model` is accepted and ignored: each value that is not the default makes another network."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax.errors import (
    ScopeCollectionNotFound,
    ScopeParamNotFoundError,
    ScopeParamShapeError,
    ScopeVariableNotFoundError,
)
from jax.sharding import AbstractMesh, AxisType

from xception_jax.config import FIELDS, default_config, override, resolve
from xception_jax.errors import ConfigError
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost
from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers

MODEL_FIELDS = {name.removeprefix("model."): field for name, field in FIELDS.items() if name.startswith("model.")}
XCEPTION_ONLY = [name for name, field in MODEL_FIELDS.items() if field.owners == ("xception",)]

XCEPTION = {"name": "xception", "width_multiplier": 0.25, "middle_blocks": 1, "num_classes": 10}
INCEPTION = {"name": "inception_v3", "width_multiplier": 0.125, "num_classes": 10}

# For each field: the values to try, and what must be set beside it for it to have a meaning.
VALUES: dict[str, tuple[list, dict]] = {
    "name": (["inception_v3", "inception_v3_2016"], {}),
    "num_classes": ([11], {}),
    "width_multiplier": ([0.5], {}),
    "middle_blocks": ([0, 2], {}),
    "segments": ([1, 7], {}),
    "group_width": ([2, 8, "all"], {}),
    "order": (["pointwise_first"], {}),
    "intermediate_activation": (["relu", "elu", "leaky_relu", "scaled", "scaled_elu"], {}),
    "intermediate_slope": ([0.5], {"intermediate_activation": "leaky_relu"}),
    "intermediate_batch_norm": ([True], {}),
    "module": (["inception", "regular"], {}),
    "residual": ([False], {}),
    "depth_multiplier": ([2], {}),
    "kernel_size": ([1, 5], {}),
    "stem": (["small", "module"], {}),
    "stem_width": ([16], {}),
    "head_width": ([96], {}),
    "strides": ([(1, 2, 2, 1)], {}),
    "fc_layers": ([1], {}),
    "fc_width": ([128], {"fc_layers": 1}),
    "dropout_rate": ([0.0], {}),
    "padding": (["symmetric"], {}),
    "dtype": (["bfloat16", "float64"], {}),
    "batch_norm.momentum": ([0.9], {}),
    "batch_norm.epsilon": ([1e-5], {}),
    "batch_norm.scale": ([False], {}),
    "batch_norm.statistics": (["device", 2], {}),
}
# Fields that Inception V3 reads.
INCEPTION_VALUES = {
    name: (values[:1], beside) for name, (values, beside) in VALUES.items() if name not in (*XCEPTION_ONLY, "name")
} | {
    "aux_head": ([True], {}),
    "batch_norm.scale": ([True], {}),
    "name": (["inception_v3_2016"], {}),
}


def model_config(**fields):
    return override(resolve(default_config()), {f"model.{name}": value for name, value in fields.items()}).model


def program(model, variables, side: int) -> str:
    """Returns the text of a training step's forward pass on eight images over four devices."""

    def forward(variables, images, key):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)
    with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))):
        text = str(jax.make_jaxpr(forward)(variables, images, jax.eval_shape(lambda: jax.random.key(0))))
    # It names functions by their addresses.
    return re.sub(r"0x[0-9a-f]+", "", text)


@functools.cache
def variables_and_program(side: int, fields: tuple[tuple[str, object], ...], x64: bool):
    """Returns what the network with these fields consists of, computed once."""
    del x64  # Decides about the types in the program.
    model = create_model(model_config(**dict(fields)))
    images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return variables, program(model, variables, side)


def is_the_same(side: int, base: dict, changed: dict) -> bool:
    """Tells whether the fields `changed` make a network that takes the variables of `base` and computes the same."""
    variables, expected = variables_and_program(side, tuple(base.items()), jax.config.jax_enable_x64)
    try:
        return program(create_model(model_config(**changed)), variables, side) == expected
    except (ScopeParamNotFoundError, ScopeParamShapeError, ScopeVariableNotFoundError, ScopeCollectionNotFound):
        return False


def test_the_comparison_finds_equal_networks_equal():
    """Otherwise the tests below could not fail."""
    for base, side in ((XCEPTION, 64), (INCEPTION, 139)):
        assert is_the_same(side, base, base)
    # With as many segments as channels the network is the depthwise one: the comparison looks at what is computed.
    assert is_the_same(64, XCEPTION, XCEPTION | {"group_width": 1})


def cases(values):
    return [(name, value) for name, (options, _) in values.items() for value in options]


@pytest.mark.parametrize(("name", "value"), cases(VALUES))
def test_every_field_changes_xception(name, value):
    beside = XCEPTION | VALUES[name][1]
    changed, side = ({**INCEPTION, "name": value}, 64) if name == "name" else ({**beside, name: value}, 64)
    with jax.enable_x64(value == "float64"):
        assert not is_the_same(side, beside, changed)


@pytest.mark.parametrize(("name", "value"), cases(INCEPTION_VALUES))
def test_every_field_changes_inception_v3(name, value):
    beside = INCEPTION | INCEPTION_VALUES[name][1]
    with jax.enable_x64(value == "float64"):
        assert not is_the_same(139, beside, {**beside, name: value})


@pytest.mark.parametrize("module", ["separable", "inception", "regular"])
def test_initialization_is_that_of_every_convolution(module):
    """The one field that changes neither shapes nor what is computed from them."""
    found = []

    def visit(layer, images, output):
        if isinstance(layer, Conv):
            found.append(layer.initialization)

    trace_layers(create_model(XCEPTION | {"module": module, "initialization": "variance_preserving"}), 64, visit)
    assert len(found) > 15
    assert set(found) == {"variance_preserving"}


@pytest.mark.parametrize(
    ("side", "strides", "maps"), [(28, (1, 2, 2, 1), {28, 14, 7}), (32, (1, 2, 2, 1), {32, 16, 8})]
)
def test_strides_leave_no_map_below_seven_pixels(side, strides, maps):
    """So that every weight of a small image's network is alive."""
    model = create_model(XCEPTION | {"stem": "small", "strides": strides})
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))
    endpoints = jax.eval_shape(lambda variables: model.apply(variables, jnp.zeros((1, side, side, 3)))[1], variables)
    assert {value.shape[1] for name, value in endpoints.items() if name != "pre_logits"} == maps
    cost = count_cost(model, side)
    assert cost.live_parameters == cost.parameters


@pytest.mark.parametrize("fields", [{}, {"group_width": 4}, {"group_width": "all", "order": "pointwise_first"}])
def test_stem_and_head_have_their_width_whatever_the_width_of_the_rest(fields):
    def shapes(width):
        fixed = {"stem_width": 16, "head_width": 96, "width_multiplier": width}
        model = create_model(XCEPTION | fixed | fields)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))["params"]
        ends = [params[name]["kernel"].shape for name in ("block1_conv1", "block1_conv2")]
        return [*ends, params["head"]["predictions"]["kernel"].shape], params["block2_shortcut"]["kernel"].shape

    (narrow, inside), (wide, other) = shapes(0.1), shapes(0.25)
    assert narrow == wide == [(3, 3, 3, 16), (3, 3, 16, 32), (96, 10)]
    assert inside != other


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"stem_width": 6, "segments": 8}, "stem_width"), ({"head_width": 100, "group_width": 16}, "head_width")],
)
def test_widths_that_segments_do_not_divide_are_refused(fields, where):
    with pytest.raises(ConfigError, match="segments do not divide") as error:
        create_model(fields)
    assert error.value.where == f"config.model.{where}"


def test_the_lists_above_are_complete():
    """A new field, or a new option of one, needs a value there."""
    assert len(XCEPTION_ONLY) == 16
    assert set(VALUES) | {"aux_head", "initialization"} == set(MODEL_FIELDS)
    assert set(INCEPTION_VALUES) == set(MODEL_FIELDS) - set(XCEPTION_ONLY)
    for name, (values, _) in VALUES.items():
        options = set(re.findall(r"'(\w+)'", MODEL_FIELDS[name].expects))
        assert options <= {*map(str, values), str(MODEL_FIELDS[name].default)}, name


NOT_DEFAULT = {name: VALUES[name][0][0] for name in XCEPTION_ONLY if name in VALUES}
NOT_DEFAULT["initialization"] = "variance_preserving"


@pytest.mark.parametrize("variant", ["inception_v3", "inception_v3_2016"])
@pytest.mark.parametrize("name", XCEPTION_ONLY)
def test_inception_v3_refuses_the_fields_of_xception(variant, name):
    with pytest.raises(ConfigError) as error:
        create_model(model_config(name=variant, **{name: NOT_DEFAULT[name]}))
    assert error.value.where == f"config.model.{name}"
    assert variant in error.value.what
    assert repr(MODEL_FIELDS[name].default) in error.value.fix
    assert error.value.fix.endswith("it is a field of xception")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"aux_head": True}, "aux_head"),
        ({"fc_width": 128}, "fc_width"),
        ({"module": "inception", "segments": 2}, "segments"),
        ({"module": "inception", "group_width": 2}, "group_width"),
        ({"module": "inception", "order": "pointwise_first"}, "order"),
        ({"module": "inception", "intermediate_activation": "elu"}, "intermediate_activation"),
        ({"module": "inception", "depth_multiplier": 2}, "depth_multiplier"),
        ({"module": "inception", "intermediate_batch_norm": True}, "intermediate_batch_norm"),
        ({"module": "regular", "segments": 2}, "segments"),
        ({"module": "regular", "group_width": "all"}, "group_width"),
        ({"module": "regular", "order": "pointwise_first"}, "order"),
        ({"module": "regular", "intermediate_activation": "relu"}, "intermediate_activation"),
        ({"module": "regular", "depth_multiplier": 2}, "depth_multiplier"),
        ({"module": "regular", "intermediate_batch_norm": True}, "intermediate_batch_norm"),
        ({"intermediate_slope": 0.5}, "intermediate_slope"),
        ({"intermediate_activation": "relu", "intermediate_slope": 0.5}, "intermediate_slope"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_a_field_without_effect_is_refused(fields, where):
    with pytest.raises(ConfigError) as error:
        create_model(model_config(**fields))
    assert error.value.where == f"config.model.{where}"
