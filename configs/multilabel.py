"""Many labels an image, on shipped data: the path of section 4.1's JFT in minutes, on one CPU.

    python train.py --config=configs/multilabel.py --workdir=runs/multilabel

Images of 64 x 64 with one to four garments of Fashion-MNIST, labelled with the set of their classes; RMSprop, sigmoid
loss, MAP. Expected: MAP 0.9. Cost: some minutes on two cores.
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
    config.data.threads = 1  # for images this small, handing work over costs more than it
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
    config.evaluation.batch_size = 250
    return config
