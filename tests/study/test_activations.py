"""What enters the activations between two convolutions, in a layer whose values are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xception_jax.errors import BadDataError
from xception_jax.models.modules import SeparableConv
from xception_jax.study.activation_files import activation_columns, read_activations
from xception_jax.study.activations import measure_activations
from xception_jax.study.cells import ACTIVATIONS


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_channel_is_dead_if_it_is_positive_nowhere(activation):
    """Channels are the pixels times 1, -1 and 2, and one is zero."""
    layer = SeparableConv(5, intermediate_activation=activation)
    kernel = np.zeros((3, 3, 1, 4), np.float32)
    kernel[1, 1, 0] = (1, -1, 2, 0)
    pointwise = np.random.default_rng(0).normal(size=(1, 1, 4, 5)).astype(np.float32)
    variables = {"params": {"spatial": {"kernel": kernel}, "pointwise": {"kernel": pointwise}}}
    images = [np.ones((4, 6, 6, 4), np.float32), np.full((2, 6, 6, 4), 3, np.float32)]
    (found,) = measure_activations(layer, variables, images)
    assert (found["map"], found["channels"], found["dead"]) == (6, 4, 0.5)
    assert found["rms"] == pytest.approx(np.sqrt((1 + 1 + 4) / 4 * (4 * 1 + 2 * 9) / 6))
    images[1][0, 5, 5] = -1  # one negative pixel brings the second channel to life
    assert measure_activations(layer, variables, images)[0]["dead"] == 0.25


def test_columns_of_a_cell_and_a_damaged_file(tmp_path):
    assert set(activation_columns(read_activations(tmp_path)).values()) == {None}
    layers = [{"layer": "a", "dead": 0.5, "rms": 1.0}, {"layer": "b", "dead": 0.0, "rms": 4.0}]
    (tmp_path / ACTIVATIONS).write_text(json.dumps({"start": layers, "end": layers[:1]}))
    columns = activation_columns(read_activations(tmp_path))
    assert columns == pytest.approx({"dead_start": 0.25, "dead_end": 0.5, "rms_start": 2.0, "rms_end": 1.0})
    for damaged in ('{"start": []}', '{"start": 3, "end": []}', '{"start": [{"dead": 2, "rms": 1}], "end": []}', "x"):
        (tmp_path / ACTIVATIONS).write_text(damaged)
        with pytest.raises(BadDataError, match="file of activations"):
            read_activations(tmp_path)
