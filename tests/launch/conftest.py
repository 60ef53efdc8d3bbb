from __future__ import annotations

import shlex
import sys

import pytest


@pytest.fixture(scope="session")
def command_folder(tmp_path_factory) -> str:
    """Returns a folder for the PATH, with an `xception-jax` that runs this checkout in this interpreter."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "xception-jax").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m xception_jax "$@"\n')
    (folder / "xception-jax").chmod(0o755)
    return str(folder)
