"""Weight files of networks that this package does not have, with kernels of a stated kind."""

from __future__ import annotations

import h5py
import numpy as np
from safetensors.numpy import save_file


def random(rng, shape):
    """A kernel [kh, kw, c, f] of Gaussian numbers."""
    return rng.normal(size=shape)


def within(rng, shape):
    """A kernel with one spatial pattern for each filter."""
    kh, kw, c, f = shape
    return np.einsum("ijf,cf->ijcf", rng.normal(size=(kh, kw, f)), rng.normal(size=(c, f)))


def across(rng, shape):
    """A kernel with one spatial pattern for each channel."""
    kh, kw, c, f = shape
    return np.einsum("ijc,cf->ijcf", rng.normal(size=(kh, kw, c)), rng.normal(size=(c, f)))


# Layers of a bottleneck network by their names in torchvision: [kh, kw, c, f].
BOTTLENECK = {
    "conv1": (7, 7, 3, 8),
    "layer1.0.conv1": (1, 1, 8, 6),
    "layer1.0.conv2": (3, 3, 6, 6),
    "layer1.0.conv3": (1, 1, 6, 12),
    "layer2.0.conv1": (1, 1, 12, 8),
    "layer2.0.conv2": (3, 3, 2, 8),  # four groups
    "layer2.0.conv3": (1, 1, 8, 16),
    "layer3.0.conv1": (3, 3, 1, 16),  # depthwise
    "layer3.0.conv2": (1, 7, 16, 12),
    "layer3.0.conv3": (7, 1, 12, 12),
}
REGULAR = ["conv1", "layer1.0.conv2", "layer3.0.conv2", "layer3.0.conv3"]


def torch_file(path, make=random, layers=BOTTLENECK, dtype=np.float32, extra=None):
    """Writes a safetensors file as torchvision's state_dict: [out, in, kh, kw]. Returns the kernels [kh, kw, c, f]."""
    rng = np.random.default_rng(3)
    kernels = {f"{name}.weight": make(rng, shape).astype(dtype) for name, shape in layers.items()}
    tensors = {name: np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)) for name, kernel in kernels.items()}
    tensors |= {name.replace("conv", "bn"): np.ones(kernel.shape[3], dtype) for name, kernel in kernels.items()}
    tensors |= {"fc.weight": np.ones((10, 16), dtype), "bn1.num_batches_tracked": np.zeros((), np.int64)}
    save_file(tensors | (extra or {}), path, {"format": "pt"})
    return kernels


def flax_file(path, make=random, layers=BOTTLENECK):
    """Writes a safetensors file with names and axes of Flax."""
    rng = np.random.default_rng(3)
    kernels = {f"params/{name.replace('.', '_')}/kernel": make(rng, shape) for name, shape in layers.items()}
    save_file({name: kernel.astype(np.float32) for name, kernel in kernels.items()}, path)
    return kernels


def keras_file(path, make=random):
    """Writes a legacy .h5 of Keras with two convolutions, a depthwise one and a separable one."""
    rng = np.random.default_rng(3)
    layers = {
        "block1_conv1": {"kernel:0": make(rng, (3, 3, 3, 8)), "bias:0": np.zeros(8)},
        "block1_conv2": {"kernel:0": make(rng, (3, 3, 8, 8)), "bias:0": np.zeros(8)},
        "depthwise_conv2d": {"depthwise_kernel:0": rng.normal(size=(3, 3, 8, 2))},
        "separable": {
            "depthwise_kernel:0": rng.normal(size=(3, 3, 8, 1)),
            "pointwise_kernel:0": rng.normal(size=(1, 1, 8, 4)),
        },
    }
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [name.encode() for name in layers]
        for name, weights in layers.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{each}".encode() for each in weights]
            for each, value in weights.items():
                group.create_dataset(f"{name}/{each}", data=value.astype(np.float32))
    return layers
