import jax
import pytest

from xception_jax.errors import ConfigError
from xception_jax.processes import check_processes


def test_processes_that_are_not_connected_are_refused(monkeypatch):
    """As on the hosts of a TPU slice, where JAX counts all of them although nothing has connected them."""
    check_processes()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError) as error:
        check_processes()
    assert "0 of 4" in error.value.what
    assert "coordinator" in error.value.fix
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    check_processes()
