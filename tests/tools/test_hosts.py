"""The hosts of a slice, the commands that start a run on them, and the warnings of a plan."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.conftest import ROOT
from xception_jax.config import default_config, override, resolve
from xception_jax.tools.planning.around import FirstStep, first_step, state_bytes, warnings
from xception_jax.tools.planning.chips import CHIPS
from xception_jax.tools.planning.hosts import hosts_of, launch_commands
from xception_jax.tools.planning.topology import parse_topology

DEFAULTS = resolve(default_config())
TOPOLOGIES = ["v4:4x4x4", "v5e:1x1", "v5e:2x4", "v5e:16x16", "v5p:2x2x1", "v6e:8x8", "a100:1", "a100:4", "h100:24"]
FIELDS = ["--config.batch_size=512", "--config.name=two words"]


@pytest.mark.parametrize(
    ("name", "count", "chips", "cores"),
    [
        ("v5e:1x1", 1, 1, 12),
        ("v5e:2x4", 1, 8, 112),
        ("v5e:4x4", 4, 4, 4 * 56),
        ("v4:2x2x1", 1, 4, 120),
        ("v5p:4x4x8", 32, 4, 32 * 104),
        ("h100:2", 1, 2, 26),
        ("h100:24", 3, 8, 3 * 104),
        ("a100:12", 2, 6, 2 * 36),
        ("a100:11", 11, 1, 11 * 6),
    ],
)
def test_hosts(name, count, chips, cores):
    hosts = hosts_of(parse_topology(name))
    assert (hosts.count, hosts.chips, hosts.cores) == (count, chips, cores)


def test_every_chip_has_hosts():
    assert {name.partition(":")[0] for name in TOPOLOGIES} == set(CHIPS)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_command_names_a_file_and_variables_that_it_reads(name):
    commands = launch_commands(parse_topology(name), "my config", FIELDS)
    for command in commands:
        (file,) = re.findall(r"launch/[\w.]+", command)
        text = (ROOT / file).read_text()
        given = re.findall(r"(?:^| |--env=|'| )([A-Z_]+)=", command)
        assert all(f"${{{variable}:" in text or re.search(rf"^  {variable}:", text, re.M) for variable in given)
        assert "two words" in command
        assert "'my config'" in command
    words = shlex.split(commands[0])
    assert words[-2:] == FIELDS


def test_the_accelerator_types_count_cores_or_chips():
    types = {name: launch_commands(parse_topology(name), "c", [])[0] for name in ("v4:4x4x4", "v5p:4x4x4", "v5e:8x8")}
    assert "TYPE=v4-128 " in types["v4:4x4x4"]
    assert "TYPE=v5p-128 " in types["v5p:4x4x4"]
    assert "TYPE=v5litepod-64 " in types["v5e:8x8"]


def warn(name, *, memory=0.0, compiled=True, speed=0.0, stop=1.0, **fields):
    topology = parse_topology(name)
    config = override(DEFAULTS, {key.replace("__", "."): value for key, value in fields.items()})
    return warnings(
        config,
        topology,
        hosts_of(topology),
        memory=memory * topology.chip.hbm_bytes,
        memory_is_compiled=compiled,
        images_per_second=speed,
        stop_seconds=stop,
    )


@pytest.mark.parametrize(
    ("warned", "begins"),
    [
        (warn("v5e:2x2", batch_size=4 * 16), []),
        (warn("v5e:2x2", batch_size=4 * 4), ["4 images per chip and microbatch"]),
        (warn("v5e:2x2", batch_size=4 * 16, accumulation_steps=4), ["4 images per chip and microbatch"]),
        (warn("h100:8", batch_size=8 * 4), []),
        (warn("h100:8", batch_size=8 * 4, model__batch_norm__statistics="device"), ["BatchNorm statistics of only 4"]),
        (warn("v5e:2x2", memory=0.96), ["The memory is 96 % full"]),
        (warn("h100:8", memory=0.96, compiled=False), []),
        (warn("h100:8", memory=1.5, compiled=False), ["A step may not fit"]),
        (warn("h100:8", speed=104 * 510 + 1), ["Input needs at least 104 cores"]),
        (warn("h100:8", speed=17 * 510, data__threads=16), ["Input needs at least 17 decoding threads"]),
        (warn("h100:8", stop=16), ["A step and a checkpoint take up to 16 s"]),
    ],
)
def test_warnings(warned, begins):
    assert len(warned) == len(begins)
    for text, begin in zip(warned, begins, strict=True):
        assert text.startswith(begin)


def test_less_distortion_is_advice_only_where_colors_are_distorted():
    (text,) = warn("h100:8", speed=1e6)
    assert text.endswith("--config.data.color_distortion=false halves the need.")
    for fields in ({"data__augmentation": "shift"}, {"data__augmentation": "none"}, {"data__color_distortion": False}):
        (text,) = warn("h100:8", speed=1e6, **fields)
        assert text.endswith("the chips will wait.")


def test_the_first_step_of_a_compiled_plan():
    assert first_step(200) == FirstStep(238, 38)
    assert first_step(None) == FirstStep(116, 38)


def test_a_state_without_polyak_average_is_smaller():
    small = {"model.width_multiplier": 0.05, "model.middle_blocks": 0}
    both, without = (
        state_bytes(override(DEFAULTS, small | {"ema.decay": decay}), 1000) for decay in (DEFAULTS.ema.decay, 0.0)
    )
    assert DEFAULTS.ema.decay > 0
    assert 1.4 < both / without < 1.6
