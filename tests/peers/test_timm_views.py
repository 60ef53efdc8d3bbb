"""What timm itself shows a network, beside what we do: `make test-peers` runs it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.test_views import GOLDEN, STRIDE, VIEWS, cases, largest_difference

PEERS = os.environ.get("PEERS")

pytestmark = pytest.mark.skipif(not PEERS, reason="needs an interpreter with timm: make test-peers")


def test_antialiased_views_and_the_golden_numbers_are_those_of_this_timm(tmp_path):
    np.savez(tmp_path / "in.npz", **cases())
    script = Path(__file__).with_name("timm_views.py")
    subprocess.run([PEERS, script, tmp_path / "out.npz", tmp_path / "in.npz", *VIEWS], check=True)
    timm = np.load(tmp_path / "out.npz")
    print("largest difference in levels of 255:", largest_difference(timm, 1))
    assert largest_difference(timm, 1) < 0.01
    if not GOLDEN.exists():  # delete it to write it anew
        np.savez_compressed(GOLDEN, **{key: timm[key][::STRIDE, ::STRIDE] for key in timm})
    assert largest_difference(np.load(GOLDEN), STRIDE) < 0.01
