"""Every check of config.py: what a field may be, what a wrong one is answered with, and which fields contradict."""

from __future__ import annotations

import json
import math
import re

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from xception_jax.config import (
    FIELDS,
    default_config,
    duration_in_steps,
    from_json,
    resolve,
    resolve_model,
    to_json,
    unknown_field,
)
from xception_jax.errors import ConfigError

pytestmark = pytest.mark.smoke

LABELS = ("paper", "reference", "inferred", "modern", "local")


def changed(**fields) -> ConfigDict:
    """Returns the default config with fields set, unchecked: `model__segments` is config.model.segments."""
    config = default_config()
    for name, value in fields.items():
        put(config, name.replace("__", "."), value)
    return config


def put(config, name, value):
    *parents, leaf = name.split(".")
    for parent in parents:
        config = config[parent]
    with config.unlocked():
        # ConfigDict itself would turn True into 1.0 beside a float; a file or JSON hands it over as it is.
        if leaf in config:
            del config[leaf]
        config[leaf] = value


def get(config, name):
    for key in name.split("."):
        config = config[key]
    return config


def refused(config) -> ConfigError:
    """Returns the error that `resolve` raises, having checked its form."""
    with pytest.raises(ConfigError) as error:
        resolve(config)
    lines = str(error.value).split("\n")
    assert len(lines) == 3
    for line, start in zip(lines, ("error: ", "  where: config.", "  fix:   "), strict=True):
        # `config.model` as a whole is a place too.
        assert line.startswith(start) or line == "  where: config"
        assert line.strip() != start.strip()
    assert error.value.exit_code == ConfigError.exit_code
    return error.value


def test_the_defaults_are_valid_and_labelled():
    resolved = resolve(default_config())
    for name, field in FIELDS.items():
        value = get(resolved, name)
        # None stands for a value that depends on another field.
        assert value == (True if name == "model.batch_norm.scale" else field.default), name
        assert field.source.split(":")[0].split(",")[0] in LABELS, name
        if field.default is not None:
            assert field.check(field.default) == field.default


def test_the_papers_recipe_is_the_default():
    config = resolve(default_config())
    assert (config.schedule.learning_rate, config.schedule.decay_rate, config.schedule.decay_every) == (
        0.045,
        0.94,
        "2 epochs",
    )
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.weight_decay) == ("sgd", 0.9, 1e-5)
    assert (config.model.dropout_rate, config.model.num_classes, config.data.image_size) == (0.5, 1000, 299)
    assert (config.model.batch_norm.epsilon, config.model.batch_norm.momentum) == (1e-3, 0.99)


# What no field of a kind may be, by the words with which its check says what it expects.
NEVER = {
    "a whole number, at least": [1.5, "1.5", "many", True, None, math.inf, math.nan, [1], {"a": 1}],
    "a number": ["much", True, None, math.nan, -math.inf, [1.0]],
    "one of '": ["nonsense", 3, None, True, ["sgd"]],
    "or a whole number": ["nonsense", 1.5, True, None, math.inf],
    "True or False": ["True", 1, 0, "yes"],
    "a string": [3, None, ["a"], True],
    "a regular expression": ["(", "*", 3, None],
    "a number and a unit": ["10", 10, "ten epochs", "-1 epochs", "1 hour", "", None, "1 epoch 2 steps", "nan epochs"],
    "2 numbers": [(0.5,), (0.1, 0.2, 0.3), ("a", "b"), 3, None, "11", (0.5, math.nan)],
}


def kind_of(field) -> str:
    # The longest of those that fit: 'a number and a unit' also starts with 'a number'.
    return max((kind for kind in NEVER if kind in field.expects), key=len)


def test_every_kind_of_field_has_wrong_values():
    assert {kind_of(field) for field in FIELDS.values()} == set(NEVER)


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_type_is_refused(name):
    field = FIELDS[name]
    for value in NEVER[kind_of(field)]:
        if value is None and field.default is None:
            continue
        error = refused(changed(**{name.replace(".", "__"): value}))
        if isinstance(value, dict):  # A section where there is none.
            continue
        assert error.where == f"config.{name}", value
        assert repr(value) in error.what
        assert field.expects in error.fix
        assert repr(field.default) in error.fix


def numeric_limits():
    """Yields (field, the last value allowed, the first one refused) from the words of each expectation."""
    for name, field in FIELDS.items():
        if match := re.search(r"whole number(?:,| of) at least (-?\d+)", field.expects):
            yield name, int(match[1]), int(match[1]) - 1
        elif match := re.match(r"a number (above|of at least) (\S+?)(?:, at most (\S+))?$", field.expects):
            low = float(match[2])
            yield name, (low + 1e-9 if match[1] == "above" else low), (low if match[1] == "above" else low - 1e-9)
            if match[3]:
                yield name, float(match[3]), math.nextafter(float(match[3]), math.inf)


@pytest.mark.parametrize(("name", "allowed", "not_allowed"), list(numeric_limits()))
def test_limits(name, allowed, not_allowed):
    check = FIELDS[name].check
    assert check(allowed) == allowed
    with pytest.raises(ValueError, match=r"^$"):
        check(not_allowed)
    assert refused(changed(**{name.replace(".", "__"): not_allowed})).where == f"config.{name}"


def test_a_few_limits_in_numbers():
    """The test above reads the limits from the fields; these are written out."""
    for name, value in (
        ("model__dropout_rate", 1.0),
        ("model__num_classes", 0),
        ("model__segments", 0),
        ("model__width_multiplier", 0.0),
        ("model__batch_norm__epsilon", 0.0),
        ("data__image_size", 0),
        ("batch_size", -1),
        ("schedule__learning_rate", -0.1),
        ("optimizer__momentum", 1.1),
        ("mesh__data", -2),
        ("seed", -1),
    ):
        assert refused(changed(**{name: value})).where == "config." + name.replace("__", ".")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batchsize", "batch_size"),
        ("batch_sise", "batch_size"),
        ("learning_rate", "schedule.learning_rate"),
        ("model.segmens", "model.segments"),
        ("model.dropout", "model.dropout_rate"),
        ("model.epsilon", "model.batch_norm.epsilon"),
        ("optimiser", "optimizer.name"),
        ("schedule.lerning_rate", "schedule.learning_rate"),
        ("data.imagesize", "data.image_size"),
    ],
)
def test_an_unknown_field_is_answered_with_the_one_meant(name, meant):
    if name != "optimiser":
        error = refused(changed(**{name.replace(".", "__"): 8}))
        assert error.where == f"config.{name}"
        assert error.fix == f"did you mean config.{meant}?"
    assert unknown_field(name).where == f"config.{name}"


def test_an_unknown_field_like_no_other():
    error = refused(changed(zzzzzz=1))
    assert error.fix == "the fields are listed in xception_jax/fields.py"


def test_an_unknown_section():
    config = default_config()
    config.optimzer = ConfigDict({"momentum": 0.8})
    assert refused(config).fix == "did you mean config.optimizer.momentum?"


def test_a_value_where_a_section_belongs_is_refused():
    config = default_config()
    del config["optimizer"]
    config.optimizer = "sgd"
    assert refused(config).where == "config.optimizer"


def test_what_may_be_none():
    may = {name for name, field in FIELDS.items() if field.default is None}
    assert may == {"model.group_width", "model.batch_norm.scale"}
    assert resolve(changed(model__group_width=None)).model.group_width is None
    assert resolve(changed(model__batch_norm__scale=None)).model.batch_norm.scale is True
    for network, scale in (("xception", True), ("inception_v3", False), ("inception_v3_2016", True)):
        assert resolve(changed(model__name=network)).model.batch_norm.scale is scale
        assert (
            resolve(changed(model__name=network, model__batch_norm__scale=not scale)).model.batch_norm.scale
            is not scale
        )


def parse(*arguments) -> ConfigDict:
    """Returns the resolved config of a command line."""
    values = flags.FlagValues()
    command = ["train.py", *arguments]
    config_flags.DEFINE_config_dict("config", default_config(), flag_values=values, sys_argv=command)
    values(command)
    return resolve(values.config)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.segments=4", 4),
        ("model.segments=depthwise", "depthwise"),
        ("model.group_width=8", 8),
        ("model.batch_norm.statistics=32", 32),
        ("model.batch_norm.statistics=device", "device"),
        ("model.batch_norm.scale=False", False),
        ("model.residual=False", False),
        ("model.dropout_rate=0", 0.0),
        ("schedule.learning_rate=1e-3", 1e-3),
        ("data.crop_area=(0.1, 0.9)", (0.1, 0.9)),
        ("duration=3e6 examples", "3e6 examples"),
        ("optimizer.decayed=sepconv.*kernel$", "sepconv.*kernel$"),
        ("optimizer.multipliers=(('^head/', 10), ('_bn', 0.5))", (("^head/", 10.0), ("_bn", 0.5))),
        ("batch_size=64", 64),
    ],
)
def test_the_command_line(argument, expected):
    value = get(parse(f"--config.{argument}"), argument.split("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_a_wrong_value_on_the_command_line():
    with pytest.raises(ConfigError, match="'four'"):
        parse("--config.model.segments=four")


OTHER_VALUES = {
    "name": 'quotes " and ü',
    "seed": 7,
    "model.segments": 4,
    "model.batch_norm.statistics": 8,
    "model.residual": False,
    "model.batch_norm.scale": False,
    "data.crop_area": (0.25, 0.75),
    "optimizer.decayed": r"(block\d+|head)/.*kernel$",
    "optimizer.frozen": "^block[1-4]_",
    "optimizer.multipliers": (("^head/", 10.0), ("_bn/", 0.5)),
    "init.weights": "a file",
    "schedule.learning_rate": 0.1,
    "optimizer.clip_norm": 1e-300,
    "duration": "3e6 examples",
    "batch_size": 64,
}


@pytest.mark.parametrize(
    "fields", [{}, OTHER_VALUES, {"model.group_width": 8}], ids=["default", "others", "group_width"]
)
def test_json_round_trip_is_the_identity(fields):
    config = resolve(changed(**{name.replace(".", "__"): value for name, value in fields.items()}))
    text = to_json(config)
    again = from_json(text)
    assert again.to_dict() == config.to_dict()
    assert to_json(again) == text
    for name in FIELDS:
        assert type(get(again, name)) is type(get(config, name)), name
    assert list(json.loads(text)) == list(dict.fromkeys(name.split(".")[0] for name in FIELDS))


def test_json_is_read_as_data():
    """No tag, class or reference in it is looked up; text that looks like code stays text."""
    config = resolve(default_config()).to_dict()
    config["name"] = "!!python/object/apply:os.system ['false']"
    assert from_json(json.dumps(config)).name == config["name"]
    for key in ("__class__", "_fields", "py/object", "__reduce__"):
        with pytest.raises(ConfigError, match=key):
            from_json(json.dumps(config | {key: "os.system"}))
    with pytest.raises(ConfigError):
        from_json(json.dumps(config | {"batch_size": "__import__('os').getpid()"}))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', "null", "3", '{"batch_size": 8} {}'])
def test_a_damaged_file_is_a_config_error(text):
    with pytest.raises(ConfigError) as error:
        from_json(text)
    assert len(str(error.value).split("\n")) == 3


def test_resolving_twice_is_resolving_once_and_leaves_its_argument_alone():
    config = changed(model__segments="4", data__crop_area=[0.1, 1])
    before = config.to_dict()
    resolved = resolve(config)
    assert config.to_dict() == before
    assert resolve(resolved).to_dict() == resolved.to_dict()
    assert resolved.model.segments == 4
    assert resolved.data.crop_area == (0.1, 1.0)


def test_fields_that_are_left_out_have_their_defaults():
    assert resolve(ConfigDict({"model": {"segments": 2}})).to_dict() == resolve(changed(model__segments=2)).to_dict()
    assert resolve_model(ConfigDict({})).to_dict() == resolve(default_config()).model.to_dict()


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("500 steps", 500),
        ("1 step", 1),
        ("10 epochs", 1000),
        ("1 epoch", 100),
        ("0.5 epochs", 50),
        ("3e3 examples", 300),
        ("1_000 examples", 100),
        ("1 example", 0),
        ("14 examples", 1),
        ("16 examples", 2),
        ("0 steps", 0),
        (" 2  Epochs ", 200),
    ],
)
def test_durations(duration, steps):
    assert duration_in_steps(duration, batch_size=10, num_examples=1000) == steps


def test_the_papers_duration():
    assert abs(duration_in_steps(FIELDS["duration"].default, 1920, 1_281_167) - 113_000) < 300


@pytest.mark.parametrize("duration", NEVER["a number and a unit"])
def test_what_is_no_duration(duration):
    with pytest.raises((ValueError, AttributeError)):
        duration_in_steps(duration, 10, 1000)


@pytest.mark.parametrize(
    ("fields", "where", "fix"),
    [
        ({"model__segments": 4, "model__group_width": 8}, "model", "set one of them"),
        ({"model__kernel_size": 4}, "model.kernel_size", "odd number"),
        ({"mesh__data": 0}, "mesh.data", "-1 for all"),
        ({"batch_size": 10, "accumulation_steps": 4}, "batch_size", "8"),
        ({"batch_size": 2, "accumulation_steps": 4}, "batch_size", "4"),
        ({"batch_size": 64, "model__batch_norm__statistics": 48}, "model.batch_norm.statistics", "divisor"),
        (
            {"batch_size": 64, "accumulation_steps": 4, "model__batch_norm__statistics": 32},
            "model.batch_norm.statistics",
            "divisor",
        ),
        ({"data__crop_area": (0.0, 1.0)}, "data.crop_area", "0 < smallest"),
        ({"data__crop_area": (0.6, 0.5)}, "data.crop_area", "smallest <= largest"),
        ({"data__crop_area": (0.5, 1.5)}, "data.crop_area", "largest <= 1"),
        ({"model__aux_head": True}, "model.aux_head", "leave it at False"),
        ({"model__fc_width": 128}, "model.fc_width", "leave it at 4096"),
        ({"model__module": "inception", "model__segments": 2}, "model.segments", "leave it at 'depthwise'"),
        ({"model__name": "inception_v3", "model__residual": False}, "model.residual", "leave it at True"),
        ({"model__name": "inception_v3_2016", "model__stem": "small"}, "model.stem", "leave it at 'imagenet'"),
    ],
)
def test_contradictions(fields, where, fix):
    error = refused(changed(**fields))
    assert error.where == f"config.{where}"
    assert fix in error.fix
    # Its value is in the message.
    assert any(str(value) in error.what for value in fields.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"model__group_width": 8},
        {"model__segments": "depthwise", "model__group_width": 8},
        {"batch_size": 64, "accumulation_steps": 4, "model__batch_norm__statistics": 8},
        {"model__kernel_size": 5},
        {"data__crop_area": (1.0, 1.0)},
        {"mesh__data": -1},
        {"model__name": "inception_v3", "model__aux_head": True, "model__padding": "symmetric"},
        {"model__fc_layers": 2, "model__fc_width": 128},
    ],
)
def test_what_only_looks_like_a_contradiction(fields):
    resolve(changed(**fields))
