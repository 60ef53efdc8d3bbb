"""True and random labels, and kernels that are replaced by kernels of low rank."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from configs.studies.kernels import get_study
from tests.study.kernel_files import across, within
from tests.study.simulated import small_study
from tests.study.test_kernel_files import run
from xception_jax.config import override
from xception_jax.errors import BadDataError, ConfigError, UsageError
from xception_jax.logs.metrics_log import MetricsLog, read_metrics
from xception_jax.study.cells import choose_trials, search_cells
from xception_jax.study.checks import check_study
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Arm, Search
from xception_jax.study.kernels import RANDOM_LABELS, TRUE_LABELS
from xception_jax.study.kernels.claims import judge_labels
from xception_jax.study.kernels.measure import Spread
from xception_jax.study.kernels.networks import KernelReport, LayerSeparability, analyse
from xception_jax.study.kernels.replacement import Replacement, Replacements, format_replacements, low_rank
from xception_jax.study.separability import dial
from xception_jax.study.store import StoredStudy, write_study
from xception_jax.study.study_file import as_study, study_from_json, study_to_json

RNG = np.random.default_rng(0)
COST = ArmCost(0.2, 700_000, 700_000, 3_000_000, 3_000_000, 1.0)


@pytest.mark.parametrize("size", ["smoke", "cpu", "cifar"])
def test_the_arms_differ_only_in_their_labels(size):
    study = as_study(get_study(size), "kernels")
    true, random = (study.arm_config(study.arm(name)) for name in (TRUE_LABELS, RANDOM_LABELS))
    assert random == override(true, {"data.random_labels": 0})
    assert random != true
    assert study.arm(RANDOM_LABELS).tuned_as == (TRUE_LABELS,)
    assert study_from_json(json.loads(json.dumps(study_to_json(study)))) == study
    if size == "cpu":  # no other images
        assert [arm.name for arm in study.arms] == [TRUE_LABELS, RANDOM_LABELS]
        return
    others = study.arm_config(study.arm("regular"))
    assert true.data.eval_split == others.data.eval_split
    if size == "smoke":
        assert true.duration == others.duration
        return
    seen = [int(true.duration.split()[0]) * int(true.data.train_split[7:-1]), int(others.duration.split()[0]) * 45_000]
    assert seen[0] == pytest.approx(seen[1], rel=0.02)


def test_the_largest_size_has_no_arms_with_few_images():
    assert RANDOM_LABELS not in [arm.name for arm in get_study("imagenet").arms]


def labels_study(root, train_accuracy=0.99, seeds=(0, 1, 2, 3)):
    """Returns a stored study of the two arms whose cells are done, as their files say."""
    arms = (Arm(TRUE_LABELS, {}), Arm(RANDOM_LABELS, {"data.random_labels": 0}, tuned_as=(TRUE_LABELS,)))
    study = small_study(arms=arms, seeds=seeds, reference=TRUE_LABELS, comparisons=(), interactions=(), axis="")
    stored = StoredStudy(root, study, dict.fromkeys((TRUE_LABELS, RANDOM_LABELS), COST), ())
    for cell in stored.cells():
        cell.prepare()
        log = MetricsLog(cell.directory / "metrics.jsonl")
        log.write(860, "train", {"top1": train_accuracy})
        log.close()
        cell.write_record(exit_code=0)
    return stored


def kernels_of(stored, position):
    """Returns a report in which `position(arm, layer)` is the mean position within filters."""
    layers = [
        LayerSeparability(
            cell.name, layer, (3, 3, 8, 8), 0.3, Spread(0.3, 0.2, 0.4), (0.5,) * 9, (0.5,) * 9,
            0.5 * (position(cell.arm, layer) + RNG.normal(0, 0.01)), 0.5, Spread(0.5, 0.4, 0.6), Spread(0.5, 0.4, 0.6),
        )
        for cell in stored.cells()
        for layer in ("block1_conv1", "block1_conv2", "block2_sepconv1/spatial", "block3_sepconv1/spatial")
    ]  # fmt: skip
    return KernelReport(tuple(layers), {}, {})


def as_images(arm, layer):
    """The first layers follow the images, and the later ones the labels."""
    return 0.6 if layer.startswith("block1") else 0.7 if arm == TRUE_LABELS else 1.0


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (as_images, {"K5": "supported", "K6": "supported"}),
        (lambda arm, layer: 0.8 if arm == TRUE_LABELS else 1.0, {"K5": "contradicted", "K6": "supported"}),
        (lambda arm, layer: 1.0 if arm == TRUE_LABELS else 0.8, {"K5": "contradicted", "K6": "contradicted"}),
        (lambda arm, layer: 0.8, {"K5": "supported", "K6": "contradicted"}),
        (lambda arm, layer: 0.99, {"K5": "contradicted"}),  # both are as they started
    ],
)
def test_claims_about_labels(tmp_path, position, expected):
    stored = labels_study(tmp_path)
    verdicts = judge_labels(stored, kernels_of(stored, position))
    assert {tested.code: tested.verdict for tested in verdicts.claims if tested.code in expected} == expected


def test_a_cell_without_a_network_is_missing(tmp_path):
    """As one that was reused from another study."""
    stored = labels_study(tmp_path)
    report = kernels_of(stored, as_images)
    left = tuple(layer for layer in report.layers if not layer.network.startswith(TRUE_LABELS))
    verdicts = judge_labels(stored, dataclasses.replace(report, layers=left))
    assert {tested.verdict for tested in verdicts.claims} == {"not tested"}


def test_what_was_measured_needs_no_checkpoint(tmp_path):
    """As in the published studies, and on another machine than the one that trained some of the cells."""
    stored = labels_study(tmp_path)
    write_study(stored)
    report = kernels_of(stored, as_images)
    for cell in stored.cells():
        own = tuple(layer for layer in report.layers if layer.network == cell.name)
        kept = KernelReport(own, {cell.name: {"1 x 1": ("block2_sepconv1/pointwise",)}}, {})
        (cell.directory / "kernels.json").write_text(json.dumps(kept.to_json()))
    found = analyse(tmp_path)
    assert found.layers == report.layers
    assert set(found.left_out) == {cell.name for cell in stored.cells()}
    (stored.cells()[0].directory / "kernels.json").write_text(
        '{"layers": [{"network": 1}], "left_out": {}, "axes": {}}'
    )
    with pytest.raises(BadDataError, match="record of kernels cannot be read: there is no 'layer'"):
        analyse(tmp_path)


@pytest.mark.parametrize("broken", ["not learned", "not done"])
def test_labels_that_were_not_learned_say_nothing(tmp_path, broken):
    stored = labels_study(tmp_path, train_accuracy=0.7 if broken == "not learned" else 0.99)
    if broken == "not done":
        stored.cells()[3].write_record(exit_code=70)
    verdicts = judge_labels(stored, kernels_of(stored, as_images))
    assert {tested.verdict for tested in verdicts.claims} == {"not tested"}
    json.dumps(verdicts.to_json(), allow_nan=False)


def test_a_study_without_these_arms_has_no_claims(tmp_path):
    stored = StoredStudy(tmp_path, small_study(), {}, ())
    assert judge_labels(stored, KernelReport((), {}, {})) is None


def test_an_arm_takes_the_trial_of_its_twin(tmp_path):
    stored = labels_study(tmp_path)
    study = dataclasses.replace(stored.study, search=Search())
    study = dataclasses.replace(study, search=dataclasses.replace(study.search, trials=study.trials))
    cells = search_cells(study, stored.costs, tmp_path)
    assert {cell.arm for cell in cells} == {TRUE_LABELS}
    assert choose_trials(study, cells) == {}
    for cell in cells[:3]:
        cell.prepare()
        log = MetricsLog(cell.directory / "metrics.jsonl")
        log.write(860, "dev", {"ema_top1": 0.5 + 0.1 * (cell.trial == 1)})
        log.close()
        cell.write_record(exit_code=0)
    chosen = choose_trials(study, cells)
    assert chosen[RANDOM_LABELS] == chosen[TRUE_LABELS] == dict(study.trials[1])


def test_an_arm_is_tuned_as_arms_of_the_study():
    arms = (Arm(TRUE_LABELS, {}), Arm(RANDOM_LABELS, {}, tuned_as=("nobody",)))
    study = small_study(arms=arms, reference=TRUE_LABELS, comparisons=(), interactions=(), axis="")
    with pytest.raises(ConfigError, match="no arm 'nobody'"):
        check_study(study, "here")


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 7, 4, 6)])
@pytest.mark.parametrize(("family", "make"), [("within", within), ("across", across)])
def test_a_separable_kernel_is_its_own_replacement(shape, family, make):
    kernel = make(RNG, shape)
    np.testing.assert_allclose(low_rank(kernel, family, 1), kernel, atol=1e-12)
    free = RNG.normal(size=shape)
    for rank in (1, 2, 3):
        replaced = low_rank(free, family, rank)
        assert dial(replaced, family) < 1e-12 if rank == 1 else dial(replaced, family) > 1e-3
        assert low_rank(replaced, family, rank) == pytest.approx(replaced)
    lost = np.square(free - low_rank(free, family, 1)).sum() / np.square(free).sum()
    assert lost == pytest.approx(dial(free, family))  # the best one


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the work directory of a run of regular convolutions."""
    from xception_jax.training.train import train

    study = as_study(get_study("smoke"), "kernels")
    root = tmp_path_factory.mktemp("run")
    fields = {"data.data_dir": str(root / "datasets"), "duration": "100 steps"}
    config = study.arm_config(study.arm("regular"), fields | {"ema.decay": 0.0})
    train(config, str(root / "workdir"))
    return root / "workdir"


@pytest.mark.slow
def test_what_is_lost_by_replacing_kernels(trained, monkeypatch, capsys):
    assert run(monkeypatch, trained, "--replace", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 200
    tested = [entry for entry in read_metrics(trained / "metrics.jsonl") if entry["split"] == "test"]
    assert found["accuracy"] == pytest.approx(tested[-1]["top1"])
    lost = {(each["layer"], each["family"], each["rank"]): each["lost"] for each in found["replacements"]}
    assert lost["all layers", "within", 1] > 0.1
    assert abs(lost["all layers", "across", 4]) <= lost["all layers", "across", 1]
    replacements = tuple(Replacement(**each) for each in found["replacements"])
    table = format_replacements(Replacements(**{**found, "replacements": replacements}))
    assert f"accuracy {found['accuracy']:.2%} on 200 images of test[:200]" in table
    assert f"{100 * lost['all layers', 'within', 1]:+.2f} (" in table.splitlines()[-2]
    with pytest.raises(UsageError, match="--axes is only for weight files"):
        run(monkeypatch, trained, "--axes", "hwio")


def test_options_that_do_not_apply(tmp_path, monkeypatch):
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"")
    for arguments, words in (
        ([file, "--replace"], "--replace needs a run"),
        ([tmp_path, "--replace"], "--replace needs a run"),
        ([tmp_path, "--replace", "--axes", "hwio"], "--axes does not work"),
        ([file, "--data_dir", tmp_path], "--data_dir is only for"),
        ([tmp_path, "--axes", "hwio"], "--axes is only for weight files"),
    ):
        with pytest.raises(UsageError, match=words):
            run(monkeypatch, *arguments)
