"""Configs: what each field accepts, how a wrong value is refused, which fields contradict, and what is stored."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from functools import reduce
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from xception_jax.config import (
    FIELDS,
    AdamConfig,
    BatchNormConfig,
    DataConfig,
    ExperimentConfig,
    InceptionV3Config,
    LAMBConfig,
    LionConfig,
    MeshConfig,
    ScheduleConfig,
    SGDConfig,
    StaircaseConfig,
    XceptionConfig,
    default_config,
    duration_in_steps,
    flatten,
    from_json,
    override,
    resolve,
    resolve_model,
    to_dict,
    to_json,
    unknown_field,
)
from xception_jax.config.convert import _declared
from xception_jax.config.model import NETWORKS
from xception_jax.config.training import OPTIMIZERS, SCHEDULES
from xception_jax.errors import ConfigError

pytestmark = pytest.mark.smoke

LABELS = ("paper", "reference", "inferred", "modern", "local")
VARIANTS = {"model": NETWORKS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
DEFAULTS = resolve(default_config())
OF_RELEASES = Path(__file__).parent / "data_of_releases"


def changed(**fields) -> dict:
    """Returns the default config as plain data with fields set, unchecked: `model__segments` is config.model.segments.

    Like a config from a file, it holds the fields of all networks, optimizers and schedules.
    """
    config = default_config().to_dict()
    for name, value in fields.items():
        *parents, leaf = name.split("__")
        reduce(lambda node, parent: node[parent], parents, config)[leaf] = value
    return config


def get(config, name):
    return reduce(getattr, name.split("."), config)


def owned(name: str, owner: str | None = None) -> dict[str, str]:
    """Returns what makes a network, optimizer or schedule the current one that has the field."""
    owners = FIELDS[name].owners
    return {f"{name.partition('.')[0]}__name": owner or owners[0]} if owners else {}


def double(name: str) -> str:
    return name.replace(".", "__")


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
    assert resolved == resolve({}) == ExperimentConfig()
    assert flatten(resolved) == {
        name: field.default
        for name, field in FIELDS.items()
        if not field.owners or get(resolved, name.partition(".")[0]).name in field.owners
    }
    for name, field in _declared(ExperimentConfig()):
        assert field.source.split(":")[0].split(",")[0] in LABELS, (name, field.owners)
        if field.default is not None:
            assert field.check(field.default) == field.default, (name, field.owners)


@pytest.mark.parametrize("section", VARIANTS)
def test_every_field_of_every_variant_is_declared(section):
    """A field without a check or a source would be accepted as it is, and missing from --help."""
    for variant, config in VARIANTS[section].items():
        assert config.name == variant
        declared = {name for name, field in FIELDS.items() if not field.owners or variant in field.owners}
        built = flatten(resolve({section: {"name": variant}}))
        assert {name for name in built if name.startswith(f"{section}.")} == {
            name for name in declared if name.startswith(f"{section}.")
        }


def test_variants_agree_about_fields_of_one_name():
    """Else the command line, --help and the check before a variant is chosen would be right for only one of them."""
    seen = {}
    for name, field in _declared(ExperimentConfig()):
        contents = [cell.cell_contents for cell in field.check.__closure__ or ()]
        described = (field.kind, field.expects, field.check.__code__, contents, field.unless)
        assert seen.setdefault(name, described) == described, (name, field.owners)
    assert seen.keys() == FIELDS.keys()
    assert {"model.padding", "model.batch_norm.momentum", "optimizer.b2"} <= seen.keys()


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
    assert (config.data.crop_area, config.data.eval_crop, config.loss.label_smoothing) == ((0.05, 1.0), 0.875, 0.1)
    other = override(config, {"model.name": "inception_v3", "model.aux_head": True})
    assert other.loss.aux_weight == 0.4


# What no field of a kind may be, by the words with which its check says what it expects.
NEVER = {
    "a whole number, at least": [1.5, "1.5", "many", True, None, math.inf, math.nan, [1], {"a": 1}],
    "a number": ["much", True, None, math.nan, -math.inf, [1.0]],
    "one of '": ["nonsense", 3, None, True, ["sgd"]],
    "or a whole number": ["nonsense", 1.5, True, None, math.inf],
    "True or False": ["True", 1, 0, "yes"],
    "a string": [3, None, ["a"], True],
    "HOST:PORT": ["host", "host:port", "host:0", 3, None, ["a:1"], True],
    "a regular expression": ["(", "*", 3, None],
    "a number and a unit": ["10", 10, "ten epochs", "-1 epochs", "1 hour", "", None, "1 epoch 2 steps", "nan epochs"],
    "one number for each class": ["nonsense", 3, None, True, (-1.0, 1.0), "0, 0", ("a",), {"a": 1}],
    "strides, each 1 or 2": [(1,), (2, 2, 2, 3), (0, 1, 1, 1), (1.5, 1, 1, 1), 2, None, "1221", (True, 1, 1, 1)],
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
        if value is None and field.optional:
            continue
        error = refused(changed(**owned(name), **{double(name): value}))
        if isinstance(value, dict):  # A section where there is none.
            continue
        assert error.where == f"config.{name}", value
        assert repr(value) in error.what
        assert field.expects in error.fix
        assert repr(field.default) in error.fix


def test_a_wrong_value_is_refused_with_the_default_of_the_variant():
    for variant, default in (("adam", 0.999), ("lion", 0.99)):
        error = refused(changed(optimizer__name=variant, optimizer__b2=3))
        assert error.fix == f"set it to a number of at least 0, below 1 (default: {default})"


def numeric_limits():
    """Yields (field, the last value allowed, the first one refused) from the words of each expectation."""
    for name, field in FIELDS.items():
        if match := re.search(r"whole number(?:,| of) at least (-?\d+)", field.expects):
            yield name, int(match[1]), int(match[1]) - 1
            if match := re.search(r"at most ([\d,]+)$", field.expects):
                yield name, int(match[1].replace(",", "")), int(match[1].replace(",", "")) + 1
        elif match := re.match(r"a number (above|of at least) (\S+?)(?:, (at most|below) (\S+))?$", field.expects):
            low = float(match[2])
            yield name, (low + 1e-9 if match[1] == "above" else low), (low if match[1] == "above" else low - 1e-9)
            if match[3]:
                high = float(match[4])
                allowed = high if match[3] == "at most" else math.nextafter(high, -math.inf)
                yield name, allowed, math.nextafter(allowed, math.inf)


@pytest.mark.parametrize(("name", "allowed", "not_allowed"), list(numeric_limits()))
def test_limits(name, allowed, not_allowed):
    check = FIELDS[name].check
    assert check(allowed) == allowed
    with pytest.raises(ValueError, match=r"^$"):
        check(not_allowed)
    assert refused(changed(**owned(name), **{double(name): not_allowed})).where == f"config.{name}"


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
        ("schedule__decay_rate", 0.0),
        ("mesh__data", -2),
        ("seed", -1),
    ):
        assert refused(changed(**{name: value})).where == "config." + name.replace("__", ".")
    assert "a whole number, at least 0, at most 2,147,483,647 " in refused(changed(seed=99_999_999_999)).fix


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("batchsize", "batch_size"),
        ("batch_sise", "batch_size"),
        ("learning_rate", "schedule.learning_rate"),
        ("model.segmens", "model.segments"),
        ("model.dropout", "model.dropout_rate"),
        ("model.epsilon", "model.batch_norm.epsilon"),
        ("schedule.lerning_rate", "schedule.learning_rate"),
        ("data.imagesize", "data.image_size"),
        ("lr", "schedule.learning_rate"),
        ("optimizer.wd", "optimizer.weight_decay"),
        ("epochs", "duration"),
    ],
)
def test_an_unknown_field_is_answered_with_the_one_meant(name, meant):
    error = refused(changed(**{double(name): 8}))
    assert error.where == unknown_field(name).where == f"config.{name}"
    assert error.fix == f"did you mean config.{meant}?"


def test_an_unknown_field_like_no_other():
    error = refused(changed(zzzzzz=1))
    assert error.fix == "xception-jax train --help lists the fields"


def test_an_unknown_section():
    assert refused(changed(optimzer={"momentum": 0.8})).fix == "did you mean config.optimizer.momentum?"
    assert refused(changed(optimiser="sgd")).where == "config.optimiser"


@pytest.mark.parametrize(
    ("section", "value", "field"),
    [("optimizer", "sgd", "name"), ("model", None, "name"), ("model.batch_norm", 3, "momentum")],
)
def test_a_value_where_a_section_belongs_is_refused(section, value, field):
    error = refused(changed(**{double(section): value}))
    assert error.where == f"config.{section}"
    assert error.fix == f"set its fields, such as config.{section}.{field}"


def test_what_may_be_none():
    """Fields whose default depends on the variant or the launcher, or that the default variant does not have."""
    may = {name for name, field in FIELDS.items() if field.optional}
    assert may == {
        "model.group_width",
        "model.stem_width",
        "model.head_width",
        "model.batch_norm.scale",
        "model.aux_head",
        "distributed.num_processes",
        "distributed.process_id",
        "optimizer.rmsprop_decay",
        "optimizer.rmsprop_epsilon",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.epsilon",
    }
    assert resolve(changed(distributed__num_processes=None)).distributed.num_processes is None
    for name in may - {"distributed.num_processes", "distributed.process_id"}:
        section = name.partition(".")[0]
        for variant in FIELDS[name].owners or VARIANTS[section]:
            fields = {f"{section}__name": variant, double(name): None}
            expected = flatten(ExperimentConfig(**{section: VARIANTS[section][variant]}))[name]
            assert flatten(resolve(changed(**fields)))[name] == expected, (name, variant)
    for network, scale in (("xception", True), ("inception_v3", False), ("inception_v3_2016", True)):
        assert resolve(changed(model__name=network)).model.batch_norm.scale is scale
        other = resolve(changed(model__name=network, model__batch_norm__scale=not scale))
        assert other.model.batch_norm.scale is not scale


def parse(*arguments) -> ExperimentConfig:
    """Returns the typed config of a command line."""
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


@pytest.mark.parametrize(
    ("variant", "argument", "expected"),
    [
        ("optimizer.name=rmsprop", "optimizer.rmsprop_decay=0.8", 0.8),
        ("optimizer.name=rmsprop", "optimizer.nesterov=True", True),
        ("optimizer.name=lion", "optimizer.b2=0.98", 0.98),
        ("optimizer.name=lamb", "optimizer.epsilon=1e-3", 1e-3),
        ("model.name=inception_v3", "model.aux_head=True", True),
        ("schedule.name=staircase", "schedule.decay_rate=0.5", 0.5),
    ],
)
def test_fields_of_a_variant_on_the_command_line(variant, argument, expected):
    """In either order, although the default variant need not have the field."""
    for arguments in ((variant, argument), (argument, variant)):
        value = get(parse(*(f"--config.{each}" for each in arguments)), argument.split("=")[0])
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
    "fields",
    [
        {},
        OTHER_VALUES,
        {"model.group_width": 8},
        *({f"{section}.name": variant} for section, table in VARIANTS.items() for variant in table),
    ],
    ids=lambda fields: ",".join(map(str, fields.values()))[:20] or "default",
)
def test_json_round_trip_is_the_identity(fields):
    config = override(DEFAULTS, fields)
    text = to_json(config)
    again = from_json(text)
    assert again == config
    assert type(again.model) is type(config.model)
    assert to_json(again) == text
    for name, value in flatten(config).items():
        assert type(get(again, name)) is type(value), name
    assert list(json.loads(text)) == list(dict.fromkeys(name.split(".")[0] for name in FIELDS))


@pytest.mark.parametrize("path", sorted(OF_RELEASES.glob("*/*.json")), ids=lambda path: path.stem)
def test_configs_of_earlier_releases_are_read(path):
    """4f6f645 wrote the fields of all networks, optimizers and schedules into every config.json.

    Fields that are newer have their defaults.
    """
    stored = json.loads(path.read_text())
    for name, value in flatten(from_json(path.read_text())).items():
        then = reduce(lambda node, key: node.get(key, {}), name.split("."), stored)
        then = FIELDS[name].default if then == {} else then
        assert json.dumps(value) == json.dumps(then), name  # JSON has lists for tuples


def test_which_configs_of_earlier_releases_are_read():
    xception = from_json((OF_RELEASES / "4f6f645" / "xception.json").read_text())
    inception = from_json((OF_RELEASES / "4f6f645" / "inception_v3.json").read_text())
    assert type(xception.model) is XceptionConfig
    assert (xception.optimizer.name, xception.schedule.name, xception.loss.name) == ("sgd", "cosine", "softmax")
    assert xception.optimizer.multipliers == (("^head/", 10.0), ("_bn/", 0.5))
    assert type(inception.model) is InceptionV3Config
    assert (inception.optimizer.name, inception.schedule.name, inception.loss.name) == (
        "rmsprop",
        "staircase",
        "sigmoid",
    )
    assert inception.model.batch_norm.scale is False
    for config in (xception, inception):
        default = ExperimentConfig(
            model=NETWORKS[config.model.name],
            optimizer=OPTIMIZERS[config.optimizer.name],
            schedule=SCHEDULES[config.schedule.name],
        )
        differing = [name for name, value in flatten(config).items() if value != flatten(default)[name]]
        assert len(differing) >= 20  # a field that is not read would be at its default


def test_json_is_read_as_data():
    """No tag, class or reference in it is looked up; text that looks like code stays text."""
    config = to_dict(DEFAULTS)
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
    before = copy.deepcopy(config)
    resolved = resolve(config)
    assert config == before
    assert resolve(ConfigDict(config)) == resolved
    assert resolve(resolved) is resolved
    assert resolve_model(resolved.model) is resolved.model
    assert resolved.model.segments == 4
    assert resolved.data.crop_area == (0.1, 1.0)


def test_fields_that_are_left_out_have_their_defaults():
    for config in ({"model": {"segments": 2}}, ConfigDict({"model": {"segments": 2}})):
        assert resolve(config) == resolve(changed(model__segments=2))
    for model in ({}, ConfigDict({})):
        assert resolve_model(model) == DEFAULTS.model


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: SGDConfig(momentum=2), "optimizer.momentum"),
        (lambda: AdamConfig(b1="much"), "optimizer.b1"),
        (lambda: AdamConfig(b2=1.0), "optimizer.b2"),  # the bias correction would divide by zero
        (lambda: LionConfig(decayed="("), "optimizer.decayed"),
        (lambda: StaircaseConfig(decay_every="soon"), "schedule.decay_every"),
        (lambda: BatchNormConfig(statistics="local"), "model.batch_norm.statistics"),
        (lambda: InceptionV3Config(dropout_rate=1.0), "model.dropout_rate"),
        (lambda: XceptionConfig(kernel_size=4), "model.kernel_size"),
        (lambda: XceptionConfig(segments=4, group_width=8), "model"),
        (lambda: XceptionConfig(fc_width=8), "model.fc_width"),
        (lambda: XceptionConfig(module="inception", segments=2), "model.segments"),
        (lambda: XceptionConfig().replace(kernel_size=6), "model.kernel_size"),
        (lambda: DataConfig(crop_area=(0.6, 0.5)), "data.crop_area"),
        (lambda: MeshConfig(data=0), "mesh.data"),
        (lambda: ExperimentConfig(batch_size=10, accumulation_steps=4), "batch_size"),
        (
            lambda: ExperimentConfig(batch_size=64, model=XceptionConfig(batch_norm=BatchNormConfig(statistics=48))),
            "model.batch_norm.statistics",
        ),
    ],
)
def test_sections_check_themselves(build, where):
    with pytest.raises(ConfigError) as error:
        build()
    assert error.value.where == f"config.{where}"
    assert len(str(error.value).split("\n")) == 3


def test_sections_hold_canonical_values_and_are_constants():
    """Networks are built from them, and JAX caches compiled programs by what they hold."""
    assert BatchNormConfig(statistics="32").statistics == 32
    assert type(SGDConfig(momentum=1).momentum) is float
    first = DataConfig(crop_area=[0.25, 1])
    assert first.crop_area == (0.25, 1.0)
    assert hash(first) == hash(DataConfig(crop_area=(0.25, 1.0)))
    assert hash(SGDConfig(multipliers=[["^head/", 2]])) == hash(SGDConfig(multipliers=(("^head/", 2.0),)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.crop_area = (0.5, 1.0)


@pytest.mark.parametrize("section", VARIANTS)
def test_an_unknown_variant(section):
    error = refused(changed(**{f"{section}__name": "nonsense"}))
    assert error.where == f"config.{section}.name"
    for variant in VARIANTS[section]:
        assert repr(variant) in error.fix


# For each field that only some networks, optimizers or schedules have: a value that is no variant's default.
OF_OTHERS = {
    "model.middle_blocks": 3,
    "model.module": "inception",
    "model.segments": 4,
    "model.group_width": 8,
    "model.order": "pointwise_first",
    "model.intermediate_activation": "relu",
    "model.depth_multiplier": 2,
    "model.residual": False,
    "model.kernel_size": 5,
    "model.stem": "small",
    "model.stem_width": 16,
    "model.head_width": 96,
    "model.strides": (1, 2, 2, 1),
    "model.initialization": "variance_preserving",
    "model.intermediate_slope": 0.5,
    "model.intermediate_batch_norm": True,
    "model.aux_head": True,
    "optimizer.momentum": 0.8,
    "optimizer.nesterov": True,
    "optimizer.rmsprop_decay": 0.8,
    "optimizer.rmsprop_epsilon": 0.1,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.95,
    "optimizer.epsilon": 1e-3,
    "schedule.decay_rate": 0.5,
    "schedule.decay_every": "1 epoch",
}


# What must be set for a field to have an effect.
NEEDED = {"model.intermediate_slope": {"model__intermediate_activation": "leaky_relu"}}


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.owners])
def test_a_field_of_another_variant_is_refused(name):
    section, value, owners = name.partition(".")[0], OF_OTHERS[name], FIELDS[name].owners
    others = set(VARIANTS[section]) - set(owners)
    assert others
    for variant in others:
        error = refused(changed(**{f"{section}__name": variant, double(name): value}))
        assert error.where == f"config.{name}"
        assert error.what == f"config.{name}={value!r} has no effect: {variant} has no such field"
        assert error.fix.endswith(f"it is a field of {', '.join(owners)}")
        # At the default it is no mistake: files that start from `default_config` hold it.
        resolve(changed(**{f"{section}__name": variant, double(name): FIELDS[name].default}))
    for owner in owners:
        beside = NEEDED.get(name, {})
        assert get(resolve(changed(**owned(name, owner), **beside, **{double(name): value})), name) == value


def test_another_variant_has_its_own_defaults():
    """Fields at the default of the old variant take that of the new one; changed ones are kept."""

    def scale(network: str, base: ExperimentConfig = DEFAULTS) -> bool:
        return override(base, {"model.name": network}).model.batch_norm.scale

    inception = override(DEFAULTS, {"model.name": "inception_v3", "model.num_classes": 7})
    assert (scale("xception"), scale("inception_v3"), scale("inception_v3_2016")) == (True, False, True)
    assert (scale("xception", inception), scale("inception_v3_2016", inception)) == (True, True)
    assert override(inception, {"model.name": "xception"}).model == XceptionConfig(num_classes=7)
    unscaled = override(DEFAULTS, {"model.batch_norm.scale": False, "model.batch_norm.momentum": 0.9})
    assert scale("inception_v3_2016", unscaled) is False
    assert override(unscaled, {"model.name": "inception_v3"}).model.batch_norm == BatchNormConfig(0.9, scale=False)

    adam = override(DEFAULTS, {"optimizer.name": "adam", "optimizer.b1": 0.8})
    assert adam.optimizer == AdamConfig(b1=0.8, b2=0.999)
    assert override(adam, {"optimizer.name": "lion"}).optimizer == LionConfig(b1=0.8, b2=0.99)
    assert override(adam, {"optimizer.name": "lamb"}).optimizer == LAMBConfig(b1=0.8, b2=0.999, epsilon=1e-6)
    changed_b2 = override(adam, {"optimizer.b2": 0.95})
    assert override(changed_b2, {"optimizer.name": "lion"}).optimizer.b2 == 0.95
    assert override(adam, {"optimizer.name": "lion", "optimizer.b2": 0.999}).optimizer.b2 == 0.999

    momentum = override(DEFAULTS, {"optimizer.momentum": 0.8, "schedule.learning_rate": 0.1})
    assert override(momentum, {"optimizer.name": "rmsprop"}).optimizer.momentum == 0.8
    assert override(momentum, {"schedule.name": "cosine"}).schedule.learning_rate == 0.1
    with pytest.raises(ConfigError, match="adam has no such field") as error:
        override(momentum, {"optimizer.name": "adam"})
    assert error.value.where == "config.optimizer.momentum"


def test_an_override_changes_what_it_names():
    base = override(DEFAULTS, {"model.segments": 4, "data.crop_area": (0.25, 1)})
    config = override(base, {"model.segments": 7, "seed": 3})
    assert {name for name, value in flatten(config).items() if value != flatten(base)[name]} == {
        "model.segments",
        "seed",
    }
    assert (config.model.segments, config.seed, base.model.segments, base.seed) == (7, 3, 4, 0)
    assert override(base, {}) == base
    with pytest.raises(ConfigError, match=r"no field config\.model\.segmens"):
        override(base, {"model.segmens": 4})
    with pytest.raises(ConfigError, match="'sgdd'"):
        override(base, {"optimizer.name": "sgdd"})


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


@pytest.mark.parametrize("name", ["evaluation.every", "checkpoint.every", "log_every", "schedule.decay_every"])
@pytest.mark.parametrize("value", ["0 steps", "0.0 epochs"])
def test_nothing_happens_every_zero_steps(name, value):
    with pytest.raises(ConfigError, match="a number and a unit, above 0"):
        resolve({name: value})
    assert resolve({"schedule.warmup": value}).schedule.warmup == value


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"num_processes": 4, "process_id": 1}, "coordinator"),
        ({"process_id": 1}, "coordinator"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id"),
    ],
)
def test_processes_that_would_train_alone_are_refused(fields, where):
    with pytest.raises(ConfigError) as error:
        resolve({"distributed": fields})
    assert error.value.where == f"config.distributed.{where}"


def test_processes_that_are_told_what_they_are():
    found = resolve({"distributed": {"coordinator": "host:1"}}).distributed
    assert (found.num_processes, found.process_id) == (None, None)  # the launcher tells
    resolve({"distributed": {"num_processes": 1, "process_id": 0}})  # as in configs of earlier releases
    resolve({"distributed": {"coordinator": "host:1", "num_processes": 2, "process_id": 1}})


def test_a_network_does_not_depend_on_the_defaults_of_training():
    """The batch of the default config cannot be divided by 256 or 50."""
    for images in (256, 50):
        assert resolve_model({"batch_norm": {"statistics": images}}).batch_norm.statistics == images
    with pytest.raises(ConfigError, match=r"config.model.segmants"):
        resolve_model({"segmants": 2})
    with pytest.raises(ConfigError, match="inception_v3 has no such field"):
        resolve_model({"name": "inception_v3", "segments": 2})


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
        ({"model__stem": "module", "model__segments": 2}, "model.segments", "a divisor of 3"),
        ({"model__stem": "module", "model__group_width": 8}, "model.group_width", "a divisor of 3"),
        ({"data__turn": "free", "data__image_size": 299}, "data.image_size", "set it to an even number, such as 300"),
        ({"data__augmentation": "shift", "data__shift_pixels": 300}, "data.shift_pixels", "set it to a small part"),
        ({"data__turn_angle": 0.5}, "data.turn_angle", "leave it at 1.0"),
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


@pytest.mark.parametrize("table", [NETWORKS, OPTIMIZERS, SCHEDULES], ids=["networks", "optimizers", "schedules"])
def test_a_section_has_the_defaults_of_its_name(table):
    """Whether it is built in Python or named on the command line."""
    first = {type(section): name for name, section in reversed(table.items())}
    for kind, name in first.items():
        if kind is not ScheduleConfig:  # a base class, which needs a name
            assert kind() == table[name]


@pytest.mark.parametrize(
    "build",
    [
        lambda: resolve_model(XceptionConfig(name="inception_v3")),
        lambda: resolve_model(InceptionV3Config(name="resnet")),
        lambda: ExperimentConfig(optimizer=AdamConfig(name="lion")),
        lambda: ExperimentConfig(model=XceptionConfig(name="")),
    ],
)
def test_a_section_with_the_name_of_another_is_refused(build):
    with pytest.raises(ConfigError, match="does not belong to"):
        build()
