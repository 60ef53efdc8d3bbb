"""The mesh and the slices of TPUs, on objects that have the index of a slice."""

from __future__ import annotations

import types

import pytest

from xception_jax.errors import ConfigError
from xception_jax.parallel import check_slices


def devices(*slices: int) -> list[types.SimpleNamespace]:
    """Returns devices of slices with these sizes, in the order in which JAX lists them."""
    return [types.SimpleNamespace(slice_index=index) for index, size in enumerate(slices) for _ in range(size)]


@pytest.mark.parametrize(
    ("fsdp", "slices"), [(8, (8,)), (3, (8,)), (1, (4, 4)), (2, (4, 4)), (4, (4, 4)), (3, (6, 6, 6)), (4, (4, 8))]
)
def test_an_axis_inside_of_a_slice_is_accepted(fsdp, slices):
    check_slices(fsdp, devices(*slices))


@pytest.mark.parametrize(
    ("fsdp", "slices", "nearest"), [(8, (4, 4), 4), (16, (8, 8), 8), (3, (4, 4, 4), 2), (4, (6, 6), 3), (8, (4, 8), 4)]
)
def test_an_axis_that_spans_slices_is_refused_with_the_nearest_that_fits(fsdp, slices, nearest):
    with pytest.raises(ConfigError) as error:
        check_slices(fsdp, devices(*slices))
    assert f"there are {len(slices)} slices" in error.value.what
    assert error.value.fix == f"set it to the nearest value that fits, {nearest}"
    check_slices(nearest, devices(*slices))


def test_devices_without_slices_are_one():
    check_slices(8, [types.SimpleNamespace()] * 8)
