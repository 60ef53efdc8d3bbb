"""First run: a small Xception on the 12,000 real images that are shipped with this package.

    make train
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Expected: test accuracy 0.90. Cost: a few minutes on two cores. Same network as the paper's at an eighth of its width
and with half of its middle flow; a stem that keeps 32 x 32. The recipe is a modern short one.
"""

from xception_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "small xception on Fashion-MNIST"
    config.model.num_classes = 10
    config.model.width_multiplier = 0.125
    config.model.middle_blocks = 2
    config.model.stem = "small"
    config.model.dropout_rate = 0.0
    config.model.batch_norm.momentum = 0.9  # running averages with 0.99 lag behind so short a run
    config.data.name = "fashion_mnist_subset"
    config.data.train_split = "train[:98%]"
    config.data.eval_split = "train[98%:]"
    config.data.test_split = "test"
    config.data.image_size = 28
    config.data.augmentation = "shift"
    config.data.eval_crop = 0.875  # the garment, without the frame that prepare puts around it
    config.data.threads = 2
    config.batch_size = 128
    config.duration = "10 epochs"
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.2
    config.schedule.warmup = "1 epoch"
    config.optimizer.weight_decay = 5e-4
    config.ema.decay = 0.99
    config.log_every = "10 steps"
    config.evaluation.batch_size = 500
    return config
