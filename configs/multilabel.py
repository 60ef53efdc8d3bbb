"""Multi-label classification, as for JFT in section 4.1, on data included in this package and on a CPU.

    xception-jax train --config=multilabel --workdir=runs/multilabel

Images of 64 x 64 pixels show one to four garments of Fashion-MNIST, and are labelled with the set of their classes.
Uses RMSprop, a sigmoid loss and MAP. Expected: MAP 0.9. Cost: a few minutes on two cores.
"""

from xception_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "small xception on Fashion-MNIST scenes"
    config.model.num_classes = 10
    config.model.width_multiplier = 0.125
    config.model.middle_blocks = 2
    config.model.stem = "small"
    config.model.dropout_rate = 0.0
    config.model.batch_norm.momentum = 0.9
    config.data.name = "fashion_mnist_scenes"
    config.data.train_split = "train[:95%]"
    config.data.eval_split = "train[95%:]"
    config.data.test_split = "test"
    config.data.image_size = 64
    config.data.augmentation = "shift"
    config.data.eval_crop = 1.0
    config.data.threads = 1  # more threads do not pay off for such small images
    config.data.cache = True
    config.batch_size = 64
    config.duration = "10 epochs"
    config.loss.name = "sigmoid"
    config.loss.label_smoothing = 0.0
    config.optimizer.name = "rmsprop"
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.02
    config.schedule.warmup = "1 epoch"
    config.ema.decay = 0.99
    config.log_every = "10 steps"
    config.evaluation.batch_size = 256
    config.evaluation.heat_maps = 24
    return config
