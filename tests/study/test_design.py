import dataclasses
import json
from pathlib import Path

import pytest

from tests.study.simulated import small_study
from xception_jax.config import default_config, override
from xception_jax.errors import ConfigError, InputMissingError
from xception_jax.study.claims import Claim, Part
from xception_jax.study.design import Arm, PlannedComparison, Search
from xception_jax.study.store import changes
from xception_jax.study.study_file import load_study, study_from_json, study_to_json

STUDIES = sorted(Path(__file__).parents[2].glob("configs/studies/*.py"))
STUDIES = [path for path in STUDIES if path.stem != "dial"]  # a study of another kind: tests/study/test_dial.py
SIZES = ("cpu", "cifar", "imagenet")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_file_states_everything_and_survives_storage(path, size):
    study = load_study(f"{path}:{size}")
    assert study.question.endswith("?")
    assert len(study.hypothesis) > 30
    assert study.comparisons or path.stem == "kernels"  # whose claims are about kernels, not accuracies
    assert len(study.seeds) >= 3
    stored = study_from_json(json.loads(json.dumps(study_to_json(study))))
    assert changes(stored, study) == changes(study, stored) == ([], [])
    assert study.config.data.test_split.partition("[")[0] != study.config.data.eval_split.partition("[")[0]
    assert f"xception-jax study run studies/{path.stem} " in path.read_text()


def test_spectrum_has_every_point_with_every_activation_and_seed():
    study = load_study(f"{STUDIES[0].parent}/spectrum.py")
    assert len(study.arms) * len(study.seeds) == 90
    assert study.control == "parameters"
    assert load_study(f"{STUDIES[0].parent}/spectrum.py:cpu,width").control == "width"


ARM = Arm("depthwise_elu", {"model.intermediate_activation": "elu"}, "elu")


def test_seeds_and_arms_may_be_added():
    study = small_study()
    more = dataclasses.replace(study, arms=(*study.arms, ARM), seeds=(*study.seeds, 9))
    assert changes(study, more) == (["arm depthwise_elu", "seed 9"], [])
    compared = dataclasses.replace(
        more, comparisons=(*study.comparisons, PlannedComparison("depthwise_elu", "depthwise_none", "worse"))
    )
    assert changes(study, compared)[1] == []


def other_config():
    return override(small_study().config, {"schedule.learning_rate": 0.3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"margin": 0.02}, "margin: 0.005 -> 0.02"),
        ({"hypothesis": "It falls."}, "hypothesis"),
        ({"control": "width"}, "control"),
        ({"seeds": (0, 1)}, "seed 2 was removed"),
        ({"config": other_config()}, "the base config"),
        ({"arms": (dataclasses.replace(small_study().arms[0], overrides={}), *small_study().arms[1:])}, "arm 1_none"),
        ({"comparisons": small_study().comparisons[1:]}, "comparison 1_relu"),
        (
            {"comparisons": (*small_study().comparisons, PlannedComparison("2_relu", "1_relu"))},
            "is new, but its arms are not",
        ),
        (
            {"interactions": (dataclasses.replace(small_study().interactions[0], expected="falls through zero"),)},
            "interaction relu - none was changed",
        ),
        ({"interactions": ()}, "interaction relu - none was removed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_changes_is_named(change, words):
    _, refused = changes(small_study(), dataclasses.replace(small_study(), **change))
    assert any(words in line for line in refused), refused


def test_a_study_with_tuples_of_all_kinds_is_read_back_equal():
    """Values of trials are compared and hashed, when a report looks for those at the edge of the search."""
    trials = ({"data.crop_area": (0.05, 1.0)}, {"data.crop_area": (0.5, 1.0)})
    claim = Claim("X", "It is so.", (Part("difference", (("1_relu", "1_none", 1.0),), "below", 0.1),))
    study = small_study(search=Search(trials), claims=(claim,), seeded=("data.turn_seed",))
    stored = study_from_json(json.loads(json.dumps(study_to_json(study))))
    assert stored == study
    assert len({trial["data.crop_area"] for trial in stored.trials}) == 2


GOOD = """
import dataclasses
from tests.study.simulated import small_study
from xception_jax.config import override
from xception_jax.study.design import Arm, Interaction, PlannedComparison, Search
from xception_jax.study.claims import Claim, Part
from xception_jax.study.gates import Gate
SEVERAL_LABELS = {"loss.name": "sigmoid", "loss.label_smoothing": 0.0}
TERMS = tuple((f"{point}_relu", f"{point}_none", 1.0) for point in (1, 2))
SLOPE = Claim("X", "It rises.", (Part("slope", TERMS, "above", 0.0, "slope"),))
def get_study(size="cpu"):
    study = small_study()
    return CHANGED
"""


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("dataclasses.replace(study, arms=study.arms * 2)", "two arms are called"),
        ("dataclasses.replace(study, reference='x')", "no arm 'x'"),
        ("dataclasses.replace(study, comparisons=(PlannedComparison('1_relu', 'nobody'),))", "no arm 'nobody'"),
        ("dataclasses.replace(study, comparisons=(PlannedComparison('1_relu', '1_none', 'great'),))", "'great'"),
        (
            "dataclasses.replace(study, interactions=(Interaction('x', study.interactions[0].pairs, 'wobbles'),))",
            "'wobbles'",
        ),
        ("dataclasses.replace(study, interactions=(Interaction('x', ()),))", "has 0 pairs"),
        ("dataclasses.replace(study, seeds=(1, 1))", "seeds repeat"),
        ("dataclasses.replace(study, seeds=())", "the seeds are missing"),
        ("dataclasses.replace(study, seeds=('1', '2'))", "the seeds are '1', '2'"),
        ("dataclasses.replace(study, comparisons=(PlannedComparison('1_relu', '1_relu'),))", "with itself"),
        ("dataclasses.replace(study, metric='ema_loss')", "do not measure 'ema_loss' as a share"),
        ("dataclasses.replace(study, metric='ema_top5', analysis='crossed')", "not of ema_top5"),
        (
            "dataclasses.replace(study, gate=1, metric='ema_map_at_k', config=override(study.config, SEVERAL_LABELS))",
            "of which no training accuracy is known",
        ),
        ("dataclasses.replace(study, axis='model.middle_blocks', claims=(SLOPE,))", "one place on the axis"),
        ("dataclasses.replace(study, metric='accuracy')", "do not measure 'accuracy'"),
        ("dataclasses.replace(study, config=override(study.config, {'ema.decay': 0.0}))", "do not measure 'ema_top1'"),
        ("dataclasses.replace(study, config=override(study.config, {'data.test_split': ''}))", "lacks a test split"),
        ("dataclasses.replace(study, axis='model.order')", "no place on an axis"),
        ("dataclasses.replace(study, search=Search(({'schedule.lr': 1},)))", "no field"),
        ("dataclasses.replace(study, search=Search(({'seed': 1},)))", "trials of the search set seed"),
        (
            "dataclasses.replace(study, search=Search(), arms=(*study.arms, Arm('a', {'optimizer.weight_decay': 0.})))",
            "a sets optimizer.weight_decay, which the search tries",
        ),
        ("dataclasses.replace(study, arms=(*study.arms, Arm('a', {}, tuned_as='1_none')))", "has tuned_as='1_none'"),
        ("dataclasses.replace(study, gates=(Gate('kronecker', 0.1),))", "data.turn='kronecker'"),
        ("dataclasses.replace(study, budget={1})", "value of the wrong type: TypeError"),
        ("dataclasses.replace(study, margin=0)", "the margin is 0"),
        ("dataclasses.replace(study, margin=float('inf'))", "the margin is inf"),
        ("dataclasses.replace(study, margin='half')", "value of the wrong type"),
        ("dataclasses.replace(study, tolerance=float('nan'))", "the tolerance is nan"),
        ("dataclasses.replace(study, seeds=5)", "value of the wrong type"),
        ("dataclasses.replace(study, comparisons=PlannedComparison('1_relu', '1_none'))", "value of the wrong type"),
        ("dataclasses.replace(study, arms=('1_none', '1_relu'))", "value of the wrong type"),
        ("dataclasses.replace(study, interactions=('x',))", "value of the wrong type"),
        (
            "dataclasses.replace(study, arms=(*study.arms, Arm('a', {'data.test_split': 'train'})))",
            "arms have different test splits: 'test' of fashion_mnist_subset and 'train' of fashion_mnist_subset",
        ),
        ("dataclasses.replace(study, control='luck')", "'luck'"),
        ("dataclasses.replace(study, unequal=('parameters',))", "unequal names 'parameters'"),
        ("dataclasses.replace(study, axis='')", "no axis"),
        ("dataclasses.replace(study, arms=(*study.arms, Arm('a/b', {})))", "'a/b'"),
        ("dataclasses.replace(study, arms=(*study.arms, Arm('a', {'seed': 3})))", "sets seed"),
        ("dataclasses.replace(study, arms=(*study.arms, Arm('a', {'model.width_multiplier': 3.0})))", "model.width"),
        ("dataclasses.replace(study, arms=(*study.arms, Arm('a', {'model.segment': 3})))", "no field"),
        ("dataclasses.replace(study, arms=(*study.arms, Arm('a', {'model.segments': -3})))", "segments is -3"),
        ("study.nothing", "AttributeError"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(tmp_path, changed, words):
    (tmp_path / "study.py").write_text(GOOD.replace("CHANGED", changed))
    with pytest.raises(ConfigError, match=words):
        load_study(f"{tmp_path}/study.py")


def test_a_study_file_that_is_missing_or_does_not_run(tmp_path):
    with pytest.raises(InputMissingError, match="there is no study"):
        load_study(f"{tmp_path}/study.py")
    (tmp_path / "study.py").write_text("def get_study():\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError") as error:
        load_study(f"{tmp_path}/study.py")
    assert error.value.where.endswith("study.py:2")
    with pytest.raises(ConfigError, match="no size 'huge'"):
        load_study(f"{STUDIES[0]}:huge")
    with pytest.raises(ConfigError, match="too many"):
        load_study(f"{STUDIES[0]}:cpu,width,3")


def test_an_arm_does_not_change_the_config_of_others():
    study = small_study()
    study.arm_config(study.arm("1_relu"), {"seed": 7})
    assert study.config.seed == default_config().seed
    assert study.arm_config(study.arm("1_none")).model.intermediate_activation == "none"
