import csv
import dataclasses
import io
import json
import lzma
import math
import re
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats

from tests.reports.test_run_report import Page
from tests.study.simulated import small_study, write_simulated
from xception_jax.errors import BadDataError, ConfigError, InputMissingError
from xception_jax.logs import metrics_log
from xception_jax.logs.metrics_log import MetricsLog, read_metrics
from xception_jax.models import cost
from xception_jax.study import inference
from xception_jax.study.collect import _curve, _interaction_outcome, collect
from xception_jax.study.controls import EQUAL_WITHIN, ArmCost, cost_headline
from xception_jax.study.design import COSTS
from xception_jax.study.progress_table import ProgressTable
from xception_jax.study.report import format_results, write_study_report
from xception_jax.study.runner import Runner
from xception_jax.study.store import read_study, write_study

FAILED = ("4_relu", 3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_simulated(root, small_study(), fail=[FAILED])
    return root, write_study_report(root)


def test_known_effects_are_found(written):
    _, results = written
    verdicts = {entry.comparison.arm: (entry.verdict, entry.outcome) for entry in results.comparisons}
    assert verdicts["1_relu"] == ("better", "as expected")
    assert verdicts["depthwise_relu"] == ("worse", "as expected")
    assert verdicts["16_relu"] == ("equivalent", "")
    (interaction,) = results.interactions
    assert interaction.trend.flips == "rises through zero"
    assert interaction.outcome == "as expected"
    assert interaction.trend.slope.low < 0.004 < interaction.trend.slope.high
    assert interaction.seeds == 4  # the seed of the failed cell is left out
    assert list(interaction.x) == sorted(interaction.x)


def about(mean):
    return inference.estimate(mean + np.array([-1e-4, 0.0, 1e-4, 2e-5]))


RISES, FALLS = "rises through zero", "falls through zero"
OPEN = inference.estimate(np.array([-0.03, 0.0, 0.035, 0.01]))


@pytest.mark.parametrize(
    ("expected", "slope", "first", "last", "outcome"),
    [
        ("no", about(0.0), about(0.01), about(0.01), "as expected"),
        ("no", about(0.01), about(-0.01), about(0.01), "against it"),
        ("no", OPEN, OPEN, OPEN, "undecided"),
        (FALLS, about(-0.01), about(0.01), about(-0.01), "as expected"),
        (FALLS, about(0.01), OPEN, OPEN, "against it"),
        (FALLS, about(-0.01), OPEN, OPEN, "undecided"),
        (RISES, about(-0.01), OPEN, OPEN, "against it"),
        (RISES, about(0.01), OPEN, OPEN, "undecided"),
        (RISES, OPEN, about(-0.01), about(0.01), "undecided"),
        (RISES, OPEN, about(0.01), about(-0.01), "against it"),
    ],
)
def test_the_outcome_of_an_interaction(expected, slope, first, last, outcome):
    trend = inference.Trend(slope, slope, first, last)
    assert _interaction_outcome(expected, trend, 0.005) == outcome


def test_an_interaction_without_a_trend_is_undecided():
    assert _interaction_outcome(RISES, None, 0.005) == "undecided"


def test_a_curve_is_the_mean_of_finished_cells_at_their_common_steps(tmp_path):
    stored = write_simulated(tmp_path, small_study(), fail=[("1_none", 2)])
    cells = [cell for cell in stored.cells() if cell.arm == "1_none" and cell.seed in (0, 1, 2)]
    for cell, curve in zip(cells, ({10: 0.5, 20: 0.7, 30: 0.9}, {10: 0.6, 20: 0.6}, {10: 0.0}), strict=True):
        (cell.directory / "metrics.jsonl").unlink()
        log = MetricsLog(cell.directory / "metrics.jsonl")
        for step, value in curve.items():
            log.write(step, "dev", {"ema_top1": value})
        log.close()
    steps, mean, half = _curve(cells, "dev", "ema_top1")
    assert list(steps) == [10, 20]
    assert mean == pytest.approx([0.55, 0.65])
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 1) * np.array([0.05, 0.05]))


def test_metrics_may_be_compressed_when_cells_are_done(tmp_path):
    stored = write_simulated(tmp_path, small_study())
    before = json.dumps(collect(stored).to_json())
    for cell in stored.cells():
        subprocess.run(["xz", cell.metrics_file()], check=True)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert json.dumps(collect(stored).to_json()) == before
    copy = dataclasses.replace(stored.cells()[0], directory=tmp_path / "copy")
    copy.take_over(stored.cells()[0])
    assert read_metrics(copy.metrics_file()) == read_metrics(stored.cells()[0].metrics_file()) != []


@pytest.mark.parametrize("spoil", [lambda content: content[:-20], lambda content: b"", lambda content: b"x" + content])
def test_damaged_compressed_metrics_are_named(spoil, tmp_path):
    path = tmp_path / "metrics.jsonl.xz"
    path.write_bytes(spoil(lzma.compress(b'{"step": 1, "split": "dev"}\n' * 100)))
    with pytest.raises(BadDataError, match=r"metrics\.jsonl\.xz"):
        read_metrics(path)


def test_metrics_that_decompress_to_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_log, "MAX_DECOMPRESSED_BYTES", 2**24)
    path = tmp_path / "metrics.jsonl.xz"
    path.write_bytes(lzma.compress(bytes(2**24 + 1), preset=0))
    with pytest.raises(BadDataError, match="decompresses to more than"):
        read_metrics(path)


def test_a_cell_that_is_done_but_has_lost_its_metrics_is_named(tmp_path):
    stored = write_simulated(tmp_path, small_study())
    stored.cells()[0].metrics_file().unlink()
    with pytest.raises(BadDataError, match="is done, but its accuracy is not known"):
        collect(stored)


def test_a_course_of_which_nothing_is_expected_has_no_outcome(tmp_path):
    study = small_study()
    unknown = dataclasses.replace(study.interactions[0], expected="unknown")
    write_simulated(tmp_path, dataclasses.replace(study, interactions=(unknown,)))
    (interaction,) = write_study_report(tmp_path).interactions
    assert (interaction.trend.flips, interaction.outcome) == ("rises through zero", "")


def test_comparisons_are_paired_by_seed(written):
    root, results = written
    with open(root / "cells.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    accuracy = {(r["arm"], int(r["seed"])): r["test_accuracy"] if r["exit_code"] == "0" else "" for r in rows}
    assert [key for key, value in accuracy.items() if not value] == [FAILED]
    for entry in results.comparisons:
        pairs = [(accuracy[entry.comparison.arm, s], accuracy[entry.comparison.baseline, s]) for s in range(5)]
        arm, baseline = np.array([(float(a), float(b)) for a, b in pairs if a and b]).T
        theirs = scipy.stats.ttest_rel(arm, baseline)
        assert entry.difference.n == len(arm) == (4 if entry.comparison.arm == FAILED[0] else 5)
        assert entry.difference.p == pytest.approx(theirs.pvalue)
        assert (entry.difference.low, entry.difference.high) == pytest.approx(tuple(theirs.confidence_interval()))


def test_no_effect_is_no_flip(tmp_path):
    write_simulated(tmp_path, small_study(seeds=(0, 1, 2, 3)), slope=0.0)
    results = write_study_report(tmp_path)
    assert {entry.verdict for entry in results.comparisons} <= {"equivalent", "undecided"}
    assert results.interactions[0].trend.flips == "no"
    assert results.interactions[0].outcome == "against it"  # both ends are inside the margin


def test_the_page_is_whole_and_escaped(written):
    root, _ = written
    text = (root / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 10
    assert "The effect rises through zero & <b>nothing</b> is markup." in " ".join(page.text.split())
    assert "<b>nothing</b>" not in text
    for words in ("1 cell failed", "4_relu seed 3 (diverged)", "rises through zero", "equivalent", "cells.csv"):
        assert words in page.text, words
    assert "preliminary" not in page.text
    assert not any(
        name in ("src", "href") for name, value in page.attributes if not str(value).startswith(("#", "data:"))
    )
    markdown = (root / "report.md").read_text()
    assert "| `depthwise_relu \N{MINUS SIGN} depthwise_none` | 5 |" in markdown


STOPPED = {"1_none": 130, "2_none": 75, "4_none": -9}  # exit codes by arm


def test_a_stopped_cell_is_resumable_and_not_failed(tmp_path):
    stored = write_simulated(tmp_path, small_study(seeds=(0,)), fail=[("8_none", 0)])
    cells = stored.cells()
    for cell in cells:
        if cell.arm in STOPPED:
            cell.write_record(exit_code=STOPPED[cell.arm])

    results = write_study_report(tmp_path)
    assert {arm.name: arm.failed for arm in results.arms if arm.failed} == {"8_none": {0: 70}}
    words = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    stopped = ", ".join(f"{arm} seed 0 (exit code {code})" for arm, code in STOPPED.items())
    assert f"3 cells stopped: {stopped}. The same command resumes them." in words
    assert "1 cell failed: 8_none seed 0 (diverged)." in words
    assert "8 of 12 cells done, 1 failed, 3 stopped and resumable;" in (tmp_path / "report.md").read_text()

    runner = Runner([], [], {}, lambda runner: None)
    runner.finished += [(cell, cell.record()["exit_code"]) for cell in cells if cell.arm in ("1_none", "8_none")]
    stream = io.StringIO()
    table = ProgressTable(stored.study, stored.costs, cells, {}, 1, 0, stream)
    table.show(runner)
    assert "1_none seed 0: stopped with 130, will be resumed" in stream.getvalue()
    assert "8_none seed 0: failed with 70" in stream.getvalue()
    head, columns, *rows, legend = table.table(runner, 100, 200)
    assert head.startswith("simulated: 8 of 12 cells done, 1 failed")
    last = {row.split()[0]: row.split()[-1] for row in rows}
    assert {arm: last[arm] for arm in STOPPED} == dict.fromkeys(STOPPED, "-")
    assert last["8_none"] == "70"
    assert (columns.split()[-1], "-: stopped" in legend) == ("0", True)


def test_figures_stand_alone(written):
    root, _ = written
    linked = re.findall(r"!\[[^]]+\]\((figures/[^)]+)\)", (root / "report.md").read_text())
    assert linked == ["figures/axis.svg", "figures/effects.svg", "figures/comparisons.svg"]
    costs = {f"figures/{name}.svg" for name in (*COSTS, "images_per_second")}
    assert {str(path.relative_to(root)) for path in (root / "figures").iterdir()} == {*linked, *costs}
    for name in (*linked, *costs):
        assert ElementTree.parse(root / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_json_is_strict_and_has_what_the_page_has(written):
    _, results = written
    text = json.dumps(results.to_json(), allow_nan=False)
    data = json.loads(text)
    assert {"arms", "comparisons", "interactions", "cells"} <= data.keys()
    assert data["comparisons"][0]["difference"]["n"] == 5
    assert "as expected" in format_results(results)


def test_a_study_without_any_result(tmp_path):
    study = small_study(seeds=(0,))
    write_simulated(tmp_path, study, fail=[(arm.name, seed) for arm in study.arms for seed in study.seeds])
    results = write_study_report(tmp_path)
    assert all(entry.verdict == "undecided" and math.isnan(entry.difference.mean) for entry in results.comparisons)
    Page((tmp_path / "report.html").read_text())


def test_the_names_of_costs_are_those_that_are_counted():
    assert tuple(COSTS) == cost.COSTS


@pytest.mark.parametrize("share", [1 - 0.9 * EQUAL_WITHIN, 1 - 1.1 * EQUAL_WITHIN, 1.2])
def test_arms_of_unequal_live_cost_are_not_called_equal(share):
    study = small_study()
    costs = {arm.name: ArmCost(0.2, 1000, 1000, 1000, 1000, 1.0) for arm in study.arms}
    assert cost_headline(study, costs) == "equal parameters"
    costs["1_none"] = dataclasses.replace(costs["1_none"], live_parameters=round(1000 * share))
    named = dataclasses.replace(study, unequal=("live_parameters",))
    if abs(share - 1) < EQUAL_WITHIN:
        assert cost_headline(study, costs) == cost_headline(named, costs) == "equal parameters"
        return
    differ = f"live parameters by up to {share - 1:+.0%}"
    assert cost_headline(named, costs) == f"equal parameters, unequal {differ}"
    for unequal in ((), ("multiply_adds",)):
        headline = cost_headline(dataclasses.replace(study, unequal=unequal), costs)
        assert "equal" not in headline
        assert differ in headline
    assert differ not in cost_headline(dataclasses.replace(study, control="live_parameters"), costs)
    assert cost_headline(dataclasses.replace(study, control="width"), costs).startswith("fixed width; arms differ in")


def test_the_reports_show_four_costs_and_refuse_to_call_them_equal(tmp_path):
    arms = small_study().arms[:2]
    study = small_study(arms=arms, comparisons=(), interactions=(), reference="1_none", seeds=(0,))
    stored = write_simulated(tmp_path, study)
    unequal = dataclasses.replace(stored.costs["1_relu"], live_multiply_adds=3_600_000)
    data = json.loads((tmp_path / "study.json").read_text())
    del data["sha256"]  # as written by earlier releases, and so that the change is not found by it
    data["costs"]["1_relu"] = dataclasses.asdict(unequal)
    (tmp_path / "study.json").write_text(json.dumps(data))
    write_study_report(tmp_path)
    page = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    markdown = (tmp_path / "report.md").read_text()
    for text in (page, markdown):
        assert "equal parameters" not in text.lower()
        assert "they differ in live multiply-adds by up to +20%" in text
        assert all(label in text.lower() for label in COSTS.values())
    assert "These arms are not equal in cost: parameters are matched, but live multiply-adds differ" in page
    assert "3.60 M +20.0%" in page


def test_live_costs_are_counted_for_studies_of_earlier_releases(tmp_path):
    study = small_study(arms=small_study().arms[:1], comparisons=(), interactions=(), reference="1_none", seeds=(0,))
    write_simulated(tmp_path, study)
    data = json.loads((tmp_path / "study.json").read_text())
    del data["sha256"]  # as written by earlier releases, and so that the change is not found by it
    for name in ("live_parameters", "live_multiply_adds"):
        del data["costs"]["1_none"][name]
    del data["study"]["unequal"]
    (tmp_path / "study.json").write_text(json.dumps(data))
    found = read_study(tmp_path).costs["1_none"]
    assert (found.width_multiplier, found.parameters) == (0.2, 400_509)  # as the first study with this network records
    assert round(found.live_multiply_adds / 1e6, 2) == 1.84


def test_an_arm_without_segments_is_stored(tmp_path):
    """Inception V3 has neither separable nor regular modules; NaN is not JSON."""
    study = small_study(arms=small_study().arms[:1], comparisons=(), interactions=(), reference="1_none", seeds=(0,))
    stored = write_simulated(tmp_path, study)
    cost = dataclasses.replace(stored.costs["1_none"], channels_per_segment=math.nan)
    write_study(dataclasses.replace(stored, costs={"1_none": cost}))
    assert math.isnan(read_study(tmp_path).costs["1_none"].channels_per_segment)
    write_study_report(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["costs"]["1_none"].update(parameters="many"),
        lambda data: data["costs"].pop("1_none"),
        lambda data: data.update(history=[{"time": 3}]),
        lambda data: data.update(history=3),
    ],
)
def test_a_study_json_that_was_changed_by_hand(change, tmp_path):
    study = small_study(arms=small_study().arms[:1], comparisons=(), interactions=(), reference="1_none", seeds=(0,))
    write_simulated(tmp_path, study)
    data = json.loads((tmp_path / "study.json").read_text())
    del data["sha256"]  # as written by earlier releases, and so that the change is not found by it
    change(data)
    (tmp_path / "study.json").write_text(json.dumps(data))
    with pytest.raises(BadDataError, match="the study cannot be read"):
        read_study(tmp_path)


def test_a_design_that_was_changed_after_it_was_stated_is_refused(tmp_path):
    """It would change verdicts: margins, gates and bounds by the digest of the file, arms also by their cells."""
    study = small_study(arms=small_study().arms[:2], comparisons=(), interactions=(), reference="1_none")
    write_simulated(tmp_path, study)
    data = json.loads((tmp_path / "study.json").read_text())
    data["study"]["margin"] = 0.5
    (tmp_path / "study.json").write_text(json.dumps(data))
    with pytest.raises(BadDataError, match="changed after the study was stated"):
        read_study(tmp_path)
    del data["sha256"]
    data["study"]["arms"][0]["overrides"]["model.intermediate_activation"] = "elu"
    (tmp_path / "study.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="1_none seed 0 was started with a different config"):
        collect(read_study(tmp_path))


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_finished_cell_whose_accuracy_is_lost_is_not_left_out(tmp_path, value):
    cell = write_simulated(tmp_path, small_study()).cells()[3]
    metrics = cell.directory / "metrics.jsonl"
    metrics.write_text(re.sub('"ema_top1": [0-9.]+', f'"ema_top1": {value}', metrics.read_text()))
    with pytest.raises(BadDataError, match=f"{cell.name} is done, but its accuracy is not known"):
        collect(read_study(tmp_path))


def test_there_is_no_study(tmp_path):
    with pytest.raises(InputMissingError, match="there is no study"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(BadDataError, match=r"the study cannot be read"):
        read_study(tmp_path)
