"""Measures how separable the kernels of trained regular convolutions are.

A regular kernel [k, k, c, f] equals a depthwise separable convolution if it has rank one in one of two ways:

- Pointwise first (figure 4): each filter is one spatial pattern (a blueprint) times a weight for each input channel.
  BSConv (Haase and Amthor 2020, arXiv 2003.13549) measures the share of a filter's squared norm in its best blueprint.
  Here no mean is subtracted, so that one minus this share is the squared relative error of the replacement.
- Depthwise first: for each input channel, all filters share one spatial kernel. With r kernels per channel this is a
  sum of r depthwise separable convolutions, the decomposition of Network Decoupling (Guo et al. 2018, arXiv
  1808.05517), which is exact at r = k * k.

Both are singular value decompositions. Random kernels also have a first component, so they are the null hypothesis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from xception_jax.errors import InputMissingError
from xception_jax.models import create_model
from xception_jax.models.layers import Conv, glorot_uniform
from xception_jax.models.trace import trace_layers
from xception_jax.runs import open_network
from xception_jax.study.store import STUDY, read_study
from xception_jax.training.workdir import CONFIG

_DRAWS = 20  # random kernels for each kernel shape


@dataclasses.dataclass(frozen=True)
class LayerSeparability:
    """The separability of one regular convolution of one network.

    Attributes:
      network: the arm and seed in a study, or the name of the work directory or weight file.
      layer: path of the layer.
      shape: of its kernel, [k, k, c, f].
      first_component: mean over filters of the share of the squared norm in the best blueprint (pointwise first).
      null: the same for random kernels: their mean and the ends of their central 95 % range.
      rank_errors: relative error (Frobenius norm) of a sum of r depthwise separable convolutions, r = 1 to k * k.
      null_rank_errors: the mean of the same over random kernels.
    """

    network: str
    layer: str
    shape: tuple[int, ...]
    first_component: float
    null: tuple[float, float, float]
    rank_errors: tuple[float, ...]
    null_rank_errors: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data."""
        return dataclasses.asdict(self)


def first_component(kernel: Float[np.ndarray, "k k c f"]) -> Float[np.ndarray, " f"]:
    """Returns the share of each filter's squared norm in its best rank-one approximation, in [1/k², 1]."""
    k, _, c, f = kernel.shape
    values = np.linalg.svd(kernel.reshape(k * k, c, f).transpose(2, 0, 1), compute_uv=False)
    energy = np.square(values)
    total = energy.sum(1)
    return np.divide(energy[:, 0], total, out=np.full(f, np.nan), where=total > 0)


def rank_errors(kernel: Float[np.ndarray, "k k c f"]) -> Float[np.ndarray, " rank"]:
    """Returns the relative error of the best sum of 1, 2, ... k * k depthwise separable convolutions."""
    k, _, c, f = kernel.shape
    values = np.linalg.svd(kernel.reshape(k * k, c, f).transpose(1, 0, 2), compute_uv=False)
    energy = np.zeros(k * k)
    energy[: values.shape[1]] = np.square(values).sum(0)
    left = np.append(energy[::-1].cumsum()[::-1][1:], 0.0)
    return np.sqrt(left / energy.sum()) if energy.sum() > 0 else np.full(k * k, np.nan)


def regular_kernels(model: nn.Module, params: Mapping[str, Any], image_size: int) -> dict[str, np.ndarray]:
    """Returns the kernels of all regular convolutions with several input channels and a side above one, by path."""
    found: list[tuple[str, ...]] = []

    def visit(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(layer, Conv) and layer.segments == 1 and max(layer.kernel_size) > 1:
            found.append(layer.path)

    trace_layers(model, image_size, visit)
    kernels = {}
    for path in found:
        node: Any = params
        for name in path:
            node = node[name]
        kernel = np.asarray(node["kernel"], np.float64)
        if kernel.shape[2] > 1 and kernel.shape[0] == kernel.shape[1]:
            kernels["/".join(path)] = kernel
    return kernels


def analyse(source: Path) -> list[LayerSeparability]:
    """Analyses a trained network, or each finished network of a study.

    Args:
      source: a weight file, the work directory of a run or a study directory.

    Returns:
      The layers of each network in the order of its forward pass.

    Raises:
      InputMissingError: there is no network, no checkpoint or no regular convolution.
      BadDataError: a checkpoint or the weight file is damaged.
    """
    if (source / STUDY).exists():
        cells = [cell for cell in read_study(source).cells() if cell.state() == "done"]
        networks = {cell.name: cell.directory for cell in cells}
    elif source.is_dir() and not (source / CONFIG).exists():
        raise InputMissingError(
            "there is no run and no study", str(source), "name a directory with config.json or study.json"
        )
    else:
        networks = {source.name or str(source): source}
    layers = []
    nulls: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}
    for name, workdir in networks.items():
        network = open_network(str(workdir))
        model, size = create_model(network.model), network.preprocessing.size
        for layer, kernel in regular_kernels(model, network.variables["params"], size).items():
            if kernel.shape not in nulls:
                nulls[kernel.shape] = _null(kernel.shape)
            firsts, errors = nulls[kernel.shape]
            low, high = np.quantile(firsts, (0.025, 0.975))
            layers.append(
                LayerSeparability(
                    network=name,
                    layer=layer,
                    shape=kernel.shape,
                    first_component=float(np.nanmean(first_component(kernel))),
                    null=(float(firsts.mean()), float(low), float(high)),
                    rank_errors=tuple(rank_errors(kernel).tolist()),
                    null_rank_errors=tuple(errors.tolist()),
                )
            )
    if not layers:
        raise InputMissingError(
            "there is no trained network with regular convolutions of several channels",
            str(source),
            "train one with --config.model.segments=1, as studies/kernels does",
        )
    return layers


def _null(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (first components, mean rank errors) of random kernels drawn by the initializer."""
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    kernels = [np.asarray(glorot_uniform(key, shape, jnp.float32), np.float64) for key in keys]
    firsts = np.array([first_component(kernel).mean() for kernel in kernels])
    return firsts, np.mean([rank_errors(kernel) for kernel in kernels], axis=0)


def format_separability(layers: list[LayerSeparability]) -> str:
    """Returns a table of the layers: means over the networks of an arm, with standard deviations in brackets."""
    groups: dict[tuple[str, str], list[LayerSeparability]] = {}
    for layer in layers:
        groups.setdefault((layer.network.partition(" seed ")[0], layer.layer), []).append(layer)
    ranks = [rank for rank in (1, 2, 3, 4) if all(rank <= len(layer.rank_errors) for layer in layers)]
    width = max(len(layer) for _, layer in groups)
    head = f"{'layer':{width}} {'kernel':>16} {'n':>3} {'first component':>17} {'random':>7} "
    lines: list[str] = []
    network = ""
    for (name, path), entries in groups.items():
        if name != network:
            lines += [name, head + " ".join(f"{f'error, rank {rank}':>13}" for rank in ranks)]
            network = name
        firsts = [entry.first_component for entry in entries]
        spread = np.std(firsts, ddof=1) if len(firsts) > 1 else math.nan
        share = f"{np.mean(firsts):.1%}" + (f" ({spread:.1%})" if math.isfinite(spread) else "")
        errors = (
            f"{np.mean([e.rank_errors[r - 1] for e in entries]):.3f} ({entries[0].null_rank_errors[r - 1]:.3f})"
            for r in ranks
        )
        shape = "x".join(map(str, entries[0].shape))
        row = f"{path:{width}} {shape:>16} {len(entries):>3} {share:>17} {entries[0].null[0]:>7.1%} "
        lines.append(row + " ".join(f"{error:>13}" for error in errors))
    lines.append("first component: share of a filter's squared norm in its best blueprint (SD over networks)")
    lines.append("error, rank r: relative error of a sum of r depthwise separable convolutions (random kernels)")
    return "\n".join(lines)
