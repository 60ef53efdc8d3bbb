"""Checks that maps depend on the weights of a network (Adebayo et al. 2018, arXiv 1810.03292).

The network is randomized from the classifier down, one block after the other, and the maps are compared with those of
the trained network. A method whose maps stay similar shows edges of the image, not what the network has learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from jaxtyping import Float, Float32
from scipy.stats import rankdata

from xception_jax.explain.explainer import Explainer
from xception_jax.models import create_model
from xception_jax.models.trace import trace_layers
from xception_jax.weights import Network

VERDICTS = (
    (0.7, "The maps hardly depend on what the network has learned. Do not use them to explain it."),
    (0.3, "The maps depend only partly on the weights; the rest reflects the structure of the images."),
    (-math.inf, "The maps depend on what the network has learned, as they should."),
)
"""Lower bounds of the absolute rank correlation under a network that is random throughout, with their meaning."""


class Row(NamedTuple):
    """How similar the maps of a network are that is random from its classifier down to a block.

    Attributes:
      block: the block.
      correlation: mean rank correlation with the maps of the trained network.
    """

    block: str
    correlation: float


def cascade(network: Network, explainer: Explainer, images: Float32[np.ndarray, "b s s 3"]) -> Iterator[Row]:
    """Compares the maps of the trained network with those of networks with more and more random blocks.

    Args:
      network: the trained network.
      explainer: from `make_explainer`.
      images: preprocessed images.
    """
    trained = jax.device_get(explainer(network.variables, images))
    model = create_model(network.model)
    # All maps explain what was explained for the trained network.
    classes = np.where(trained.signs < 0, ~trained.classes, trained.classes)
    for block, variables in randomize(model, network.variables, network.preprocessing.size):
        maps = explainer(variables, images, classes=classes).maps
        correlations = rank_correlations(trained.maps, np.asarray(maps))
        defined = correlations[np.isfinite(correlations)]
        yield Row(block, float(defined.mean()) if len(defined) else math.nan)


def randomize(
    model: nn.Module, variables: Mapping[str, Any], image_size: int, seed: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (block, variables) with more and more random blocks, from the classifier down to the first.

    The values of each tensor are shuffled, which keeps their distribution and therefore the scale of the activations.

    Args:
      model: the network.
      variables: its variables.
      image_size: side of its images, in pixels.
      seed: seed of the permutations.
    """
    rng = np.random.default_rng(seed)
    leaves = flax.traverse_util.flatten_dict(dict(variables))
    blocks: dict[str, None] = {}  # an ordered set

    def visit(layer: nn.Module, images: Any, output: Any) -> None:
        if layer.path:
            blocks[_block(layer.path[0])] = None

    trace_layers(model, image_size, visit)
    for block in reversed(blocks):
        for path, leaf in leaves.items():
            if _block(path[1]) == block:  # the first key is 'params' or 'batch_stats'
                leaves[path] = rng.permutation(np.ravel(leaf)).reshape(leaf.shape)
        yield block, flax.traverse_util.unflatten_dict(leaves)


def _block(layer: str) -> str:
    return layer.partition("_")[0]


def rank_correlations(maps: Float[np.ndarray, "b h w"], others: Float[np.ndarray, "b h w"]) -> Float[np.ndarray, " b"]:
    """Returns Spearman's rank correlation of each pair of maps; NaN if one of them is constant or not finite."""
    values = []
    for a, b in zip(maps, others, strict=True):
        if not (np.isfinite(a).all() and np.isfinite(b).all()) or np.ptp(a) == 0 or np.ptp(b) == 0:
            values.append(np.nan)
        else:
            values.append(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
    return np.asarray(values)


def verdict(correlation: float) -> str:
    """Returns what the mean rank correlation under the random network means."""
    if math.isnan(correlation):
        return "The maps of the random network are constant, so that there is no correlation to judge."
    return next(text for bound, text in VERDICTS if abs(correlation) >= bound)


def as_text(rows: Sequence[Row], title: str, count: int) -> str:
    """Formats the comparison as a table.

    Args:
      rows: the comparison, from the classifier down.
      title: name of the method.
      count: number of images.
    """
    lines = [f"{title}, {count} images", "random from the classifier to   rank correlation with the trained network"]
    return "\n".join(lines + [f"{row.block:<32}{row.correlation:+.2f}" for row in rows])
