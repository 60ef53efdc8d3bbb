"""Every config loads, resolves, and its step can be traced on abstract arrays, at its real size."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xception_jax.config import resolve
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import DROPOUT, make_state_init, seed_bits
from xception_jax.training.step import make_train_step

CONFIGS = Path(__file__).parent.parent / "configs"
VARIANTS = {
    "imagenet": ["xception", "inception_v3", "inception_v3_2016"],
    "open_images": ["", "fc"],
    "finetune": ["", "head", "fashion_mnist"],
}
PARAMETERS = {
    ("imagenet", "xception"): 22_855_952,
    ("imagenet", "inception_v3"): 23_817_352,
    ("imagenet", "inception_v3_2016"): 23_626_728,
    ("fashion_mnist", None): 722_576,
    ("multilabel", None): 189_349,
    ("open_images", ""): 35_531_066,
    ("open_images", "fc"): 75_422_010,
    ("finetune", ""): 22_855_952,
    ("finetune", "head"): 22_855_952,
    ("finetune", "fashion_mnist"): 22_855_952,  # before the weights are read
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases():
    for path in sorted(CONFIGS.glob("*.py")):
        for variant in VARIANTS.get(path.stem, [None]):
            marks = pytest.mark.slow if path.stem == "imagenet" else ()
            yield pytest.param(path.stem, variant, id=f"{path.stem}:{variant}" if variant else path.stem, marks=marks)


@pytest.mark.parametrize(("name", "variant"), list(cases()))
def test_config(name, variant):
    module = load(name)
    config = resolve(module.get_config() if variant is None else module.get_config(variant))
    model = create_model(config.model)
    cost = count_cost(model, config.data.image_size)
    assert cost.parameters == PARAMETERS[name, variant]

    schedule = make_schedule(config, num_examples=1_000_000)
    optimizer = make_optimizer(config.optimizer, schedule)
    init = make_state_init(model, optimizer, image_size=config.data.image_size, ema=config.ema.decay > 0)
    state = jax.eval_shape(init, seed_bits(0))
    several = config.loss.name == "sigmoid"
    labels = (config.batch_size, config.model.num_classes) if several else (config.batch_size,)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *(config.data.image_size,) * 2, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct(labels, jnp.float32 if several else jnp.int32),
    }
    devices = jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(devices):
        step = make_train_step(model, optimizer, schedule, config)
        after, metrics = jax.eval_shape(step, state, batch, seed_bits(0, DROPOUT))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_opens_with_command_result_and_cost(path):
    text = load(path.stem).__doc__
    assert f"xception-jax train --config={path.stem}" in text
    for word in ("Expected", "Cost"):
        assert word in text
