"""Two hosts that start from weights find the same ones, or say so before they train."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from tests.conftest import ROOT
from tests.processes.conftest import ended
from tests.processes.test_training_pair import assert_told_once
from tests.tiny_run import TINY
from xception_jax.weights import load_network
from xception_jax.weights.own import save_network

# Each host sees files of its own below the same path.
ON_HOST = f"""
import os, runpy, sys
number = next(argument for argument in sys.argv if "process_id" in argument)[-1]
os.chdir(os.path.join(os.path.dirname(os.environ["GO"]), "host" + number))
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def donor(run_python, tmp_path_factory):
    """Returns the work directory of a run."""
    directory = tmp_path_factory.mktemp("donor") / "donor"
    process = run_python("train.py", *TINY, "--config.duration=20 steps", f"--workdir={directory}")
    assert process.returncode == 0, process.stderr
    return directory


@pytest.fixture
def start_from(train_pair, tmp_path):
    """Returns a function that starts two hosts in host0 and host1 with `config.init.weights`."""
    program = tmp_path / "on_host.py"
    program.write_text(ON_HOST)
    for number in (0, 1):
        (tmp_path / f"host{number}").mkdir()

    def start(weights):
        fields = ["--config=fashion_mnist", f"--config.init.weights={weights}", "--config.duration=4 steps"]
        return ended(train_pair(fields, fields, program=str(program)))

    return start


@pytest.mark.slow
def test_a_run_that_both_see(start_from, donor, tmp_path):
    for number in (0, 1):
        (tmp_path / f"host{number}" / "donor").symlink_to(donor)
    outcomes = start_from("donor")
    assert [outcome[-1] for outcome in outcomes] == [0, 0], outcomes
    assert "starts from donor" in "".join(outcomes[0][:2])


@pytest.mark.faults
def test_a_run_that_one_does_not_see(start_from, donor, tmp_path):
    (tmp_path / "host0" / "donor").symlink_to(donor)
    errors = assert_told_once(start_from("donor"), 66)
    assert "processes 0 and 1 have different initial weights: from a run is True and False" in errors


@pytest.mark.faults
def test_files_that_differ(start_from, donor, run_python, tmp_path):
    original = tmp_path / "host0" / "weights.safetensors"
    process = run_python("-m", "xception_jax", "convert", donor, original)
    assert process.returncode == 0, process.stderr
    network = load_network(str(original))
    other = jax.tree.map(lambda leaf: leaf + 1, network.variables)
    save_network(tmp_path / "host1" / "weights.safetensors", dataclasses.replace(network, variables=other))
    errors = assert_told_once(start_from("weights.safetensors"), 66)
    assert "processes 0 and 1 have different initial weights: SHA-256 is" in errors


@pytest.mark.faults
def test_a_file_that_one_lacks(start_from, donor, run_python, tmp_path):
    process = run_python("-m", "xception_jax", "convert", donor, tmp_path / "host0" / "weights.safetensors")
    assert process.returncode == 0, process.stderr
    assert "(process 1 of 2)" in assert_told_once(start_from("weights.safetensors"), 66)
