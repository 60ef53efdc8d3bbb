"""No field of `config.model` is accepted and ignored: each value that is not the default makes another network."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from xception_jax.config import XCEPTION_ONLY, default_config
from xception_jax.errors import ConfigError
from xception_jax.fields import FIELDS
from xception_jax.models import create_model

XCEPTION = {"name": "xception", "width_multiplier": 0.25, "middle_blocks": 1, "num_classes": 10}
INCEPTION = {"name": "inception_v3", "width_multiplier": 0.125, "num_classes": 10}

# For each field: the values to try, and what must be set beside it for it to have a meaning.
VALUES: dict[str, tuple[list, dict]] = {
    "name": (["inception_v3", "inception_v3_2016"], {"middle_blocks": 8}),
    "num_classes": ([11, 1000], {}),
    "width_multiplier": ([0.5, 0.125], {}),
    "middle_blocks": ([0, 2], {}),
    "segments": ([1, 2, 4, 7], {}),
    "group_width": ([2, 8], {}),
    "order": (["pointwise_first"], {}),
    "intermediate_activation": (["relu", "elu"], {}),
    "module": (["inception"], {}),
    "residual": ([False], {}),
    "depth_multiplier": ([2, 3], {}),
    "kernel_size": ([1, 5, 7], {}),
    "stem": (["small"], {}),
    "fc_layers": ([1, 2], {}),
    "fc_width": ([128], {"fc_layers": 1}),
    "dropout_rate": ([0.0, 0.25], {}),
    "padding": (["symmetric"], {}),
    "dtype": (["bfloat16", "float64"], {}),
    "batch_norm.momentum": ([0.9], {}),
    "batch_norm.epsilon": ([1e-5], {}),
    "batch_norm.scale": ([False], {}),
    "batch_norm.statistics": (["device", 2, 4], {}),
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
    config = default_config().model
    for name, value in fields.items():
        config.update_from_flattened_dict({name: value})
    return config


class Network:
    """What a network consists of, computed when it is asked for: the program takes ten times longer than the shapes."""

    def __init__(self, side: int, **fields):
        self._model = create_model(model_config(**fields))
        self._images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)
        self._key = jax.eval_shape(lambda: jax.random.key(0))

    @functools.cached_property
    def variables(self):
        return jax.eval_shape(self._model.init, self._key, self._images)

    @functools.cached_property
    def program(self) -> str:
        """The text of a training step's forward pass on eight images over four devices."""

        def forward(variables, images, key):
            return self._model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})

        mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(mesh):
            program = jax.make_jaxpr(forward)(self.variables, self._images, self._key)
        # It names functions by their addresses.
        return re.sub(r"0x[0-9a-f]+", "", str(program))

    def equals(self, other: Network) -> bool:
        return str(self.variables) == str(other.variables) and self.program == other.program


@functools.cache
def network(side: int, fields: tuple[tuple[str, object], ...]) -> Network:
    return Network(side, **dict(fields))


def test_the_comparison_finds_equal_networks_equal():
    """Otherwise the tests below could not fail."""
    for base, side in ((XCEPTION, 64), (INCEPTION, 139)):
        assert network(side, tuple(base.items())).equals(Network(side, **base))


def cases(values):
    return [(name, value) for name, (options, _) in values.items() for value in options]


@pytest.mark.parametrize(("name", "value"), cases(VALUES))
def test_every_field_changes_xception(name, value):
    beside = XCEPTION | VALUES[name][1]
    changed, side = ({**INCEPTION, "name": value}, 139) if name == "name" else ({**beside, name: value}, 64)
    with jax.enable_x64(value == "float64"):
        assert not Network(side, **changed).equals(network(side, tuple(beside.items())))


@pytest.mark.parametrize(("name", "value"), cases(INCEPTION_VALUES))
def test_every_field_changes_inception_v3(name, value):
    beside = INCEPTION | INCEPTION_VALUES[name][1]
    with jax.enable_x64(value == "float64"):
        assert not Network(139, **{**beside, name: value}).equals(network(139, tuple(beside.items())))


def test_the_lists_above_are_complete():
    """A new field, or a new option of one, needs a value there."""
    fields = {name.removeprefix("model."): field for name, field in FIELDS.items() if name.startswith("model.")}
    assert set(VALUES) | {"aux_head"} == set(fields)
    assert set(INCEPTION_VALUES) == set(fields) - set(XCEPTION_ONLY)
    for name, (values, _) in VALUES.items():
        options = set(re.findall(r"'(\w+)'", fields[name].expects))
        assert options <= {*map(str, values), str(fields[name].default)}, name


NOT_DEFAULT = {name: VALUES[name][0][0] for name in XCEPTION_ONLY}


@pytest.mark.parametrize("variant", ["inception_v3", "inception_v3_2016"])
@pytest.mark.parametrize("name", XCEPTION_ONLY)
def test_inception_v3_refuses_the_fields_of_xception(variant, name):
    with pytest.raises(ConfigError) as error:
        create_model(model_config(name=variant, **{name: NOT_DEFAULT[name]}))
    assert error.value.where == f"config.model.{name}"
    assert variant in error.value.what
    assert repr(default_config().model[name]) in error.value.fix


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
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_a_field_without_effect_is_refused(fields, where):
    with pytest.raises(ConfigError) as error:
        create_model(model_config(**fields))
    assert error.value.where == f"config.model.{where}"
