"""Predicts the classes of images in batches."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xception_jax.data import folders, imagenet_classes, images
from xception_jax.errors import InputMissingError
from xception_jax.evaluation.loading import load_batches
from xception_jax.names import printable, printable_path

if TYPE_CHECKING:
    import jax
    from jaxtyping import Array, Float, Int

    from xception_jax.weights import Network


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction of a network for one image.

    Attributes:
      path: path of the image.
      classes: the most probable classes, best first. Empty if the image cannot be read.
      probabilities: probabilities of these classes.
      error: why the image cannot be read, or ''.
      thumbnail: the image, uint8 RGB, if requested.
    """

    path: Path
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""
    thumbnail: np.ndarray | None = None


def find_images(arguments: Sequence[str], but: Path | None = None) -> list[Path]:
    """Returns the files among the arguments, and the images in the folders among them, in alphabetical order.

    In folders, links are followed, hidden files are ignored, and the folder `but` is not entered. An argument that is a
    file may have any name.

    Raises:
      InputMissingError: a path does not exist, or a folder contains no image.
      StorageError: a folder cannot be read.
    """
    found: dict[Path, None] = {}  # an ordered set
    for argument in map(Path, arguments):
        if not os.path.exists(argument):  # unlike Path.exists, returns False for names that are too long
            raise InputMissingError("there is no such image or folder", str(argument), "correct the path")
        if not argument.is_dir():
            found[argument] = None
            continue
        files, others = [], Counter[str]()
        # A broken link or a pipe is named as an image that cannot be read.
        for path in folders.files(argument, but=but):
            if path.suffix.lower() in images.SUFFIXES:
                files.append(path)
            else:
                others[path.suffix.lower() or path.name] += 1
        if others:
            listed = ", ".join(f"{count:,} {printable(suffix)}" for suffix, count in others.most_common(5))
            print(f"left out of {printable_path(argument)}, because of their suffixes: {listed}", file=sys.stderr)
        if not files:
            suffixes = ", ".join(images.SUFFIXES)
            raise InputMissingError(
                "there is no image in the folder", str(argument), f"use images with the suffix {suffixes}"
            )
        found |= dict.fromkeys(files)
    return list(found)


def class_names(network: Network) -> list[str]:
    """Returns a name for each class. WordNet ids of ImageNet are replaced by words.

    If the weights do not name their 1,000 classes, ImageNet's order is assumed, as in Keras and timm. Other classes
    without a name are numbered.
    """
    words = imagenet_classes.class_words()
    names = network.classes
    if names is None and network.model.num_classes == len(words):
        print("the weights do not name their 1,000 classes; assuming those of ImageNet", file=sys.stderr)
        names = tuple(imagenet_classes.class_names())
    if names is None:
        return [f"class {number}" for number in range(network.num_classes)]
    return [words.get(name, name) for name in names]


def most_probable(
    network: Network, logits: Float[Array, "b n"], top: int
) -> tuple[Int[Array, "b top"], Float[Array, "b top"]]:
    """Returns the most probable classes and their probabilities; a single logit separates two classes.

    Classes are ranked by their logits, because several probabilities may be rounded to 1.
    """
    import jax
    import jax.numpy as jnp

    from xception_jax.metrics.single_label import two_class_logits

    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if not network.multi_label:
        logits = two_class_logits(logits)
    _, classes = jax.lax.top_k(logits, top)
    probabilities = jax.nn.sigmoid(logits) if network.multi_label else jax.nn.softmax(logits)
    return classes, jnp.take_along_axis(probabilities, classes, axis=-1)


def predict(
    network: Network,
    paths: Sequence[Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    thumbnails: int = 0,
    limits: images.Limits | None = None,
) -> Iterator[Prediction]:
    """Predicts the classes of images in batches. The next batch is loaded while the devices compute.

    All batches have the same size, so that only one program is compiled.

    Args:
      network: a network with a classifier.
      paths: paths of the images.
      top: number of classes per image.
      batch_size: images per batch.
      thumbnails: number of images, from the first, whose predictions include a thumbnail.
      limits: see `load_batches`.

    Yields:
      A prediction for each path, in the same order.
    """
    import jax  # only here, so that a wrong path is reported at once

    from xception_jax.models import create_model

    model = create_model(network.model)
    top = min(top, network.num_classes)

    @jax.jit
    def forward(variables: dict, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = model.apply(variables, pixels, train=False)
        return most_probable(network, logits, top)

    variables = jax.device_put(network.variables)
    for batch in load_batches(paths, network.preprocessing, batch_size, thumbnails=thumbnails, limits=limits):
        classes, shares = jax.device_get(forward(variables, batch.pixels))
        for row, path in enumerate(batch.paths):
            if batch.errors[row]:
                yield Prediction(path, error=batch.errors[row])
            else:
                best = tuple(map(int, classes[row])), tuple(map(float, shares[row]))
                yield Prediction(path, *best, thumbnail=batch.thumbnails[row])
