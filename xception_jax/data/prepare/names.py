"""Names the datasets that can be prepared. Importing this module does not import what prepares them."""

from __future__ import annotations

# Of images in this package, or in others.
SHIPPED_NAMES = ("fashion_mnist_subset", "fashion_mnist_scenes", "fashion_mnist_stacks", "photograph_crops")
VARIANT_NAMES = ("matched-frequency", "threshold-0.7", "topimages")  # of imagenet_v2
DATASET_NAMES = ("fashion_mnist", "imagenet2012", "imagenet_v2", *(f"imagenet_v2/{name}" for name in VARIANT_NAMES))
