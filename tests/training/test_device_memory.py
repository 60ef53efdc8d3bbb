"""Running out of device memory: only in the training step does the error name the batch size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import xception_jax
from tests.training.test_changed_fields import config_of
from xception_jax.errors import DeviceMemoryError
from xception_jax.process import as_user_error
from xception_jax.training import loop
from xception_jax.training.experiment import Experiment


def allocate(*_):
    return jnp.zeros(2**50, jnp.uint8)


class StepThatDoesNotFit:
    __call__ = staticmethod(allocate)

    def as_text(self):
        return ""


def test_a_step_that_does_not_fit_is_named(tmp_path, shared_environment, monkeypatch):
    monkeypatch.setattr(Experiment, "compile_step", lambda self: StepThatDoesNotFit())
    with pytest.raises(DeviceMemoryError, match="the training step does not fit") as error:
        xception_jax.train(config_of(shared_environment, duration="2 steps"), tmp_path)
    assert "batch_size=8" in error.value.where


def test_what_follows_the_steps_is_not_blamed_on_them(tmp_path, shared_environment, monkeypatch):
    monkeypatch.setattr(loop, "state_fingerprint", allocate)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory allocating") as error:
        xception_jax.train(config_of(shared_environment, duration="2 steps"), tmp_path)
    assert as_user_error(error.value).what == "there is not enough memory on a device"
