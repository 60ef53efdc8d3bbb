"""Fine-tuning: trains a network with pretrained weights on your own dataset (docs/finetuning.md).

    xception-jax prepare image_folder --source ~/flowers --name flowers
    xception-jax train --config=finetune --workdir=runs/flowers --config.init.weights=xception.safetensors \\
        --config.data.name=flowers --config.model.num_classes=5
    xception-jax train --config=finetune:fashion_mnist --workdir=runs/small --config.init.weights=FILE

Blocks 1 to 4 are frozen. The classifier is new and has ten times the learning rate of the other layers. The recipe for
photographs was not tuned. The variant `fashion_mnist` is for the small network of configs/fashion_mnist.py and the
images included in this package; its learning rate is the best of three on a development split.

Expected: unknown for photographs. The variant reaches 0.874 with 100 images and 100 steps, and 0.869 from scratch
(docs/finetuning.md). Cost: less than training all layers, because the backward pass ends at block 5.
"""

from xception_jax.config import default_config


def get_config(variant=""):
    config = default_config()
    config.name = "fine-tuning"
    config.init.weights = "weights.safetensors"  # any file that `convert` can read
    config.optimizer.frozen = "^block[1-4]_"
    config.optimizer.multipliers = (("^head/", 10.0),)
    config.optimizer.weight_decay = 1e-5
    config.data.name = "flowers"
    config.data.train_split = "train"
    config.data.eval_split = ""
    config.batch_size = 64
    config.duration = "20 epochs"
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.005
    config.schedule.warmup = "1 epoch"
    config.ema.decay = 0.99
    config.log_every = "10 steps"
    config.evaluation.batch_size = 64
    if variant == "fashion_mnist":
        config.model.num_classes = 10
        config.model.width_multiplier = 0.25
        config.model.middle_blocks = 2
        config.model.dropout_rate = 0.0
        config.model.batch_norm.momentum = 0.9
        config.data.name = "fashion_mnist_subset"
        config.data.train_split = "train[:98%]"
        config.data.eval_split = "train[98%:]"
        config.data.test_split = "test"
        config.data.image_size = 32
        config.data.augmentation = "shift"
        config.data.eval_crop = 1.0
        config.data.shift_pixels = 1
        config.data.threads = 1  # more threads do not pay off for such small images
        config.data.cache = True
        config.duration = "5 epochs"
        config.schedule.learning_rate = 0.03
        config.evaluation.batch_size = 500
    return config
