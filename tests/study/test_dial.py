"""The task whose truth is known: banks, Bayes classifier, networks at equal cost, gates and claims."""

import dataclasses
import functools
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp, softmax

from configs.studies.dial import get_study
from tests.study.simulated import small_study, write_simulated
from tests.study.simulated_dial import simulate
from xception_jax.cli import main
from xception_jax.errors import BadDataError, ConfigError, PreemptedError, UsageError
from xception_jax.study.dial import task, training
from xception_jax.study.dial.banks import FREE, BankSpec, make_bank, measure
from xception_jax.study.dial.claims import FIRST, SECOND, beside_claims, evaluate_claims
from xception_jax.study.dial.design import DialStudy, Row, Tuning, check_dial, counted_cells, tuning_cells
from xception_jax.study.dial.execute import chosen_rates, run_dial, tried_rates
from xception_jax.study.dial.gates import check_gates
from xception_jax.study.dial.network import (
    CONTROLS,
    FORMS,
    DialArm,
    DialNetwork,
    _maximum_backward,
    count,
    maximum,
)
from xception_jax.study.dial.records import (
    BANK_COLUMNS,
    BANKS,
    CELLS,
    NETWORKS,
    add_record,
    cell_record,
    done,
    read_dial,
    read_records,
    state,
)
from xception_jax.study.dial.report import write_dial_report
from xception_jax.study.dial.results import collect_dial
from xception_jax.study.dial.training import Recipe
from xception_jax.study.gates import CheckedGate
from xception_jax.study.seed_claims import part_of
from xception_jax.study.store import read_study
from xception_jax.study.study_file import load_study, run_study_file

FILE = Path(__file__).parents[2] / "configs/studies/dial.py"
REGULAR = DialArm("regular", "regular")
ARMS = [
    REGULAR,
    DialArm("depthwise_first", "depthwise_first"),
    DialArm("pointwise_first", "pointwise_first"),
    DialArm("segments_4", "depthwise_first", segments=4),
    DialArm("pointwise_segments_2", "pointwise_first", segments=2),
    DialArm("depthwise_first_ends", "depthwise_first", ends=True),
    DialArm("pointwise_first_ends", "pointwise_first", ends=True),
    DialArm("depthwise_first_8", "depthwise_first", depth=8),
    DialArm("depthwise_first_multiplier_6", "depthwise_first", multiplier=6),
    DialArm("pointwise_first_multiplier_2", "pointwise_first", multiplier=2),
    DialArm("depthwise_first_wide", "depthwise_first", cost_depth=8),
    DialArm("regular_wide", "regular", cost_depth=8),
]


@pytest.mark.parametrize("family", ["within", "across"])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_a_bank_has_its_rank(family, rank):
    bank = make_bank(BankSpec(family, rank, "rank"), seed=3)
    np.testing.assert_allclose(np.square(bank).sum((1, 2, 3)), 1)
    dial = measure(bank)
    ranks = {"within": dial.rank_within, "across": dial.rank_across}
    assert ranks.pop(family) == rank
    assert ranks.popitem()[1] == 9  # the other way of being separable is not touched
    if family == "within":
        assert dial.within == pytest.approx(1 - 1 / rank)  # equal singular values


@pytest.mark.parametrize("family", ["within", "across"])
def test_the_dial_rises_from_separable_to_the_free_bank_of_both_families(family):
    banks = [make_bank(BankSpec(family, angle), seed=5) for angle in (0, 22, 45, 67, FREE)]
    dials = [getattr(measure(bank), family) for bank in banks]
    assert dials[0] < 1e-9
    assert (np.diff(dials) > 0).all()
    np.testing.assert_array_equal(banks[-1], make_bank(BankSpec("within", FREE), seed=5))
    assert not np.allclose(banks[0], make_bank(BankSpec(family, 0), seed=6))


def test_a_template_stands_at_its_place_on_the_torus():
    bank = make_bank(BankSpec("across", FREE), seed=0)
    images, labels, places = task.draw(task.stream(0, task.TEST), bank.astype(np.float32), 100.0, 64)
    assert len(set(map(tuple, np.asarray(places).tolist()))) > 40
    assert np.asarray(places).max() == 11  # so that some templates reach across the edge
    found = task.crop(images, places, 3) / 100
    np.testing.assert_allclose(found, bank[np.asarray(labels)], atol=0.06)
    assert float(jnp.std(images)) < 5  # 100 times a template of norm one, over 1,728 values


def test_bayes_scores_are_those_of_a_brute_force_posterior():
    rng = np.random.default_rng(0)
    bank = rng.normal(0, 0.5, (2, 3, 3, 2))  # two classes of different norms
    image = rng.normal(size=(1, 12, 12, 2))
    likelihoods = np.zeros((2, 12, 12))
    for label in range(2):
        for row in range(12):
            for column in range(12):
                mean = np.zeros((12, 12, 2))
                mean[:3, :3] = 1.5 * bank[label]
                mean = np.roll(mean, (row, column), (0, 1))
                likelihoods[label, row, column] = -np.square(image[0] - mean).sum() / 2
    expected = softmax(logsumexp(likelihoods, axis=(1, 2)))
    scores = task.bayes_scores(jnp.asarray(image, jnp.float32), jnp.asarray(bank, jnp.float32), 1.5)
    np.testing.assert_allclose(softmax(np.asarray(scores[0], float)), expected, atol=1e-5)


def test_the_accuracy_of_two_classes_without_a_place_is_the_closed_form():
    means = jnp.array([[0.3, 0.0, 1.0], [0.0, 0.9, 0.2]])
    distance = float(jnp.linalg.norm(means[0] - means[1]))
    found = task.accuracy_of_means(jax.random.key(0), means)
    assert float(found) == pytest.approx(stats.norm.cdf(distance / 2), abs=0.002)


@pytest.mark.slow
def test_bisection_hits_its_target_and_the_posterior_is_as_often_right():
    bank = make_bank(BankSpec("across", 0), seed=2)
    strength = task.match_strength(bank, task.stream(2, task.BAYES), target=0.9, count=2048)
    found = task.bayes_accuracy(bank, strength, task.stream(2, task.CHECK), 2048)
    assert found.value == pytest.approx(0.9, abs=4 * 1.5 * found.error)
    bank = bank.astype(np.float32)
    images, labels, _ = task.draw(task.stream(2, task.TEST), bank, strength, 1024)
    right = float((task.bayes_scores(images, bank, strength).argmax(-1) == labels).mean())
    assert right == pytest.approx(0.9, abs=4 * (0.09 / 1024) ** 0.5)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_costs_are_those_of_the_network_and_equal(arm):
    study = DialStudy("x", "", {}, (Row(arm, ()),), (0, 1), Recipe(8), Tuning((), ()))
    depth = arm.cost_depth or arm.depth
    reference = count(dataclasses.replace(REGULAR, depth=depth), (24,) * depth)
    assert study.reference(arm) == reference
    for control in CONTROLS:
        cost = dataclasses.replace(study, control=control).costs()[arm.name]
        assert getattr(cost, control) == pytest.approx(getattr(reference, control), rel=0.015)
        network = DialNetwork(arm, cost.widths)
        shapes = jax.eval_shape(lambda n=network: n.init(jax.random.key(0), jnp.zeros((1, 12, 12, 12)), False))
        leaves = jax.tree.leaves(shapes["params"])
        assert sum(leaf.size for leaf in leaves) == cost.live_parameters
        assert sum(leaf.size for leaf in leaves if leaf.ndim == 4) == cost.weights


def test_with_a_pointwise_layer_at_both_ends_the_orders_differ_in_the_place_of_the_non_linearity_only():
    layers = {}
    for form in ("depthwise_first", "pointwise_first"):
        network = DialNetwork(DialArm(form, form, ends=True), (24, 24))
        init = functools.partial(network.init, train=False)
        params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 12, 12, 12)))["params"]
        layers[form] = {name: leaf["kernel"].shape for name, leaf in params.items() if "kernel" in leaf}
        assert sum(name.endswith("_bn") for name in params) == 2
    assert sorted(layers["depthwise_first"].values()) == sorted(layers["pointwise_first"].values())
    both = {"classifier", *(f"block{number}_{kind}" for number in (1, 2) for kind in ("spatial", "pointwise"))}
    assert set(layers["depthwise_first"]) == both | {"block1_front"}
    assert set(layers["pointwise_first"]) == both | {"block2_behind"}


@pytest.mark.parametrize("arm", [ARMS[4], ARMS[5]], ids=lambda arm: arm.name)
def test_a_network_keeps_the_variance_and_does_not_see_the_place(arm):
    images = jax.random.normal(jax.random.key(1), (16, 12, 12, 12))
    network = DialNetwork(arm, (24, 24))
    variables = network.init(jax.random.key(2), images, False)
    _, state = network.apply(variables, images, True, mutable=["batch_stats"])
    seen = state["batch_stats"]["block1_bn"]["var"]  # after one step from 1, with momentum 0.99
    assert float(1 + (seen.mean() - 1) / 0.01) == pytest.approx(1.0, abs=0.45)
    moved = jnp.roll(images, (5, 8), (1, 2))
    np.testing.assert_allclose(
        network.apply(variables, moved, False), network.apply(variables, images, False), atol=1e-4
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_deep_network_begins_as_one_of_two_blocks(form):
    images = jax.random.normal(jax.random.key(1), (4, 12, 12, 12))
    deep = DialNetwork(DialArm(form, form, depth=3), (24, 24, 24))
    variables = deep.init(jax.random.key(2), images, False)
    kept = {
        kind: {name.replace("block3", "block2"): leaf for name, leaf in tree.items() if not name.startswith("block2_")}
        for kind, tree in variables.items()
    }
    found = deep.apply(variables, images, False)
    expected = DialNetwork(DialArm(form, form), (24, 24)).apply(kept, images, False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_maximum_also_where_its_input_was_rounded_differently():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3)).at[1, :, :, 2].set(0.25)  # all are the largest
    value, gradient_of = jax.vjp(maximum, x)
    expected, expected_gradient_of = jax.vjp(lambda x: x.max((1, 2)), x)
    np.testing.assert_array_equal(value, expected)
    weights = jax.random.normal(jax.random.key(1), (2, 3))
    np.testing.assert_allclose(gradient_of(weights)[0], expected_gradient_of(weights)[0], rtol=1e-6)
    rounded = jnp.nextafter(value, jnp.inf)  # no element is as large
    np.testing.assert_array_equal(_maximum_backward((x, rounded), weights)[0], gradient_of(weights)[0])


def expected(arm, bank, dial):
    """Accuracies as the claims expect them."""
    if arm.startswith("regular"):
        return 0.963
    if arm.endswith("_ends"):
        return 0.93
    if arm == "pointwise_first":
        return 0.95 if bank == "within_0" else 0.92
    if arm.startswith("segments"):  # 4 segments are best in the middle, 1 at the free end
        best = {"across_22": "4", "across_45": "4"}.get(bank, "1" if bank != "across_0" else "none")
        return 0.96 if arm[-1] == best else 0.85
    if bank == "within_0":
        return 0.82
    return 0.962 - (0.05 if arm.endswith("_8") else 0.4) * dial


def against(arm, bank, dial):
    """Both orders equal, and no price of separability."""
    return 0.93 if arm.endswith("pointwise_first_ends") else 0.96


def test_claims_are_supported_by_what_they_expect_and_contradicted_by_the_opposite(tmp_path):
    results = collect_dial(simulate(tmp_path / "expected", expected))
    found = {tested.code: tested.verdict for tested in evaluate_claims(results)}
    assert found == dict.fromkeys(FIRST, "supported")
    assert all(gate.passed for gate in check_gates(results)), check_gates(results)
    results = collect_dial(simulate(tmp_path / "against", against))
    found = {tested.code: tested.verdict for tested in evaluate_claims(results)}
    assert found["H1"] == found["H5"] == "contradicted"
    assert "supported" not in found.values()


def few_filters(arm, bank, dial):
    """One spatial filter for each channel costs accuracy, unless the kernels need no more."""
    return 0.92 if arm == "depthwise_first" and bank != "across_0" else 0.96


@pytest.mark.parametrize(("collapsed", "verdict"), [(1, "supported"), (2, "undecided")])
def test_claims_of_the_second_run_are_not_decided_by_one_network(tmp_path, collapsed, verdict):
    def collapse(row):
        if row["seed"] < collapsed and row["arm"] in ("pointwise_first", "depthwise_first_ends"):
            row["accuracy"] = 0.7

    root = simulate(tmp_path, few_filters, size="second", seeds=tuple(range(10)), cell_change=collapse)
    results = collect_dial(root)
    assert all(gate.passed for gate in check_gates(results)), check_gates(results)
    assert {tested.code: tested.verdict for tested in evaluate_claims(results)} == dict.fromkeys(SECOND, verdict)


def test_claims_of_the_second_run_are_contradicted_by_the_opposite(tmp_path):
    def by_order(arm, bank, dial):
        return 0.96 if arm.startswith(("pointwise", "regular")) else 0.94

    results = collect_dial(simulate(tmp_path, by_order, size="second", seeds=tuple(range(10))))
    found = {tested.code: tested.verdict for tested in evaluate_claims(results)}
    assert found == dict.fromkeys(SECOND, "contradicted")


@pytest.mark.parametrize(("price", "slope"), [(0.0, 0.0), (0.2, -3.5)])
def test_numbers_beside_the_claims_tell_ties_from_benefits(tmp_path, price, slope):
    """Numbers of segments that are equally good have no slope, and are no benefit at the separable end."""

    def effect(arm, bank, dial):
        return 0.95 - (0 if arm == "segments_1" else price * dial)

    found = beside_claims(collect_dial(simulate(tmp_path, effect)))
    (benefit, unit), (slopes, unit_of_slopes) = list(found.values())[-2:]
    assert (unit, unit_of_slopes) == ("points", "")
    assert benefit.mean() == pytest.approx(0, abs=0.003)
    assert slopes.mean() == pytest.approx(slope, abs=0.01 if not price else 0.5)


def test_numbers_beside_the_claims_show_filters_and_steps(tmp_path):
    def effect(arm, bank, dial):
        return (
            0.9
            + 0.02 * ("multiplier" in arm)
            - {"depthwise_first": 0.3, "depthwise_first_long": 0.1}.get(arm, 0) * dial
        )

    found = beside_claims(collect_dial(simulate(tmp_path, effect)))
    means = [values.mean() for values, unit in found.values() if unit]
    assert means == pytest.approx([0.02, 0.02, -0.1, 0.2, means[4]], abs=0.005)


@pytest.mark.parametrize(
    ("eight", "wide", "states"),
    [
        (-0.15, -0.4, ["holds", "holds", "holds"]),
        (-0.30, -0.4, ["holds", "fails", "holds"]),
        (-0.15, -0.05, ["holds", "holds", "fails"]),
    ],
)
def test_each_slope_enters_the_claim_on_depth(tmp_path, eight, wide, states):
    slopes = {"depthwise_first": -0.4, "depthwise_first_8": eight, "depthwise_first_wide": wide}
    baselines = {"regular": 0.0, "regular_8": 0.1, "regular_wide": -0.1}

    def effect(arm, bank, dial):
        baseline = baselines.get(arm.replace("depthwise_first", "regular"), 0.0)
        return 0.9 + (baseline + slopes.get(arm, 0.0)) * dial

    tested = {each.code: each for each in evaluate_claims(collect_dial(simulate(tmp_path, effect)))}["H4"]
    assert [part.state for part in tested.parts] == states
    found = [part.estimate.mean for part in tested.parts]
    assert found == pytest.approx([-0.4, eight + 0.2, eight - wide], abs=0.01)


def test_the_steps_of_a_call_do_not_change_the_training(monkeypatch):
    """Also if the steps of the study are no multiple of them."""
    arm = DialArm("regular", "regular")
    bank, recipe = make_bank(BankSpec("across", 0), 0), Recipe(steps=12, batch_size=16, test_images=64)
    found = []
    for steps in (5, 12):
        monkeypatch.setattr(training, "_CHUNK", steps)
        training._Programs.of.cache_clear()
        outcome, variables = training.train(arm, (4, 4), bank, 5.0, rate=0.1, seed=0, recipe=recipe)
        found.append(variables | {"curve": np.array(outcome.curve)})
    training._Programs.of.cache_clear()
    for path, value in found[0].items():
        np.testing.assert_allclose(value, found[1][path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_marginals_give_away_nothing_that_they_do_not_have():
    bank = np.random.default_rng(0).normal(size=(4, 3, 3, 6))
    key = jax.random.key(0)
    without_means = bank - bank.mean((1, 2), keepdims=True)
    without_sums = bank - bank.mean(-1, keepdims=True)
    assert task.marginal_accuracies(without_means, 5.0, key, 4096)[0] == pytest.approx(0.25, abs=0.01)
    assert task.marginal_accuracies(without_sums, 5.0, key, 4096)[1] == pytest.approx(0.25, abs=0.01)


def test_the_accuracy_from_the_channel_means_is_that_of_drawn_images():
    bank, strength = np.random.default_rng(0).normal(size=(4, 3, 3, 6)), 3.0
    images, labels, _ = task.draw(jax.random.key(1), jnp.asarray(bank, jnp.float32), strength, 20_000)
    seen, means = np.asarray(images).mean((1, 2)), strength * bank.sum((1, 2)) / task.WIDTH**2
    nearest = np.square(seen[:, None] - means).sum(-1).argmin(1)
    from_means, _ = task.marginal_accuracies(bank, strength, jax.random.key(0), 1024)
    assert 0.35 < from_means < 0.9
    assert from_means == pytest.approx(np.mean(nearest == np.asarray(labels)), abs=0.015)


def test_a_part_without_enough_seeds_is_open():
    part = part_of("x", np.array([0.02, np.nan]), "above", 0.01)
    assert part.state == "open"
    assert np.isnan(part.p)
    assert part_of("x", np.array([0.02, 0.021, 0.019]), "above", 0.01).state == "holds"
    assert part_of("x", np.array([0.02, 0.021, 0.019]), "within", 0.01).state == "fails"
    assert part_of("x", np.array([0.02, 0.021, 0.0]), "below", 0.01).state == "open"


def _swap_free_within(row):
    """Makes the free bank more separable within filters than the one at 67 degrees."""
    if row["bank"] == "free":
        row["within"] = 0.5


def _change(**columns):
    def change(row):
        if row["bank"] == "across_45":
            row |= {name: row[name] + by for name, by in columns.items()}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bank_change": _change(bayes_accuracy=0.005)}, "range of the Bayes accuracy"),
        ({"cell_change": _change(accuracy=0.02)}, "range of the accuracy of regular"),
        ({"bank_change": _change(rank_across=-5)}, "measured rank"),
        ({"bank_change": _change(across=0.5)}, "measured rank"),  # more than the free bank's
        ({"bank_change": _change(from_means=0.3)}, "only the channel means"),
        ({"bank_change": _change(from_sums=0.3)}, "only the channel sums"),
        ({"cell_change": _change(pulled_across=0.2)}, "pulled back"),
        ({"cell_change": _change(steps=1)}, "another rate, number of steps or design"),
        ({"cell_change": _change(design="x")}, "another rate, number of steps or design"),
        ({"cell_change": lambda row: row.update(rate=0.08)}, "another rate, number of steps or design"),
        ({"cell_change": _change(bank="x")}, "cells that count and are missing"),
        ({"bank_change": _swap_free_within}, "measured rank"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gate_fails_when_it_must(tmp_path, change, words):
    gates = check_gates(collect_dial(simulate(tmp_path, expected, seeds=(0, 1), **change)))
    failed = [gate.name for gate in gates if not gate.passed]
    assert failed
    assert any(words in name for name in failed), failed


def test_a_study_with_missing_cells_is_not_interpreted(tmp_path):
    root = simulate(tmp_path, expected, seeds=(0, 1))
    lines = (root / CELLS).read_text().splitlines(keepends=True)
    (root / CELLS).write_text("".join(lines[:-1]))
    report = write_dial_report(root)
    assert not report.passed
    assert report.gates[1].detail.startswith("137 of 138")
    shown = [gate for gate in report.gates if "accuracy of regular" in gate.name or "pulled back" in gate.name]
    assert len(shown) == 8
    assert {gate.detail for gate in shown} == {"cells are missing"}  # and not the lowest and the highest accuracy
    assert report.claims == ()
    text = (root / "report.md").read_text()
    assert "draws no conclusions" in text
    assert "supported" not in text
    assert "Not shown before all cells are done" in text
    assert "96.3" not in text.partition("## Accuracy")[2].partition("##")[0]
    (root / CELLS).write_text("".join([*lines, lines[-1]]))
    with pytest.raises(BadDataError, match="two rows are about"):
        write_dial_report(root)
    assert not CheckedGate("x", float("nan"), 1.0).passed
    (root / CELLS).write_text("arm,seed\nx,1\n")
    with pytest.raises(BadDataError, match="other columns"):
        write_dial_report(root)
    (root / CELLS).write_text("".join(lines).replace("0.04,regular", "x,regular", 1))
    with pytest.raises(BadDataError, match="could not convert"):
        write_dial_report(root)
    (root / CELLS).unlink()
    for change in ({"rows": 3}, {"seeds": [1, "x"], "rows": []}, {"reference_width": 10**9}):
        data = json.loads((root / "study.json").read_text())
        data["study"] |= change
        (root / "study.json").write_text(json.dumps(data))
        with pytest.raises((BadDataError, ConfigError)):
            write_dial_report(root)


def test_the_cells_that_choose_the_rates_and_the_claims_must_be_those_of_the_design(tmp_path):
    root = simulate(tmp_path, expected, seeds=(0, 1))
    lines = (root / CELLS).read_text().splitlines(keepends=True)
    (root / CELLS).write_text("".join([lines[0], *lines[2:]]))
    failed = [gate.name for gate in check_gates(collect_dial(root)) if not gate.passed]
    assert failed == ["cells that choose the rates and are missing"]
    (root / CELLS).write_text("".join(lines))
    data = json.loads((root / "study.json").read_text())
    data["study"]["hypotheses"]["H2"] = "Something else."
    (root / "study.json").write_text(json.dumps(data))
    failed = {gate.name: gate.detail for gate in check_gates(collect_dial(root)) if not gate.passed}
    assert failed.pop("claims that this version states differently") == "H2"
    assert [*failed] == ["cells with another rate, number of steps or design than stated"]  # the claims belong to it


def test_numbers_that_are_equal_on_all_banks_have_no_slope(tmp_path):
    """Rounding would otherwise decide a claim whose bound is 0."""
    found = evaluate_claims(
        collect_dial(simulate(tmp_path, lambda arm, bank, dial: 0.9 + 0.02 * (arm == "segments_2")))
    )
    (part,) = next(tested.parts for tested in found if tested.code == "H3")
    assert (part.estimate.mean, part.estimate.low, part.estimate.high) == (0, 0, 0)


def test_the_report_says_what_is_equal_and_what_came_out(tmp_path, monkeypatch, capsys):
    root = simulate(tmp_path, expected)
    monkeypatch.setattr(sys, "argv", ["xception-jax", "study", "report", str(root), "--json"])
    assert main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["claims"][0]["verdict"] == "supported"
    assert printed["beside"]["depthwise first - segments_1, across_0"]["n"] == 4
    text = (root / "report.md").read_text()
    assert "equal multiply-adds, but not equal live parameters (depthwise_first +17%" in text
    assert "**H5: supported**" in text
    assert "| within ±1.00 | holds |" in text
    for name in ("claims", "crossing", "segments", "price"):
        assert (root / "figures" / f"{name}.svg").read_text().startswith("<svg")


def test_without_the_free_bank_no_figure_joins_both_dials(tmp_path):
    root = simulate(tmp_path, expected, free=False)
    write_dial_report(root)
    assert {path.stem for path in (root / "figures").iterdir()} >= {"segments"}
    assert not (root / "figures" / "crossing.svg").exists()


TINY = DialStudy(
    name="tiny",
    question="Does it run?",
    hypotheses={},
    rows=(Row(REGULAR, (BankSpec("across", 0),)),),
    seeds=(0, 1),
    recipe=Recipe(steps=8, batch_size=8, test_images=16),
    tuning=Tuning((0.01,), (BankSpec("across", 0),)),
    reference_width=2,
    bayes_images=64,
)


@pytest.mark.slow
def test_a_study_runs_resumes_to_the_same_values_and_refuses_another_design(tmp_path):
    said = []
    assert run_dial(TINY, tmp_path, said.append) == 0
    rows = read_records(tmp_path, CELLS)
    assert [row["stage"] for row in rows] == ["tune", "test", "test"]
    assert "%" not in said[-1]  # accuracies of counted cells stay hidden while the study runs
    assert read_dial(tmp_path)[0] == TINY
    saved = {file.name: np.load(file) for file in (tmp_path / NETWORKS).iterdir()}
    assert set(saved) == {"regular.across_0.0.npz", "regular.across_0.1.npz"}
    kernel = saved["regular.across_0.0.npz"]["params/block1_spatial/kernel"]
    assert kernel.shape == (3, 3, 12, 2)
    assert np.isfinite(kernel).all()
    lines = (tmp_path / CELLS).read_text().splitlines(keepends=True)
    (tmp_path / CELLS).write_text("".join(lines[:-1]))
    said.clear()
    run_dial(TINY, tmp_path, said.append, jobs=2)  # a cell does not depend on the process that trains it
    assert len(said) == 1
    varying = ("seconds", "cpu_seconds")
    again = read_records(tmp_path, CELLS)
    assert [{k: v for k, v in row.items() if k not in varying} for row in again] == [
        {k: v for k, v in row.items() if k not in varying} for row in rows
    ]


def test_a_killed_worker_ends_a_study_resumable(tmp_path):
    def kill_one() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        workers[0].kill()

    threading.Thread(target=kill_one).start()
    with pytest.raises(PreemptedError, match="was killed"):
        run_dial(TINY, tmp_path, list().append, jobs=2)
    assert not multiprocessing.active_children()


def test_a_study_with_cells_takes_further_seeds_and_no_other_design(tmp_path):
    study = dataclasses.replace(get_study(), seeds=(0, 1))
    state(tmp_path, dataclasses.replace(study, margin=0.02))  # without cells, the design may still change
    simulate(tmp_path, expected, seeds=(0, 1))
    assert read_dial(tmp_path)[0] == study
    cells = counted_cells(study, {})
    assert {cell.key for cell in (*tuning_cells(study), *cells)} == done(tmp_path)
    with pytest.raises(ConfigError) as error:
        state(tmp_path, dataclasses.replace(study, margin=0.02, seeds=(1, 2)))
    assert error.value.details == ("margin", "seed 0 was removed")
    more = dataclasses.replace(study, seeds=(0, 1, 2))
    state(tmp_path, more)
    assert [entry["change"] for entry in read_dial(tmp_path)[1]] == ["stated", "added seeds [2]"]
    assert len([cell for cell in counted_cells(more, {}) if cell.key not in done(tmp_path)]) == len(cells) / 2
    add_record(tmp_path, CELLS, read_records(tmp_path, CELLS)[3] | {"accuracy": 0.5})  # replaced, not added
    rows = read_records(tmp_path, CELLS)
    assert (len(rows), rows[-1]["accuracy"]) == (len(tuning_cells(study)) + len(cells), "0.5")


def test_a_directory_with_banks_or_another_study_keeps_its_design(tmp_path):
    study = get_study()
    state(tmp_path, study)
    add_record(tmp_path, BANKS, dict.fromkeys(BANK_COLUMNS, 1.0) | {"bank": "free", "seed": 0})
    with pytest.raises(ConfigError, match="the study has changed"):
        state(tmp_path, dataclasses.replace(study, bayes_images=2048))
    other = write_simulated(tmp_path / "other", small_study()).root
    before = (other / "study.json").read_text()
    with pytest.raises(ConfigError, match="another study"):
        state(other, study)
    assert (other / "study.json").read_text() == before
    with pytest.raises(ConfigError, match="does not work with a dial study"):
        read_study(tmp_path)


def test_a_claim_without_banks_in_common_is_not_tested(tmp_path):
    root = simulate(tmp_path, expected, seeds=(0, 1))
    data = json.loads((root / "study.json").read_text())
    for row in data["study"]["rows"]:
        if row["arm"]["name"] in ("segments_4", "regular_8"):
            row["banks"] = row["banks"][:1]
    (root / "study.json").write_text(json.dumps(data))
    found = {tested.code: tested.verdict for tested in evaluate_claims(collect_dial(root))}
    assert found["H3"] == found["H4"] == "not tested"
    assert found["H1"] == "supported"


def test_rates_may_be_added_until_a_cell_counts(tmp_path):
    def with_rates(*rates: float) -> DialStudy:
        return dataclasses.replace(study, tuning=dataclasses.replace(study.tuning, rates=rates))

    study = get_study()
    values = dict.fromkeys(("accuracy", "train_accuracy", "loss", "pulled_within", "pulled_across"), 0.5)
    values |= {"curve": (0.5,), "seconds": 1.0, "cpu_seconds": 2.0}
    state(tmp_path, with_rates(0.02, 0.04))
    add_record(tmp_path, CELLS, cell_record(study, tuning_cells(study)[0], values))
    state(tmp_path, with_rates(0.02, 0.04, 0.08))
    assert read_dial(tmp_path)[0] == with_rates(0.02, 0.04, 0.08)
    assert [entry["change"] for entry in read_dial(tmp_path)[1]] == ["stated", "added rates [0.08]"]
    with pytest.raises(ConfigError, match="the study has changed"):
        state(tmp_path, with_rates(0.04, 0.08))
    add_record(tmp_path, CELLS, cell_record(study, counted_cells(study, {"regular": 0.04})[0], values))
    state(tmp_path, with_rates(0.02, 0.04, 0.08))
    with pytest.raises(ConfigError, match="the study has changed"):
        state(tmp_path, with_rates(0.02, 0.04, 0.08, 0.16))


def test_the_best_rate_is_chosen_and_a_diverged_one_is_not():
    rows = [
        {"stage": "tune", "arm": "regular", "rate": rate, "accuracy": accuracy}
        for rate, accuracy in (("0.001", "0.5"), ("0.01", "0.5"), ("0.1", "nan"))
    ]
    study = dataclasses.replace(TINY, tuning=Tuning((0.1, 0.01, 0.001), TINY.tuning.banks))
    assert tried_rates(study, rows) == {"regular": {0.001: 0.5, 0.01: 0.5, 0.1: 0.0}}
    assert chosen_rates(study, rows) == {"regular": 0.001}


@pytest.mark.parametrize("spec", ["", ":smoke", ":second", ":full", ":cpu,live_parameters"])
def test_the_shipped_study_is_valid_and_can_be_listed(spec, monkeypatch, capsys):
    study, path = run_study_file(f"{FILE}{spec}")
    assert check_dial(study, path) is study
    assert list(study.hypotheses) == list(SECOND if spec == ":second" else FIRST)
    assert "xception-jax study run studies/dial " in FILE.read_text()
    monkeypatch.setattr(sys, "argv", ["xception-jax", "study", "run", f"studies/dial{spec}", "--print"])
    assert main() == 0
    out = capsys.readouterr().out
    assert "regular" in out
    assert ("not tested" in out) == (spec == ":smoke")


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="not a Study"):
        load_study(str(FILE))
    with pytest.raises(ConfigError, match="no size"):
        run_study_file(f"{FILE}:huge")
    with pytest.raises(ConfigError, match="control"):
        check_dial(dataclasses.replace(TINY, control="width"), "here")
    with pytest.raises(ConfigError, match="steps is 7"):
        check_dial(dataclasses.replace(TINY, recipe=Recipe(steps=7)), "here")
    for recipe in (Recipe(steps=8.0), Recipe(steps=8, batch_size=0), Recipe(steps=8, test_images=0)):
        with pytest.raises(ConfigError, match="set it to a whole number of at least"):
            check_dial(dataclasses.replace(TINY, recipe=recipe), "here")
    for tuning, name in ((Tuning((), TINY.tuning.banks), "rates"), (Tuning((0.01,), ()), "banks")):
        with pytest.raises(ConfigError, match=f"the tuning has no {name}"):
            check_dial(dataclasses.replace(TINY, tuning=tuning), "here")
    with pytest.raises(ConfigError, match="value of the wrong type"):
        check_dial(dataclasses.replace(TINY, seeds=5), "here")
    shipped = run_study_file(str(FILE))[0]
    for width in (1, 2):  # the networks with segments cannot be as small
        with pytest.raises(ConfigError, match=f"as much as the regular arm of {width} channels"):
            check_dial(dataclasses.replace(shipped, reference_width=width), "here")
    for bank in (BankSpec("both", 0), BankSpec("within", 91), BankSpec("within", 0, "rank")):
        with pytest.raises(ConfigError, match="bank"):
            check_dial(dataclasses.replace(TINY, rows=(Row(REGULAR, (bank,)),)), "here")
    tuning = dataclasses.replace(TINY.tuning, rates=(0.01 * 2**0.5,))
    with pytest.raises(ConfigError, match=r"0\.0141421356"):  # cells.csv would have another rate
        check_dial(dataclasses.replace(TINY, tuning=tuning), "here")
    deep = Row(ARMS[-1], (BankSpec("across", 0),))
    with pytest.raises(ConfigError, match="no regular arm of depth 8"):
        check_dial(dataclasses.replace(TINY, rows=(*TINY.rows, deep)), "here")
    monkeypatch.setattr(sys, "argv", ["xception-jax", "study", "run", "studies/dial", "--workdir=x", "--retry"])
    with pytest.raises(UsageError, match="--retry does not work"):
        main()


def test_a_claim_without_a_test_is_refused_before_anything_is_trained(monkeypatch, tmp_path):
    """Its gate could never be passed."""
    text = FILE.read_text().replace("hypotheses={", "hypotheses={'Q1': 'It is mine.'} or {")
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.setattr(sys, "argv", ["xception-jax", "study", "run", str(tmp_path / "mine.py"), "--print"])
    with pytest.raises(ConfigError, match="belongs to the claims Q1"):
        main()
