"""Gates, claims, predictions and the power of a study, on simulated study directories."""

import dataclasses
import io
import json
import math
import shutil

import numpy as np
import pytest
import scipy.stats

from tests.study.simulated import IMAGES, small_study, write_predictions, write_simulated
from xception_jax import cli
from xception_jax.errors import BadDataError, UsageError
from xception_jax.logs.metrics_log import MetricsLog
from xception_jax.study.cells import PREDICTIONS
from xception_jax.study.claims import Claim, Part
from xception_jax.study.collect import collect
from xception_jax.study.design import DECAYS, RATES, PlannedComparison, Search
from xception_jax.study.inference import holm
from xception_jax.study.power import plan_seeds, seeds_needed
from xception_jax.study.predictions import FILE, read_answers
from xception_jax.study.progress_table import ProgressTable
from xception_jax.study.report import format_results, write_study_report
from xception_jax.study.runner import Runner
from xception_jax.study.store import changes
from xception_jax.study.study_file import study_from_json, study_to_json
from xception_jax.study.verdicts import NOT_INTERPRETED

ARMS = ("1_none", "1_relu", "depthwise_none")


def few_arms(**fields):
    """Three arms with two comparisons."""
    study = small_study()
    arms = tuple(arm for arm in study.arms if arm.name in ARMS)
    comparisons = (PlannedComparison(*ARMS[:2]), PlannedComparison(ARMS[1], ARMS[2], "worse"))
    return small_study(**{"arms": arms, "comparisons": comparisons, "interactions": (), "seeds": (0, 1, 2)} | fields)


@pytest.mark.parametrize(
    ("gate", "below"), [(None, []), (0.5, []), (0.999, list(ARMS))], ids=["none", "passed", "failed"]
)
def test_no_comparison_is_interpreted_below_the_gate(tmp_path, gate, below):
    write_simulated(tmp_path, few_arms(gate=gate))
    results = write_study_report(tmp_path)
    assert results.below_gate == below
    outcomes = [entry.outcome for entry in results.comparisons]
    assert (outcomes == [NOT_INTERPRETED] * 2) == bool(below)
    words = "may reflect how fast they train"
    for name in ("report.html", "report.md"):
        assert (words in (tmp_path / name).read_text()) == bool(below)
    assert (words in format_results(results)) == bool(below)
    assert ("No gate on the training accuracy" in (tmp_path / "report.md").read_text()) == (gate is None)
    data = results.to_json()
    assert (data["gate"], data["below_gate"]) == (gate, below)
    assert all(0.85 < row["train_accuracy"] < 0.95 for row in data["cells"])


def test_an_arm_with_an_unknown_training_accuracy_does_not_pass(tmp_path):
    stored = write_simulated(tmp_path, few_arms(gate=0.5))
    metrics = next(cell for cell in stored.cells() if cell.arm == "1_relu").directory / "metrics.jsonl"
    entries = [line for line in metrics.read_text().splitlines() if json.loads(line)["split"] != "train"]
    metrics.write_text("\n".join(entries) + "\n")
    results = collect_results(tmp_path)
    assert results.below_gate == ["1_relu"]
    assert {entry.outcome for entry in results.comparisons if "1_relu" in entry.comparison.name} == {NOT_INTERPRETED}


def test_an_interaction_with_an_arm_below_the_gate_is_not_interpreted(tmp_path):
    write_simulated(tmp_path, small_study(gate=0.999, seeds=(0, 1)))
    assert collect_results(tmp_path).interactions[0].outcome == NOT_INTERPRETED


def collect_results(root):
    from xception_jax.study.store import read_study

    return collect(read_study(root))


def test_p_values_are_corrected_within_a_claim(tmp_path):
    pairs = [("1_relu", "1_none"), ("depthwise_none", "1_none"), ("1_relu", "depthwise_none")]
    claims = ("shape", "shape", "order")
    write_simulated(tmp_path, few_arms(comparisons=[PlannedComparison(*pair) for pair in pairs]))
    together = [entry.p_holm for entry in collect_results(tmp_path).comparisons]
    data = json.loads((tmp_path / "study.json").read_text())
    del data["sha256"]  # as written by earlier releases, and so that the change is not found by it
    for entry, claim in zip(data["study"]["comparisons"], claims, strict=True):
        entry["claim"] = claim
    (tmp_path / "study.json").write_text(json.dumps(data))
    results = collect_results(tmp_path)
    p = [entry.difference.p for entry in results.comparisons]
    assert together == holm(p)
    assert [entry.p_holm for entry in results.comparisons] == [*holm(p[:2]), p[2]]
    write_study_report(tmp_path)
    assert "| `shape` |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("analysis", ["welch", "pooled", "crossed"])
def test_the_analysis_of_the_study_decides(tmp_path, analysis):
    stored = write_simulated(tmp_path, few_arms(analysis=analysis))
    for number, cell in enumerate(stored.cells()):
        write_predictions(cell, number)
    entry = collect_results(tmp_path).comparisons[0]
    assert entry.difference.n == 3
    assert (entry.difference == entry.over_images) == (analysis == "crossed")
    assert entry.difference.df != 2  # that of pairs
    if analysis == "crossed":
        write_study_report(tmp_path)
        assert "- Analysis: t over seeds and test images, both random." in (tmp_path / "report.md").read_text()


def test_predictions_outlive_the_cells(tmp_path):
    stored = write_simulated(tmp_path, few_arms(), fail=[("1_none", 2)])
    expected = {(c.arm, c.seed): write_predictions(c, number) for number, c in enumerate(stored.cells())}
    before = write_study_report(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 9 * IMAGES + 2_000
    for cell in stored.cells():
        (cell.directory / PREDICTIONS).unlink()
    cells = [cell for cell in stored.cells() if cell.state() == "done"]
    answers = read_answers(tmp_path, cells)
    assert set(answers) == set(expected) - {("1_none", 2)}
    for key, found in answers.items():
        right, best = expected[key]
        np.testing.assert_array_equal(found.right, right)
        np.testing.assert_array_equal(found.classes, best)
        np.testing.assert_array_equal(found.index, np.arange(IMAGES))
    again = collect_results(tmp_path)
    assert [e.over_images for e in again.comparisons] == [e.over_images for e in before.comparisons]


def test_predictions_are_kept_if_a_cell_is_away_for_a_moment(tmp_path):
    stored = write_simulated(tmp_path, few_arms())
    for number, cell in enumerate(stored.cells()):
        write_predictions(cell, number)
    write_study_report(tmp_path)
    before = read_answers(tmp_path, stored.cells())
    cell = stored.cells()[2]
    for other in stored.cells():
        (other.directory / PREDICTIONS).unlink()
    cell.directory.rename(tmp_path / "away")
    write_study_report(tmp_path)
    (tmp_path / "away").rename(cell.directory)
    again = read_answers(tmp_path, stored.cells())
    assert list(again) == list(before)
    np.testing.assert_array_equal(again[cell.arm, cell.seed].right, before[cell.arm, cell.seed].right)


def test_predictions_of_other_images_are_refused_and_none_are_lost(tmp_path):
    cells = write_simulated(tmp_path, few_arms()).cells()
    for number, cell in enumerate(cells):
        write_predictions(cell, number)
    write_study_report(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    write_predictions(cells[0], 0, images=IMAGES + 1)
    with pytest.raises(BadDataError, match="are of other images than those of"):
        write_study_report(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_damaged_file_of_predictions(tmp_path):
    stored = write_simulated(tmp_path, few_arms())
    write_predictions(stored.cells()[0], 0)
    write_study_report(tmp_path)
    (stored.cells()[0].directory / PREDICTIONS).unlink()
    content = (tmp_path / FILE).read_bytes()
    for damaged in (content[:50], b"", content[:-100]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(BadDataError, match="file of predictions"):
            collect_results(tmp_path)


def test_reused_cells_bring_their_predictions(tmp_path):
    old = write_simulated(tmp_path / "old", few_arms())
    source = old.cells()[0]
    write_predictions(source, 0)
    new = write_simulated(tmp_path / "new", few_arms()).cells()[0]
    shutil.rmtree(new.directory)
    new.take_over(source)
    assert (new.directory / PREDICTIONS).read_bytes() == (source.directory / PREDICTIONS).read_bytes()


def test_every_arm_is_tuned_with_the_same_budget_by_default():
    study = few_arms(search=Search())
    rates = [trial["schedule.learning_rate"] for trial in study.trials]
    decays = {trial["optimizer.weight_decay"] for trial in study.trials}
    assert len(study.trials) == len(RATES) * len(DECAYS)
    assert sorted(set(rates)) == [0.0125, 0.025, 0.05, 0.1, 0.2]
    assert decays == {1e-4, 5e-4}
    again = study_from_json(json.loads(json.dumps(study_to_json(study))))
    assert again.trials == study.trials
    assert changes(study, again) == ([], [])
    fields = {"config": study.config, "arms": study.arms, "seeds": (0,), "margin": 0.1, "reference": "1_none"}
    assert type(study)("n", "q?", "h", **fields).search == Search()


def test_progress_counts_all_phases(tmp_path):
    stored = write_simulated(tmp_path, few_arms(search=Search()))
    search, cells = stored.search(), stored.cells()
    for cell in search[:4]:
        cell.prepare()
        cell.write_record(exit_code=0, seconds=1.0)
    runner = Runner([], [], {}, lambda runner: None)

    def headline(phase, later, before=()):
        table = ProgressTable(stored.study, stored.costs, phase, {}, 1, later, io.StringIO(), before)
        return table.headline(runner)

    total = len(search) + len(cells)
    assert headline(search, len(cells)).startswith(f"simulated: 4 of {total} cells done (search: 4 of {len(search)})")
    after = f"simulated: {4 + len(cells)} of {total} cells done (after the search: {len(cells)} of {len(cells)})"
    assert headline(cells, 0, search).startswith(after)
    assert "(" not in headline(cells, 0)


def test_an_arm_that_fails_at_every_rate_does_not_hide_the_others(tmp_path):
    claim = Claim("X", "It is so.", (Part("part", ((*ARMS[1::-1], 1),), "above", -1),))
    trials = tuple({"schedule.learning_rate": rate} for rate in (0.1, 0.2))
    stored = write_simulated(tmp_path, few_arms(search=Search(trials), claims=(claim,)))
    shutil.rmtree(tmp_path / "cells" / ARMS[2])
    for cell in stored.search():
        cell.prepare()
        MetricsLog(cell.directory / "metrics.jsonl").write(9, "dev", {"ema_top1": 0.9})
        cell.write_record(exit_code=70 if cell.arm == ARMS[2] else 0, seconds=1.0)
    results = collect(stored)
    assert not results.hidden
    assert [claim.verdict for claim in results.claims] == ["supported"]
    cell.write_record(exit_code=-9)  # of the arm that has failed: its trials go on, and it may get cells
    assert collect(stored).hidden


def test_power_plans_the_seeds_of_the_next_study(tmp_path, capsys):
    stored = write_simulated(tmp_path, few_arms(seeds=tuple(range(8))), noise=0.004)
    for cell in stored.cells():
        write_predictions(cell, ARMS.index(cell.arm))  # arms fail on other images, whatever the seed
    write_study_report(tmp_path)

    def plan(*arguments):
        args = cli.parse(["study", "power", *map(str, arguments), "--json"])
        capsys.readouterr()
        assert cli.import_module("xception_jax.cli.study").run(args) == 0
        return json.loads(capsys.readouterr().out)

    found, of_csv = plan(tmp_path), plan(tmp_path / "cells.csv", "--margin", 0.005)
    # Noise of a cell and of its seed, which pairs remove.
    assert found["sd"] == pytest.approx((0.004**2 + 0.004**2) ** 0.5, rel=0.5)
    assert found["pairing"] < 0.9
    assert (found["df"], set(found["arms"])) == (21, set(ARMS))
    assert (of_csv["sd"], of_csv["images"]) == (pytest.approx(found["sd"]), None)
    rows = {(row["margin"], row["analysis"]): row for row in found["rows"]}
    assert set(rows) == {(m, a) for m in (0.0025, 0.005, 0.01) for a in ("paired", "welch", "crossed")}
    assert rows[0.005, "paired"]["equivalence"] < rows[0.0025, "paired"]["equivalence"]
    for row in rows.values():
        assert (
            row["equivalence"] is None or row["equivalence_at_most"] is None or row["equivalence"] >= row["difference"]
        )
    upper = found["sd"] * math.sqrt(found["df"] / scipy.stats.chi2.ppf(0.1, found["df"]))
    assert found["sd_at_most"] == pytest.approx(upper)
    equivalence, difference = seeds_needed(math.sqrt(found["pairing"]) * found["sd"], 0.0025, paired=True)
    assert (rows[0.0025, "paired"]["equivalence"], rows[0.0025, "paired"]["difference"]) == (equivalence, difference)
    assert rows[0.005, "crossed"]["equivalence"] is None  # 400 images cannot tell half a point
    args = cli.parse(["study", "power", str(tmp_path)])
    assert cli.import_module("xception_jax.cli.study").run(args) == 0
    text = capsys.readouterr().out
    assert "never (never)" in text
    assert "degrees of freedom" in text


@pytest.mark.parametrize("margin", ["half", "0", "1.5", "nan", "-0.1"])
def test_a_margin_that_is_no_share_is_refused(margin):
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        cli.parse(["study", "power", "somewhere", f"--margin={margin}"])


def test_power_of_a_study_with_claims_only_knows_its_pairs(tmp_path):
    study = few_arms(seeds=tuple(range(4)))
    (pair, *_) = study.comparisons
    claim = Claim("C1", "It helps.", (Part("difference", ((pair.arm, pair.baseline, 1.0),), "above", 0.0),))
    stored = write_simulated(tmp_path, dataclasses.replace(study, comparisons=(), claims=(claim,)))
    for number, cell in enumerate(stored.cells()):
        write_predictions(cell, number)
    assert {row.analysis for row in plan_seeds(tmp_path).rows} == {"paired", "welch", "crossed"}


def test_pairs_that_leave_no_variance_need_the_fewest_seeds(tmp_path):
    rows = [
        f"{arm},{seed},0,{0.8 + 0.01 * seed + shift}" for arm, shift in (("a", 0), ("b", 0.02)) for seed in range(4)
    ]
    (tmp_path / "cells.csv").write_text("\n".join(["arm,seed,exit_code,test_accuracy", *rows]))
    plan = plan_seeds(tmp_path / "cells.csv", 0.005)
    assert plan.pairing == pytest.approx(0, abs=1e-9)
    assert {row.equivalence for row in plan.rows if row.analysis == "paired"} == {2}


def test_power_without_two_cells_of_an_arm(tmp_path, run_cli_error):
    write_simulated(tmp_path, few_arms(seeds=(0,)))
    error = run_cli_error("study", "power", str(tmp_path))
    assert "no arm has two finished cells" in error
    (tmp_path / "cells.csv").write_text("arm,seed\nx,1\n")
    assert "table of cells cannot be read" in run_cli_error("study", "power", f"{tmp_path}/cells.csv")
    for row, words in (("x,1,0,0.6", "x seed 1 has two rows"), ("x,2,0,60", "x seed 2 has an accuracy of 60")):
        (tmp_path / "cells.csv").write_text(f"arm,seed,exit_code,test_accuracy\nx,1,0,0.5\n{row}\n")
        assert words in run_cli_error("study", "power", f"{tmp_path}/cells.csv")
    (tmp_path / "cells.csv").write_text("arm,seed,exit_code,test_accuracy\nx,1,0,0.5\nx,2,0,0.6\n")
    assert "add the smallest difference" in run_cli_error("study", "power", f"{tmp_path}/cells.csv")
    assert "there is no such file" in run_cli_error("study", "power", f"{tmp_path}/nothing")


@pytest.fixture
def run_cli_error():
    """Returns a function that runs a command, and returns the text of the error that it raises."""
    from xception_jax.errors import UserError

    def run(*arguments):
        args = cli.parse(arguments)
        with pytest.raises(UserError) as error:
            cli.import_module("xception_jax.cli.study").run(args)
        return str(error.value)

    return run
