"""The isometry study: its arms, its claims on simulated accuracies, its gates on real images, and its smoke size."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import write_images
from tests.data.small_imagenet import jpeg, photograph
from tests.study.simulated import small_study
from xception_jax.config import override
from xception_jax.data.turn import Turn
from xception_jax.errors import BadDataError, ConfigError
from xception_jax.logs.metrics_log import MetricsLog
from xception_jax.study.cells import RECORD
from xception_jax.study.checks import check_study
from xception_jax.study.collect import collect
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Arm
from xception_jax.study.gates import GATES, Gate, check_gates
from xception_jax.study.report import format_results, write_study_report
from xception_jax.study.store import STUDY, StoredStudy, changes, read_study
from xception_jax.study.study_file import load_study, study_from_json, study_to_json
from xception_jax.study.turns import FILE, TurnedShare, lacks_turns, measure_turns, read_turns, turned_data, write_turns

FILE_OF_STUDY = str(Path(__file__).parents[2] / "configs/studies/isometry.py")
EFFECTS = {"free": -0.03, "kronecker": -0.005}  # of a turn on depthwise - regular, at t = 1


@pytest.fixture(scope="module")
def study():
    return load_study(f"{FILE_OF_STUDY}:cifar")


def good_shares(study):
    return [
        TurnedShare("none" if angle == 0 else kind, angle, seed, 0.99 - (0.5 * angle if kind == "free" else 0), 0.9)
        for seed in study.seeds
        for kind in EFFECTS
        for angle in (0.0, 0.25, 0.5, 1.0)
    ]


def write_cells(root, study, *, shrinks=0.5, shares=None, effects=EFFECTS):
    """Writes a finished study: turns cost depthwise arms in proportion to their angle, and deep ones less."""
    rng = np.random.default_rng(0)
    cost = ArmCost(0.15, 89_000, 89_000, 5_600_000, 5_500_000, 1.0)
    stored = StoredStudy(root, study, {arm.name: cost for arm in study.arms}, ())
    root.mkdir(exist_ok=True)
    data = {"study": study_to_json(study), "costs": {name: dataclasses.asdict(c) for name, c in stored.costs.items()}}
    (root / STUDY).write_text(json.dumps(data | {"history": []}))
    write_turns(root, good_shares(study) if shares is None else shares)
    for cell in stored.cells():
        data = cell.config.data
        effect = effects[data.turn] * data.turn_angle * (not cell.arm.startswith("regular")) - 0.05 * data.turn_angle
        accuracy = 0.92 + effect * (shrinks if "deep" in cell.arm else 1.0) + rng.normal(0, 0.001)
        cell.prepare()
        log = MetricsLog(cell.directory / "metrics.jsonl")
        log.write(10, "train", {"top1": accuracy, "images_per_second": 300.0, "seconds": 1.0})
        log.write(10, "dev", {"ema_top1": accuracy, "seconds": 1.0})
        log.write(10, "test", {"ema_top1": accuracy, "seconds": 1.0})
        log.close()
        cell.write_record(exit_code=0, seconds=1.0)
    return stored


def untuned(study):
    return dataclasses.replace(study, search=None, seeds=study.seeds[:4])


@pytest.fixture(scope="module")
def written(study, tmp_path_factory):
    """A finished study that its gates and all claims pass."""
    return write_cells(tmp_path_factory.mktemp("study"), untuned(study), shrinks=0.3)


def test_arms_differ_in_module_turn_and_depth_only(study):
    assert (len(study.arms), len(load_study(FILE_OF_STUDY).arms)) == (32, 8)
    base = study.arm_config(study.arm("depthwise_none"))
    for arm in study.arms:
        config = study.arm_config(arm)
        assert config.model.stem == "module"
        same = {"model.module": "separable", "model.order": "depthwise_first", "model.middle_blocks": 0}
        same |= {"model.depth_multiplier": 1}
        assert override(config, same | {"data.turn": "kronecker", "data.turn_angle": 0.0}) == base
    free = study.arm_config(study.arm("regular_free_25")).data
    assert (free.turn, free.turn_angle) == ("free", 0.25)
    assert Turn.of(base.data) is None


def test_arms_of_one_module_and_depth_have_one_rate(study):
    groups = {}
    for arm in study.arms:
        module = arm.name.split("_")[0] + " deep" * ("deep" in arm.name)
        groups.setdefault(module, set()).add(arm.tuned_as)
    assert {module: len(tuned_as) for module, tuned_as in groups.items()} == dict.fromkeys(groups, 1)
    assert len(groups) == 6
    for ((kronecker, free),) in groups.values():  # both kinds of turns decide, by the same angle
        assert kronecker.replace("kronecker", "free") == free != kronecker


def test_all_arms_of_a_seed_share_a_direction(study, tmp_path):
    cost = ArmCost(0.15, 1, 1, 1, 1, 1.0)
    stored = StoredStudy(tmp_path, study, {arm.name: cost for arm in study.arms}, ())
    for cell in stored.search():
        assert cell.config.data.turn_seed == cell.config.seed == study.search.seed
    for cell in untuned_cells(stored):
        assert cell.config.data.turn_seed == cell.config.seed == cell.seed
    assert {seed for _, _, seed in turned_data(study)} == set(study.seeds)
    assert len(turned_data(study)) == 7 * len(study.seeds)


def untuned_cells(stored):
    return dataclasses.replace(stored, study=untuned(stored.study)).cells()


def test_the_slope_is_that_of_least_squares_through_an_effect_of_zero(study):
    (slope,) = next(claim.parts for claim in study.claims if claim.code == "H10")
    terms = slope.terms
    effects = {"25": -0.3, "50": 0.2, "100": -0.9}
    found = sum(weight * effects[arm.rpartition("_")[2]] for arm, _, weight in terms if "free" in arm)
    assert found == pytest.approx(np.polyfit([0, 0.25, 0.5, 1], [0, *effects.values()], 1)[0])
    assert all(arm.replace("depthwise", "regular") == baseline for arm, baseline, _ in terms)


def test_the_report_shows_gates_and_supported_claims(written):
    results = write_study_report(written.root)
    assert [tested.verdict for tested in results.claims] == ["supported"] * 5
    effect = results.claims[0].parts[0]
    assert effect.estimate.mean == pytest.approx(EFFECTS["free"] - EFFECTS["kronecker"], abs=0.004)
    assert "nothing is interpreted" not in format_results(results)
    for name in ("report.md", "report.html"):
        text = (written.root / name).read_text()
        assert "largest change of the separable share by a Kronecker turn" in text
        assert "0.4900" in text
        assert "supported" in text


@pytest.mark.parametrize(
    ("shrinks", "effects", "verdicts"),
    [
        (1.4, EFFECTS, ["supported", "contradicted", "supported", "supported", "supported"]),
        (
            0.3,
            {"free": -0.02, "kronecker": -0.02},
            ["contradicted", "undecided", "contradicted", "contradicted", "undecided"],
        ),
    ],
)
def test_claims_follow_the_difference_of_differences(study, tmp_path, shrinks, effects, verdicts):
    results = collect(write_cells(tmp_path / "study", untuned(study), shrinks=shrinks, effects=effects))
    assert [tested.verdict for tested in results.claims] == verdicts


def test_no_accuracy_is_shown_before_all_cells_have_ended(study, tmp_path):
    """Whoever adds seeds, or runs a failed cell again, must not know how the claims stand."""
    study = dataclasses.replace(study, search=None, seeds=study.seeds[:2])
    written = write_cells(tmp_path / "study", study)
    last = written.cells()[-1]
    shown = write_study_report(written.root)
    record = (last.directory / RECORD).read_text()
    (last.directory / RECORD).unlink()
    hidden = write_study_report(written.root)
    assert (shown.hidden, hidden.hidden) == (False, True)
    assert {tested.verdict for tested in hidden.claims} == {"not tested"}
    assert all(row[name] is None for row in hidden.rows for name in ("test_accuracy", "dev_accuracy", "train_accuracy"))
    assert all(np.isnan(arm.accuracy.mean) and not len(arm.curve[0]) for arm in hidden.arms)
    assert "ended, because" in format_results(hidden)
    for name in ("report.md", "report.html", "cells.csv"):
        text = (written.root / name).read_text()
        assert ("once all cells have ended" in text) == (name != "cells.csv")
        assert not re.search(r"[789]\d\.\d\d? ?%", text.partition("The base config")[0])
    (last.directory / RECORD).write_text(record.replace('"exit_code": 0', '"exit_code": 1'))
    failed = write_study_report(written.root)
    assert not failed.hidden
    assert sum(row["test_accuracy"] is not None for row in failed.rows) == len(failed.rows)


@pytest.mark.parametrize("wrong", ["kronecker", "free", "missing"])
def test_no_claim_is_interpreted_if_a_gate_fails(written, wrong):
    good = good_shares(written.study)
    changed = [
        dataclasses.replace(share, raw=0.95) if (share.turn, share.angle, share.seed) == (wrong, 1.0, 2) else share
        for share in good
    ]
    write_turns(written.root, [] if wrong == "missing" else changed)
    try:
        results = collect(written)
    finally:
        write_turns(written.root, good)
    assert {tested.verdict for tested in results.claims} == {"not interpreted"}
    assert {entry.outcome for entry in results.comparisons} == {"not interpreted"}
    assert "gate not passed" in format_results(results)
    failed = [
        gate.kind for gate, checked in zip(results.stored.study.gates, results.gates, strict=True) if not checked.passed
    ]
    assert failed == (["kronecker", "free"] if wrong == "missing" else [wrong])


def test_a_flat_gate_compares_means_and_waits_for_all_cells():
    gate = Gate("flat", 0.01, ("a", "b"))
    assert check_gates([gate], {"a": 0.8, "b": 0.808, "c": 0.1}, [])[0].passed
    (failed,) = check_gates([gate], {"a": 0.8, "b": 0.82}, [])
    assert not failed.passed
    assert "a 80.00%, b 82.00%" in failed.detail
    assert not check_gates([gate], {"a": 0.8, "b": math.nan}, [])[0].passed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gates": (Gate("flat", 0.01, ("depthwise_none",)),)}, "compares 1 arms"),
        ({"gates": (Gate("flat", 0.01, ("depthwise_none", "nobody")),)}, "'nobody' that does not exist"),
        ({"gates": (Gate("luck", 0.01),)}, "'luck'"),
        ({"gates": (Gate("free", math.nan),)}, "is nan"),
        ({"seeded": ("data.name",)}, "seeded names 'data.name'"),
        ({"seeded": ("data.turns",)}, "seeded names 'data.turns'"),
        (
            {
                "arms": (Arm("depthwise_kronecker_100", {"data.turn_seed": 1}),),
                "comparisons": (),
                "claims": (),
            },
            "sets data.turn_seed",
        ),
    ],
)
def test_gates_and_seeds_that_make_no_sense_are_refused(study, change, words):
    with pytest.raises(ConfigError, match=words):
        check_study(dataclasses.replace(study, **change), "here")


def test_a_stored_study_keeps_its_gates(study):
    stored = study_from_json(json.loads(json.dumps(study_to_json(study))))
    assert changes(stored, study) == ([], [])
    assert any("gates" in line for line in changes(stored, dataclasses.replace(study, gates=()))[1])
    assert set(GATES) >= {gate.kind for gate in study.gates}


@pytest.fixture
def photographs(study, tmp_path):
    """The study with 23 photographs instead of its images."""
    write_images(tmp_path, "photographs", [jpeg(photograph(number)) for number in range(23)])
    fields = {"data.name": "photographs", "data.data_dir": str(tmp_path), "data.image_size": 48}
    fields |= {"data.train_split": "train"}
    return dataclasses.replace(study, seeds=(0, 1), config=override(study.config, fields))


def test_turns_are_measured_on_the_images_that_networks_see(photographs, tmp_path):
    shares = measure_turns(photographs)
    write_turns(tmp_path, shares)
    assert read_turns(tmp_path) == shares
    assert not lacks_turns(photographs, shares)
    assert lacks_turns(dataclasses.replace(photographs, seeds=(0, 1, 2)), shares)
    assert lacks_turns(photographs, [dataclasses.replace(share, angle=0.1) for share in shares])
    assert not lacks_turns(small_study(), [])
    plain = {share.seed: share for share in shares if share.angle == 0}
    assert set(plain) == {0, 1}
    for share in shares:
        if share.turn == "kronecker":
            assert share.raw == pytest.approx(plain[share.seed].raw, abs=1e-6)
            assert share.whitened == pytest.approx(plain[share.seed].whitened, abs=1e-4)
        elif share.turn == "free":
            assert share.raw < plain[share.seed].raw - 0.05
    assert len({share.raw for share in shares if (share.turn, share.angle) == ("free", 1.0)}) == 2
    assert all(checked.passed for checked in check_gates(photographs.gates[:2], {}, shares))


def test_a_damaged_table_of_turns(tmp_path):
    assert read_turns(tmp_path) == []
    for content in (b"turn,angle\nfree,x\n", b"\xff\xfe", b"turn,angle,seed,raw,whitened\nfree,1\n"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(BadDataError, match="table of turns cannot be read"):
            read_turns(tmp_path)


@pytest.mark.slow
def test_the_smoke_size_runs_to_its_end(tmp_path, run_python):
    command = ("-m", "xception_jax", "study", "run", "studies/isometry:smoke", "--workdir", tmp_path / "study")
    process = run_python(*command)
    assert process.returncode == 0, process.stderr
    results = collect(read_study(tmp_path / "study"))
    assert {row["exit_code"] for row in results.rows} == {0}
    assert [checked.passed for checked in results.gates][:2] == [True, True]
    assert (tmp_path / "study" / FILE).exists()
