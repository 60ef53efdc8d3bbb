"""ImageNet: trains the paper's Xception, or Inception V3 with the same recipe (sections 4.2 to 4.4, table 1).

    xception-jax train --config=imagenet --workdir=/data/xception
    xception-jax train --config=imagenet:inception_v3 --workdir=/data/inception_v3

Expected (the paper, single crop): top-1 0.790 and top-5 0.945; Inception V3 0.782 and 0.941. We have not completed this
run. Cost: 169 epochs of 1,255,544 images at 50 GFLOP per image, which took 3 days on 60 K80 GPUs in the paper. Requires
`xception-jax prepare imagenet2012`. Variants: xception, inception_v3, inception_v3_2016 (graph of table 3).
"""

from xception_jax.config import default_config


def get_config(variant="xception"):
    config = default_config()  # the defaults are the recipe of the paper
    config.name = f"{variant} on ImageNet"
    config.model.name = variant
    config.model.dtype = "bfloat16"  # modern: parameters, statistics and the classifier stay in float32
    config.model.batch_norm.statistics = "device"  # inferred: each replica of the paper had its own statistics
    if variant != "xception":
        config.optimizer.weight_decay = 4e-5  # paper: section 4.3
    return config
