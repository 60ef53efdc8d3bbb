from __future__ import annotations

import shlex
import sys

import pytest


@pytest.fixture(scope="session")
def command_folder(tmp_path_factory) -> str:
    """Returns a folder with `xception-jax`, as an installation puts it on the PATH, of this interpreter and checkout."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "xception-jax").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m xception_jax "$@"\n')
    (folder / "xception-jax").chmod(0o755)
    return str(folder)
