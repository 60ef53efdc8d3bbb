"""Explains images with a trained network, in batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from xception_jax.data.images import Limits, Preprocessing
from xception_jax.evaluation.loading import THUMBNAIL, load_batches
from xception_jax.explain.methods import FUNCTIONS, Explanation
from xception_jax.explain.options import BASELINES
from xception_jax.models import create_model
from xception_jax.weights import Network

Explainer = Callable[..., Explanation]
"""A jitted function of (variables, preprocessed images, classes=...), where the classes have a default."""


@dataclasses.dataclass(frozen=True)
class Explained:
    """The explanation of one image file.

    Attributes:
      path: path of the image.
      error: why the image cannot be read, or ''. All other fields have their defaults then.
      label: the explained class.
      probability: probability of what is explained: of the class, or of its absence.
      heat: evidence for it at each position of the part of the image that the network sees.
      residual: for integrated gradients, the share of the change of the logit that the map misses.
      thumbnail: the image, uint8 RGB, if requested.
    """

    path: Path
    error: str = ""
    label: int = 0
    probability: float = 0.0
    heat: Float32[np.ndarray, "h w"] = dataclasses.field(default_factory=lambda: np.zeros((1, 1), np.float32))
    residual: float = 0.0
    thumbnail: np.ndarray | None = None


def make_explainer(
    network: Network,
    method: str,
    label: int | None = None,
    *,
    block: str | None = None,
    steps: int | None = None,
    baseline: str | None = None,
    batch_size: int = 1,
) -> Explainer:
    """Returns a method with all of its arguments but the variables and the preprocessed images.

    Args:
      network: a network with a classifier; only its description is used.
      method: name of a method, which determines the options that are used.
      label: the class to explain; None is the most probable class of each image.
      block: name of an endpoint, for Grad-CAM and HiResCAM.
      steps: points on the path of integrated gradients.
      baseline: name of the image where that path starts.
      batch_size: number of images that the network sees at once.
    """
    options: dict[str, Any] = {"endpoint": block}
    if method == "integrated_gradients":
        options = {"steps": steps, "batch_size": batch_size, "baseline": uniform_image(network.preprocessing, baseline)}
    given = {name: value for name, value in options.items() if value is not None}
    if network.has_single_logit and label is not None:
        label = 0 if label else ~0  # the first of its two classes is the absence of the second
    return jax.jit(functools.partial(FUNCTIONS[method], create_model(network.model), classes=label, **given))


def uniform_image(view: Preprocessing, name: str | None) -> Float32[np.ndarray, "1 s s 3"]:
    """Returns an image of `BASELINES` (by default the first), preprocessed; as one pixel if all pixels are the same."""
    level = BASELINES[name or next(iter(BASELINES))]
    pixel = ((level - np.asarray(view.mean)) / np.asarray(view.std)).astype(np.float32).reshape(1, 1, 1, 3)
    if view.turn is None:
        return pixel
    image = np.tile(pixel, (1, view.size, view.size, 1))
    view.turn(image[0])
    return image


def explain_files(
    network: Network,
    explainer: Explainer,
    paths: Sequence[Path],
    *,
    batch_size: int,
    thumbnails: int = 0,
    longest: int = THUMBNAIL,
    limits: Limits | None = None,
) -> Iterator[Explained]:
    """Explains image files. The next batch is decoded while the devices compute.

    Args:
      network: a network with a classifier.
      explainer: from `make_explainer`.
      paths: paths of the images.
      batch_size: images per batch.
      thumbnails: number of images, from the first, whose explanation includes a thumbnail.
      longest: longer side of a thumbnail, in pixels.
      limits: see `load_batches`.

    Yields:
      An explanation for each path, in the same order.
    """
    variables = jax.device_put(network.variables)
    options: dict[str, Any] = {"thumbnails": thumbnails, "longest": longest, "limits": limits}
    for batch in load_batches(paths, network.preprocessing, batch_size, **options):
        explanation = jax.device_get(explainer(variables, batch.pixels))
        chances = explained_probabilities(network, explanation)
        # The sign of a single logit decides between two classes, of which it is the second.
        labels = explanation.signs > 0 if network.has_single_logit else explanation.classes
        for row, path in enumerate(batch.paths):
            if batch.errors[row]:
                yield Explained(path, batch.errors[row])
                continue
            heat = explanation.maps[row].astype(np.float32)
            residual = 0.0
            if explanation.residuals is not None:
                change = heat.sum() - explanation.residuals[row]
                residual = float(abs(explanation.residuals[row]) / max(abs(change), 1e-6))
            yield Explained(
                path,
                label=int(labels[row]),
                probability=float(chances[row]),
                heat=heat,
                residual=residual,
                thumbnail=batch.thumbnails[row],
            )


def explained_probabilities(network: Network, explanation: Explanation) -> Float32[np.ndarray, " b"]:
    """Returns the probability of what each map explains."""
    activation = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}[network.probabilities]
    rows = np.arange(len(explanation.logits))
    chosen = np.asarray(activation(explanation.logits))[rows, explanation.classes]
    return np.where(explanation.signs < 0, 1 - chosen, chosen)
