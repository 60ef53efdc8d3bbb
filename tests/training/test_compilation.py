"""Compiled programs are kept in the directory of the config, and one that a killed process left torn is replaced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from xception_jax.errors import ConfigError, WorkdirError
from xception_jax.training.compilation import use_compilation_cache

SETTINGS = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0}


@pytest.fixture(autouse=True)
def settings():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled(directory):
    """Compiles a program, and returns the names and sizes of those that are kept."""
    jax.clear_caches()
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))
    return {path.name: path.stat().st_size for path in directory.glob("*-cache")}


def test_a_torn_program_is_replaced(tmp_path):
    directory = tmp_path / "new" / "compiled"
    use_compilation_cache(str(directory))
    kept = compiled(directory)
    assert len(kept) > 0
    for path in directory.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:-50])
    use_compilation_cache(str(directory))
    assert not list(directory.glob("*-cache"))
    assert compiled(directory).keys() == kept.keys()  # warnings are errors here
    use_compilation_cache(str(directory))
    assert compiled(directory).keys() == kept.keys()


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match=r"cannot be kept: (Not a directory|File exists)"):
        use_compilation_cache(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="nonsense"):
        use_compilation_cache("nonsense://bucket/directory")
    with pytest.raises(ConfigError, match="no home directory"):
        use_compilation_cache("~no_such_user/compiled")
    assert jax.config.jax_compilation_cache_dir is None


def test_without_the_field_jax_decides():
    use_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir is None
