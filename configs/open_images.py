"""Open Images, a public substitute for JFT: multi-label, RMSprop, MAP@100 (sections 4.1 to 4.3, table 2).

    xception-jax train --config=open_images --workdir=/data/open_images
    xception-jax train --config=open_images:fc --workdir=/data/open_images_fc

Expected: there is no published result. On JFT, which is private, the paper reports MAP@100 6.70 for Xception (6.78 with
the fully connected layers of the variant `fc`) and 6.36 (6.50) for Inception V3. Cost: 50 GFLOP per training image.
Requires open_images_v4 of TFDS in any size: `xception-jax prepare tfrecord --source DIR` copies it.
"""

from xception_jax.config import default_config
from xception_jax.errors import ConfigError

VARIANTS = ("", "fc")


def get_config(variant=""):
    if variant not in VARIANTS:
        fix = f"choose {' or '.join(VARIANTS[1:])}"
        raise ConfigError(f"there is no variant {variant!r}", "the config, after its colon", fix)
    config = default_config()
    config.name = "xception on Open Images" + (", fully connected layers" if variant == "fc" else "")
    config.model.num_classes = 7186
    config.model.dropout_rate = 0.0  # paper: none on JFT
    config.model.fc_layers = 2 if variant == "fc" else 0
    config.model.dtype = "bfloat16"
    config.model.batch_norm.statistics = "device"
    config.data.name = "open_images_v4"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.test_split = "test"
    config.duration = "30 epochs"
    config.loss.name = "sigmoid"  # inferred: the paper does not specify the loss
    config.loss.label_smoothing = 0.0
    config.optimizer.name = "rmsprop"
    config.schedule.learning_rate = 0.001
    config.schedule.decay_rate = 0.9
    # Paper: "samples". Taken literally, the rate decays fast; see docs/explanation/paper.md.
    config.schedule.decay_every = "3e6 examples"
    return config
