"""Fine-tuning: trains a network with pretrained weights on your own images (docs/howto/finetune.md).

    xception-jax prepare image_folder --source ~/flowers --name flowers
    xception-jax train --config=finetune:head --workdir=runs/head --config.init.weights=keras/xception \\
        --config.data.name=flowers
    xception-jax train --config=finetune --workdir=runs/flowers --config.init.weights=runs/head \\
        --config.data.name=flowers

The network is that of the weights, and the classes are those of the dataset. Weights of Inception V3 need another
`optimizer.frozen` (see the guide). The splits are train, validation (watched while training) and test (evaluated once,
at the end). The variants:

    head            trains only the classifier, on features that are computed once; for a machine without a GPU
    (none)          freezes blocks 1 to 4; the classifier has ten times the learning rate of the other layers
    fashion_mnist   the same for weights of configs/fashion_mnist.py and the images included in this package

The recipe for photographs was not tuned. The learning rate of `fashion_mnist` is the best of three on a development
split.

Expected: unknown for photographs. `fashion_mnist` reaches 0.874 with 100 images and 100 steps, and 0.869 from scratch
(docs/notebook/2026-11-26-finetuning.md). Cost: `head` needs one forward pass for each image, and then seconds; the
others less than training all layers, because the backward pass ends at block 5.
"""

from xception_jax.config import default_config
from xception_jax.errors import ConfigError

VARIANTS = ("", "head", "fashion_mnist")


def get_config(variant=""):
    if variant not in VARIANTS:
        fix = f"choose {' or '.join(VARIANTS[1:])}"
        raise ConfigError(f"there is no variant {variant!r}", "the config, after its colon", fix)
    config = default_config()
    config.name = "fine-tuning"
    config.init.weights = "weights.safetensors"  # any file that `convert` can read, or the work directory of a run
    config.optimizer.frozen = "^block[1-4]_"
    config.optimizer.multipliers = (("^head/", 10.0),)
    config.optimizer.weight_decay = 1e-5
    config.data.name = "flowers"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.test_split = "test"
    config.batch_size = 64
    config.duration = "20 epochs"
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.005
    config.schedule.warmup = "1 epoch"
    config.ema.decay = 0.99
    config.log_every = "10 steps"
    config.evaluation.batch_size = 64
    config.evaluation.heat_maps = 24
    if variant == "head":
        config.name = "fine-tuning of the classifier"
        config.optimizer.name = "adam"
        config.optimizer.frozen = "^(?!head/)"
        config.optimizer.multipliers = ()
        config.data.augmentation = "none"
        config.data.cache_features = True
        config.duration = "50 epochs"
        config.schedule.learning_rate = 0.001
        config.evaluation.every = "5 epochs"
        config.checkpoint.every = "25 epochs"  # saving the whole network takes longer than an epoch
    if variant == "fashion_mnist":
        config.model.dropout_rate = 0.0
        config.model.batch_norm.momentum = 0.9
        config.data.name = "fashion_mnist_subset"
        config.data.train_split = "train[:98%]"
        config.data.eval_split = "train[98%:]"
        config.data.image_size = 32
        config.data.augmentation = "shift"
        config.data.eval_crop = 1.0
        config.data.shift_pixels = 1
        config.data.threads = 1  # more threads do not pay off for such small images
        config.data.cache = True
        config.duration = "5 epochs"
        config.schedule.learning_rate = 0.03
        config.evaluation.batch_size = 512
    return config
