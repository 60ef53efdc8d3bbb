"""The Python API: what `import xception_jax` offers.

network = xception_jax.load("xception.safetensors")   # or the work directory of a run
network.predict("photo.jpg")                          # [('tabby', 0.62), ('tiger cat', 0.21), ...]
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8
from ml_collections import ConfigDict

from xception_jax.command_line import read_config
from xception_jax.config import ExperimentConfig
from xception_jax.data import images as files
from xception_jax.data.images import Preprocessing
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.evaluation.predict import class_names, most_probable
from xception_jax.models import create_model
from xception_jax.runs import open_network, require_classifier, without_classifier
from xception_jax.training.train import train as train_or_resume
from xception_jax.weights import Network

if TYPE_CHECKING:
    from xception_jax.training.summary import Summary

__all__ = ["LoadedNetwork", "load", "train"]

Image: TypeAlias = str | os.PathLike[str] | UInt8[np.ndarray, "h w 3"]

_BATCH = 32  # images of a long list that are predicted at once; a power of two


class LoadedNetwork:
    """A network with its weights, ready to use. `load` returns it.

    Attributes:
      network: the weights and what travels with them: `model`, `preprocessing`, `source`, `sha256`.
      has_classifier: whether the weights include a classifier; without one there are features, but no logits.
      module: the `flax.linen` module: `module.apply(variables, images, train=False)` gives `(logits, endpoints)`.
      variables: {'params', 'batch_stats'}, on the default device.
    """

    def __init__(self, network: Network):
        self.network = network
        self.has_classifier = "head" in network.variables["params"]
        whole = network if self.has_classifier else without_classifier(network)
        self.module: nn.Module = create_model(whole.model)
        self.variables: dict[str, Any] = jax.device_put(whole.variables)

    def __repr__(self) -> str:
        """Describes the network in three lines."""
        model, view = self.network.model, self.preprocessing
        count = sum(leaf.size for leaf in jax.tree.leaves(self.network.variables["params"]))
        outputs = f"{self.network.num_classes:,} classes" if self.has_classifier else "no classifier"
        lines = [
            f"{model.name}, {count:,} parameters, {outputs}",
            f"images: {view.size} x {view.size} pixels, central {view.crop:.1%} of each side, {view.interpolation}",
            f"weights: {self.network.source}",
        ]
        return "\n".join(lines)

    @property
    def preprocessing(self) -> Preprocessing:
        """How `preprocess` crops, resizes and scales an image."""
        return self.network.preprocessing

    @functools.cached_property
    def classes(self) -> list[str]:
        """A name for each class, in the order of the logits."""
        return class_names(self.network)

    @functools.cached_property
    def _apply(self) -> Callable[[Mapping[str, Any], Array | np.ndarray, str | None], Array]:
        @functools.partial(jax.jit, static_argnums=2)
        def apply(variables: Mapping[str, Any], images: Array | np.ndarray, endpoint: str | None) -> Array:
            logits, endpoints = self.module.apply(variables, images, train=False)
            if endpoint is None:
                return logits
            if endpoint not in endpoints:
                raise UsageError(f"there is no endpoint {endpoint!r}", "features", f"use one of {', '.join(endpoints)}")
            return endpoints[endpoint]

        return apply

    def _output(self, images: Float[Array | np.ndarray, "b h w 3"], endpoint: str | None = None) -> Array:
        """Returns the logits, or the activations at an endpoint; XLA does not keep those at other endpoints."""
        if not isinstance(images, Array | np.ndarray):
            raise UsageError(f"images are a {type(images).__name__}", "images", "pass what preprocess() returns")
        if not jnp.issubdtype(images.dtype, jnp.floating) or images.ndim != 4:
            what = f"images are {images.dtype} of shape {images.shape}, not float32 of shape (batch, height, width, 3)"
            raise UsageError(what, "images", "pass what preprocess() returns")
        least = self.network.model.smallest_side
        if images.shape[3] != 3 or min(images.shape[1:3]) < least:
            what = f"images have the shape {images.shape}, not 3 channels and at least {least} x {least} pixels"
            raise UsageError(what, "images", "pass what preprocess() returns")
        return self._apply(self.variables, images, endpoint)

    def __call__(self, images: Float[Array | np.ndarray, "b h w 3"]) -> Float[Array, "b num_classes"]:
        """Returns the logits of preprocessed images, compiled once for each shape.

        Args:
          images: what `preprocess` returns: float32, by default in [-1, 1].

        Raises:
          BadDataError: the weights have no classifier.
          UsageError: the images are not preprocessed.
        """
        require_classifier(self.network)
        return self._output(images)

    def features(self, images: Float[Array | np.ndarray, "b h w 3"], endpoint: str = "pre_logits") -> Array:
        """Returns activations of preprocessed images.

        Args:
          images: what `preprocess` returns.
          endpoint: 'pre_logits', the pooled features in front of the classifier ([b, 2048] in Xception), or a block:
            'block1' to 'block14' of Xception, 'mixed0' to 'mixed10' of Inception V3.

        Raises:
          UsageError: the network has no such endpoint, or the images are not preprocessed.
        """
        return self._output(images, endpoint)

    def preprocess(
        self, images: Image | Sequence[Image] | UInt8[np.ndarray, "b h w 3"]
    ) -> Float32[np.ndarray, "b s s 3"]:
        """Decodes, crops, resizes and scales images for the network.

        Args:
          images: a path or a uint8 RGB array [h, w, 3]; or several, of any sizes.

        Raises:
          InputMissingError: there is no such file.
          BadDataError: a file cannot be decoded.
          UsageError: an array is not a uint8 RGB image.
        """
        several, _ = _as_list(images)
        view = self.preprocessing
        batch = np.empty((len(several), view.size, view.size, 3), np.float32)
        for image, row in zip(several, batch, strict=True):
            view(_pixels(image), row)
        return batch

    def predict(
        self, images: Image | Sequence[Image] | UInt8[np.ndarray, "b h w 3"], top: int = 5
    ) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Predicts the most probable classes.

        Args:
          images: as in `preprocess`.
          top: number of classes, at least 1.

        Returns:
          (class, probability) pairs, best first; for several images, one list of pairs for each.

        Raises:
          UserError: as `preprocess`, or BadDataError if the weights have no classifier.
        """
        if not isinstance(top, int) or top < 1:
            raise UsageError(f"top is {top!r}", "predict", "set it to a whole number of at least 1")
        several, are_several = _as_list(images)
        names, found = self.classes, []
        for start in range(0, len(several), _BATCH):
            batch = self.preprocess(several[start : start + _BATCH])
            padding = (1 << (len(batch) - 1).bit_length()) - len(batch)  # so that few programs are compiled
            batch = np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0)))
            best = jax.device_get(most_probable(self.network, self(batch), min(top, len(names))))
            rows = list(zip(*best, strict=True))[: len(several) - start]
            found += [[(names[k], float(p)) for k, p in zip(*row, strict=True)] for row in rows]
        return found if are_several else found[0]


def load(source: str | os.PathLike[str], *, step: int | None = None) -> LoadedNetwork:
    """Loads a network with its weights.

    Args:
      source: a weight file of Keras, timm or this package; the work directory of a run; or the name of public weights,
        such as 'keras/xception' or 'hf://OWNER/REPO', which are downloaded on first use (`xception-jax weights list`).
      step: the checkpoint of a run, by default the newest intact one.

    Raises:
      InputMissingError: there is no such file, run or name.
      BadDataError: the file is damaged, refused, or of an unknown kind.
      StorageError: it cannot be downloaded.
    """
    return LoadedNetwork(open_network(os.fspath(source), step))


def train(
    config: str | os.PathLike[str] | ConfigDict | Mapping[str, Any] | ExperimentConfig, workdir: str | os.PathLike[str]
) -> Summary:
    """Trains a network, or resumes the run in `workdir`. Ctrl-C and SIGTERM end it after a checkpoint.

    Args:
      config: the name of a shipped config, such as 'fashion_mnist'; the path of a config file; or what its
        `get_config()` returns, such as `xception_jax.config.default_config()` with changes.
      workdir: directory for config.json, metrics.jsonl, checkpoints/ and report.html. `load(workdir)` opens the result.

    Returns:
      The summary of the finished run, with `step`, `metrics` of the test split, and `report`, the path of the report.

    Raises:
      UserError: one of its subclasses, with what is wrong, where, and what to do.
      UsageError: called outside of the main thread, where Python does not deliver signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("train() was called outside of the main thread", "train", "call it in the main thread")
    if isinstance(config, str | os.PathLike):
        config = read_config(os.fspath(config), ())
    return train_or_resume(config, os.fspath(workdir))


def _as_list(images: Image | Sequence[Image] | UInt8[np.ndarray, "b h w 3"]) -> tuple[list[Image], bool]:
    """Returns the images as a list, and whether there were several."""
    if isinstance(images, str | os.PathLike):
        return [images], False
    if isinstance(images, list | tuple):
        return list(images), True
    pixels = np.asarray(images)  # also of Pillow and JAX
    return (list(pixels), True) if pixels.ndim == 4 else ([pixels], False)


def _pixels(image: Image) -> UInt8[np.ndarray, "h w 3"]:
    if not isinstance(image, str | os.PathLike):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            what = f"an image is {pixels.dtype} of shape {pixels.shape}, not uint8 of shape (height, width, 3)"
            raise UsageError(what, "images", "pass RGB pixels from 0 to 255; call the network on preprocessed images")
        return pixels
    path = os.fspath(image)
    try:
        return files.decode(files.read(Path(image)))
    except files.DamagedImageError as error:
        fix = "replace it by an intact JPEG, PNG or WebP image"
        raise BadDataError(f"the image cannot be decoded: {error}", path, fix) from None
    except OSError as error:
        raise InputMissingError(f"the image cannot be read: {error.strerror}", path, "correct the path") from None
