"""Turns a network into one function from images to logits, with BatchNorm folded into the convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from xception_jax.config import InceptionV3Config
from xception_jax.export.fusion import Affine, fuse
from xception_jax.models import create_model
from xception_jax.models.layers import BatchNorm, Conv
from xception_jax.ops import cpu_kernels, lowerings
from xception_jax.ops.padding import explicit_padding
from xception_jax.weights.network import Network, Preprocessing

_Context = nn.module.InterceptorContext
Infer = Callable[[Shaped[Array, "b s s 3"]], Float[Array, "b num_classes"]]


def make_reference(network: Network) -> Infer:
    """Returns the network as `create_model` builds it, for comparison with an export."""
    model = create_model(network.model)
    return lambda images: jax.jit(model.apply)(network.variables, images)[0]


def in_float32(network: Network) -> Network:
    """Returns the network converted to float32 and without its auxiliary head."""
    model = network.model.replace(dtype="float32")
    if isinstance(model, InceptionV3Config):
        model = model.replace(aux_head=False)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), network.variables)
    variables = {kind: {k: v for k, v in tree.items() if not k.startswith("aux_")} for kind, tree in variables.items()}
    return dataclasses.replace(network, model=model, variables=variables)


def make_inference(network: Network, *, uint8: bool = False, native: bool = False) -> Infer:
    """Returns the function of images that an export contains.

    The factor of a BatchNorm that directly follows a convolution is folded into its kernel, and only a constant is
    added. Any other BatchNorm, such as after a ReLU or a concatenation, becomes a factor and a constant per channel.

    Args:
      network: the network.
      uint8: whether the function takes pixels from 0 to 255, which it scales itself, or preprocessed images.
      native: whether each convolution is lowered to one `conv_general_dilated`, for formats other than XLA's.
    """
    network = in_float32(network)
    model = create_model(network.model)
    params, affine = fold_batch_norm(model, network.variables, network.preprocessing.size)
    scale, shift = scaling(network.preprocessing)

    def replace(next_method: Callable, args: tuple, kwargs: dict[str, Any], context: _Context) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, BatchNorm):
            factor, constant = affine["/".join(layer.path)]
            return args[0] + constant if factor is None else args[0] * factor + constant
        if native and context.method_name == "__call__" and isinstance(layer, Conv):
            return _native_conv(layer, args[0])
        return next_method(*args, **kwargs)

    def infer(images: Array) -> Array:
        if uint8:
            images = images.astype(jnp.float32) * scale + shift
        with nn.intercept_methods(replace):
            return model.apply({"params": params}, images, train=False)[0]

    return infer


def compile_inference(network: Network) -> Infer:
    """Returns `make_inference(network)`, compiled for the devices of this process.

    On a CPU with our kernels, each convolution is fused with the operations around it (fusion.py).
    """
    if not cpu_kernels.folded_available():
        return jax.jit(make_inference(network))
    network = in_float32(network)
    model, size = create_model(network.model), network.preprocessing.size
    params, affine = fold_batch_norm(model, network.variables, size)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return fuse(lambda params, images: model.apply({"params": params}, images, train=False)[0], images, params, affine)


def fold_batch_norm(model: nn.Module, variables: dict[str, Any], image_size: int) -> tuple[dict[str, Any], Affine]:
    """Multiplies the factor of each BatchNorm into the convolution that precedes it.

    Computes in float64 and rounds once.

    Args:
      model: a network from `create_model`.
      variables: {'params', 'batch_stats'}.
      image_size: side of an image, in pixels.

    Returns:
      (parameters, rest). `rest` has (factor, constant) per channel for each BatchNorm, by its name. The factor is None
      if it was folded into a convolution.
    """
    params = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    statistics = flax.traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    affine = {}
    for norm, (epsilon, conv) in _batch_norms(model, variables, image_size).items():
        mean, var = (statistics[f"{norm}/{name}"].astype(np.float64) for name in ("mean", "var"))
        factor = params.get(f"{norm}/scale", np.ones(1)).astype(np.float64) / np.sqrt(var + epsilon)
        constant = params[f"{norm}/bias"] - mean * factor
        if conv is not None:
            for name in (f"{conv}/kernel", f"{conv}/bias"):  # the filters are their last axis
                if name in params:
                    params[name] = (params[name] * factor).astype(np.float32)
        affine[norm] = (None if conv is not None else factor.astype(np.float32), constant.astype(np.float32))
    return flax.traverse_util.unflatten_dict(params, sep="/"), affine


def _batch_norms(model: nn.Module, variables: dict[str, Any], image_size: int) -> dict[str, tuple[float, str | None]]:
    """Returns the epsilon of each BatchNorm, and the convolution that directly precedes it, if any."""
    outputs: list[tuple[object, str]] = []
    norms = {}

    def record(next_method: Callable, args: tuple, kwargs: dict[str, Any], context: _Context) -> Any:
        layer, output = context.module, next_method(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(layer, Conv):
            outputs.append((output, "/".join(layer.path)))
        if context.method_name == "__call__" and isinstance(layer, BatchNorm):
            conv = next((path for value, path in outputs if value is args[0]), None)
            norms["/".join(layer.path)] = (layer.epsilon, conv)
        return output

    def trace(images: Array) -> Any:
        with nn.intercept_methods(record):
            return model.apply(variables, images, train=False)

    jax.eval_shape(trace, jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32))
    return norms


def _native_conv(layer: Conv, x: Array) -> Array:
    kernel: Array = layer.get_variable("params", "kernel")
    pads = explicit_padding(layer.padding, x.shape[1:3], layer.kernel_size, layer.stride)
    y = lowerings.native(x, kernel, layer.segments, layer.stride, pads)
    return y + layer.get_variable("params", "bias") if layer.use_bias else y


def scaling(preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """Returns (factor, constant), [3] each, that turn pixels from 0 to 255 into the input of the network."""
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
