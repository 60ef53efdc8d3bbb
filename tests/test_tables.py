"""Checks that the names allowed in a config are those that the code implements."""

from __future__ import annotations

import re

import pytest

from xception_jax import models
from xception_jax.config import FIELDS
from xception_jax.data.augmentation import AUGMENTATIONS
from xception_jax.data.turn import KINDS
from xception_jax.metrics import METRICS
from xception_jax.models.layers import INITIALIZERS
from xception_jax.models.modules import ACTIVATIONS
from xception_jax.models.xception import MODULES
from xception_jax.training.losses import LOSSES
from xception_jax.training.optimizers import OPTIMIZERS, SCHEDULES

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("model.name", models.NETWORKS),
        ("model.module", MODULES),
        ("model.intermediate_activation", ACTIVATIONS),
        ("model.initialization", INITIALIZERS),
        ("data.augmentation", AUGMENTATIONS),
        ("data.turn", ("none", *KINDS)),
        ("loss.name", LOSSES),
        ("loss.name", METRICS),
        ("optimizer.name", OPTIMIZERS),
        ("schedule.name", SCHEDULES),
    ],
)
def test_a_config_can_name_what_there_is(field, table):
    assert re.findall(r"'(\w+)'", FIELDS[field].expects) == list(table)
