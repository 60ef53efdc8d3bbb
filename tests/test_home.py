"""Without a home directory, or with one that nobody knows, each command ends with three lines."""

from __future__ import annotations

import os
import sys

import pytest

from xception_jax import environment
from xception_jax.cli import main
from xception_jax.data.prepare import groups
from xception_jax.data.sources import resolve_data_dir
from xception_jax.errors import ConfigError, InputMissingError
from xception_jax.files import local_directory
from xception_jax.user_files import require_directory
from xception_jax.weights import sources

NOBODY = "~no_such_user/here"


def call(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as context:
        context.setattr(sys, "argv", ["xception-jax", *arguments])
        return main()


@pytest.fixture
def without_home(monkeypatch):
    """As in a container that runs as a number which is not in /etc/passwd."""
    for name in ("HOME", "XDG_CACHE_HOME", "XCEPTION_JAX_CACHE", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 123456)


@pytest.mark.parametrize("path", ["~/here", NOBODY])
@pytest.mark.parametrize(
    "use",
    [
        lambda path: local_directory(path, "--workdir"),
        lambda path: call("study", "run", "spectrum", "--workdir=unused", f"--data_dir={path}"),
        lambda path: call("prepare", "imagenet2012", "--data_dir=unused", f"--source={path}"),
        lambda path: groups.read_groups(f"{path}.csv", []),
        lambda path: resolve_data_dir(path),
        lambda path: require_directory(path),
    ],
    ids=["workdir", "data_dir", "source", "groups", "datasets", "output"],
)
def test_an_unknown_home_in_a_path_is_an_error_of_the_user(without_home, use, path):
    with pytest.raises(ConfigError, match="there is no home directory") as caught:
        use(path)
    assert path in str(caught.value)


def test_without_a_home_downloads_need_a_place(without_home, monkeypatch):
    assert environment.cache_directory() is None
    with pytest.raises(InputMissingError, match="no home directory") as caught:
        call("weights", "list")
    assert "XCEPTION_JAX_CACHE" in caught.value.fix
    monkeypatch.setenv("XCEPTION_JAX_CACHE", NOBODY)
    with pytest.raises(ConfigError, match="no home directory"):
        sources.cache_directory()
    with pytest.raises(ConfigError, match="no home directory"):
        resolve_data_dir("")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"XDG_CACHE_HOME": "/some/where"}, "/some/where/xception_jax"),
        ({"HOME": "/some/one"}, "/some/one/.cache/xception_jax"),
        ({"HOME": "/some/one", "XDG_CACHE_HOME": ""}, "/some/one/.cache/xception_jax"),
    ],
)
@pytest.mark.skipif(os.uname().sysname != "Linux", reason="the places of Linux")
def test_the_cache_is_in_the_usual_place(without_home, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(environment.cache_directory()) == expected
    assert sources.cache_directory() == environment.cache_directory()
