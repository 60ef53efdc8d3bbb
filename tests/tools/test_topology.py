from __future__ import annotations

import pytest

from xception_jax.errors import InputMissingError, UsageError
from xception_jax.tools.planning import topology
from xception_jax.tools.planning.chips import CHIPS
from xception_jax.tools.planning.topology import parse_topology, prepare_environment


@pytest.mark.parametrize(
    ("name", "chips", "links"),
    [
        ("v5e:1x1", 1, 0),
        ("v5e:2x2", 4, 2),  # no chip has a second neighbour along an axis
        ("v5e:8x16", 128, 3),
        ("v5e:16x16", 256, 4),
        ("v4:2x2x1", 4, 2),
        ("v4:4x4x4", 64, 6),
        ("v5p:4x4x8", 128, 6),
        ("h100:8", 8, 18),
    ],
)
def test_chips_and_the_links_that_each_can_use(name, chips, links):
    slice_ = parse_topology(name)
    assert slice_.size == chips
    assert slice_.bandwidth == links * slice_.chip.link_bandwidth


def test_gpus_on_several_nodes_are_as_fast_as_their_network():
    assert parse_topology("h100:16").bandwidth == CHIPS["h100"].network_bandwidth


@pytest.mark.parametrize(
    "name", ["", "v5e", "v9:4x4", "v5e:16", "v5e:4x4x4", "v5e:3x16", "v5e:32x32", "v4:3x3x3", "v4:0x0x0", "h100:0"]
)
def test_a_topology_that_does_not_exist(name):
    with pytest.raises(UsageError) as error:
        parse_topology(name)
    assert "v5e:16x16" in error.value.fix


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputMissingError, match="libtpu is not installed") as error:
        parse_topology("v5e:2x2").devices()
    assert "pip install 'jax[tpu]==" in error.value.fix


def test_no_tpu_is_looked_for():
    environment = {"JAX_PLATFORMS": "tpu", "HOME": "/"}
    prepare_environment(environment)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["TPU_SKIP_MDS_QUERY"] == environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert environment["HOME"] == "/"
