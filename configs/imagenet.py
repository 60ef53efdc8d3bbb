"""ImageNet: the paper's Xception, and Inception V3 under the same recipe (sections 4.1 and 4.2, table 1).

    python train.py --config=configs/imagenet.py --workdir=/data/xception
    python train.py --config=configs/imagenet.py:inception_v3 --workdir=/data/inception_v3

Expected (the paper, single crop): top-1 0.790, top-5 0.945; Inception V3 0.782 and 0.941. Not yet reproduced here.
Cost: 169 epochs of 1,255,544 images, 50 GFLOP for each: 3 days on 60 K80 in the paper. Needs
`python -m xception_jax prepare imagenet2012`. Variants: xception, inception_v3, inception_v3_2016 (table 3's graph).
"""

from xception_jax.config import default_config


def get_config(variant="xception"):
    config = default_config()  # which is this recipe; what follows is where the baseline differs
    config.name = f"{variant} on ImageNet"
    config.model.name = variant
    config.model.dtype = "bfloat16"  # modern: parameters, statistics and the classifier stay in float32
    config.model.batch_norm.statistics = "device"  # inferred: the paper's replicas each had their own
    if variant != "xception":
        config.optimizer.weight_decay = 4e-5  # paper: section 4.4
    return config
