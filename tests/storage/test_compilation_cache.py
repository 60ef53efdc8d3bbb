"""Compiled programs are kept in a bucket: one process compiles, the next one reads."""

from __future__ import annotations

import pytest

from tests.storage.conftest import BUCKET, run_child
from xception_jax.errors import WorkdirError
from xception_jax.training.compilation import use_compilation_cache

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from xception_jax.training.compilation import use_compilation_cache

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
use_compilation_cache(sys.argv[1])
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).sum()), len(hits))
"""


def test_a_bucket_that_does_not_exist_is_refused(gcs):
    pytest.importorskip("gcsfs")
    with pytest.raises(WorkdirError, match="no_such_bucket"):
        use_compilation_cache("gs://no_such_bucket/compiled")


@pytest.mark.slow
def test_compiled_programs_in_a_bucket(gcs):
    pytest.importorskip("gcsfs")
    directory = f"gs://{BUCKET}/compiled"
    first, second = (run_child(PROGRAM, directory, JAX_PLATFORMS="cpu") for _ in range(2))
    for child in (first, second):
        assert child.returncode == 0, child.stderr
        assert "Warning" not in child.stderr
    (value, none), (same, hits) = first.stdout.split(), second.stdout.split()
    assert value == same
    assert (int(none), int(hits) > 0) == (0, True)
