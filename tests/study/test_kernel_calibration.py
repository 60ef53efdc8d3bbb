"""The separability of kernels beside the truth: networks of dial studies, written without training."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from tests.study.simulated_dial import simulate
from xception_jax.cli import main
from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.study.dial.banks import make_bank
from xception_jax.study.dial.design import COUNTED, DialCell
from xception_jax.study.dial.records import BANKS, CELLS, network_path, read_dial, save_network
from xception_jax.study.kernels.calibration import calibrate, write_calibration_figures
from xception_jax.study.kernels.claims import judge_calibration

FILTERS = 12


def faithful(bank, rng):
    """Filters that are the templates of the bank."""
    return bank.transpose(1, 2, 3, 0)


def mixed(bank, rng):
    """Filters that are each a sum of all templates: separable across filters where the bank is, and not within."""
    return np.einsum("khwc,kf->hwcf", bank, rng.normal(size=(len(bank), FILTERS)))


def deaf(bank, rng):
    """Filters that know nothing of the bank."""
    return rng.normal(size=(3, 3, 12, FILTERS))


def write_study(root, first_layer, **options):
    """Writes a dial study with one regular arm, whose first layers are as stated and whose second ones are random."""
    simulate(root, lambda arm, bank, dial: 0.96, arms=["regular"], **options)
    study, _ = read_dial(root)
    rng = np.random.default_rng(0)
    for row in study.rows:
        for bank in row.banks:
            for seed in study.seeds:
                variables = {
                    "params/block1_spatial/kernel": first_layer(make_bank(bank, seed), rng).astype(np.float32),
                    "params/block2_spatial/kernel": deaf(None, rng).astype(np.float32),
                    "batch_stats/block1_bn/mean": np.zeros(FILTERS, np.float32),
                }
                save_network(root, DialCell(COUNTED, row.arm.name, bank, seed, 0.01), variables)
    return root


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("calibration")
    return {make.__name__: calibrate(write_study(root / make.__name__, make)) for make in (faithful, mixed, deaf)}


def test_the_measured_dial_is_the_true_one(studies):
    found = studies["faithful"]
    assert found.passed
    assert len(found.points) == 9 * 4 * 2
    for point in found.points:
        if point.layer == "block1_spatial":
            assert point.measured.within == pytest.approx(point.within, abs=1e-5)  # banks.csv has six digits
            assert point.measured.across == pytest.approx(point.across, abs=1e-5)
    for family in ("within", "across"):
        np.testing.assert_allclose(found.recoveries("regular", "block1_spatial", family), 1, atol=0.1)
        assert abs(found.recoveries("regular", "block2_spatial", family).mean()) < 0.5
    data = found.to_json()
    json.dumps(data, allow_nan=False)
    assert len(data["points"]) == 72


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("faithful", {"K1": "supported", "K2": "supported", "K3": "supported", "K4": "supported"}),
        ("mixed", {"K1": "supported"}),
        ("deaf", {"K1": "contradicted", "K2": "contradicted", "K3": "supported", "K4": "contradicted"}),
    ],
)
def test_claims(studies, kind, expected):
    verdicts = judge_calibration(studies[kind])
    assert {tested.code: tested.verdict for tested in verdicts.claims if tested.code in expected} == expected


def test_the_command_draws_and_prints(studies, monkeypatch, capsys):
    root = studies["faithful"].results.root
    monkeypatch.setattr(sys, "argv", ["xception-jax", "study", "kernels", str(root)])
    assert main() == 0
    out = capsys.readouterr().out
    assert re.search(r"block1_spatial .*\+(1\.0|0\.9)\d \[", out)
    assert "K1 supported" in out
    for family in ("within", "across"):
        svg = (root / "figures" / f"kernels_{family}.svg").read_text()
        assert f"true dial {family} filters, of the bank" in svg
        assert "regular, block2_spatial" in svg
        assert "nan" not in svg.lower()


def test_nothing_is_claimed_where_networks_are_missing(tmp_path):
    root = write_study(tmp_path, faithful, seeds=(0, 1))
    network_path(root, "regular", "free", 1).unlink()
    found = calibrate(root)
    assert not found.passed
    assert np.isnan(found.recoveries("regular", "block1_spatial", "within")[1])
    assert {tested.verdict for tested in judge_calibration(found).claims} == {"not tested"}
    assert all(path.exists() for path in write_calibration_figures(found))
    json.dumps(found.to_json() | judge_calibration(found).to_json(), allow_nan=False)


def _without_row(path, start):
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(start)]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))


def test_a_network_without_its_bank_does_not_count(tmp_path):
    root = write_study(tmp_path, faithful, seeds=(0, 1))
    _without_row(root / BANKS, "within_22,0,")
    found = calibrate(root)
    assert len(found.points) == 2 * (9 * 2 - 1)
    json.dumps(found.to_json() | judge_calibration(found).to_json(), allow_nan=False)


def test_no_kernel_is_measured_before_all_cells_are_done(tmp_path):
    root = write_study(tmp_path, faithful, seeds=(0, 1))
    _without_row(root / CELLS, "test,regular,across_45,1,")
    with pytest.raises(InputMissingError, match="17 of 18 cells of the dial study are done"):
        calibrate(root)


def test_networks_that_diverged_are_counted(tmp_path):
    root = write_study(tmp_path, faithful, seeds=(0, 1))
    study, _ = read_dial(root)
    for value, bank in zip((0.0, np.nan, np.inf), study.rows[0].banks, strict=False):
        broken = {f"params/block{n}_spatial/kernel": np.full((3, 3, 12, 12), value, np.float32) for n in (1, 2)}
        save_network(root, DialCell(COUNTED, "regular", bank, 1, 0.01), broken)
    found = calibrate(root)
    assert len(found.points) == 2 * (9 * 2 - 3)
    assert [(gate.name, gate.value) for gate in found.gates if not gate.passed] == [
        ("networks with kernels that are zero or not finite", 3)
    ]


def test_nothing_is_claimed_where_a_gate_of_the_dial_study_fails(tmp_path):
    root = write_study(tmp_path, faithful, seeds=(0, 1), bank_change=lambda row: row.update(from_means=0.9))
    assert {tested.verdict for tested in judge_calibration(calibrate(root)).claims} == {"not tested"}


@pytest.mark.parametrize(
    "variables",
    [
        {"params/block1_spatial/kernel": np.ones(12, np.float32)},
        {"params/block1_spatial/kernel": np.full((3, 3, 12, 12), "x")},
        {},
    ],
)
def test_damaged_networks(tmp_path, variables):
    root = simulate(tmp_path, lambda arm, bank, dial: 0.96, arms=["regular"], seeds=(0, 1))
    study, _ = read_dial(root)
    cell = DialCell(COUNTED, "regular", study.rows[0].banks[0], 0, 0.01)
    other = {"params/block2_spatial/kernel": np.ones((3, 3, 12, 12), np.float32)} if variables else {}
    save_network(root, cell, variables | other)
    with pytest.raises(BadDataError):
        calibrate(root)


def test_a_study_without_networks(tmp_path):
    root = simulate(tmp_path, lambda arm, bank, dial: 0.96, arms=["regular"], seeds=(0, 1))
    with pytest.raises(InputMissingError, match="no networks of regular arms"):
        calibrate(root)
