"""Computes, saves and loads the features of images: the input of the classifier, `pre_logits`."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from xception_jax.names import csv_cell
from xception_jax.user_files import read_arrays, reading, write_output

if TYPE_CHECKING:
    from xception_jax.weights import Network

Embedder = Callable[[np.ndarray], Float32[np.ndarray, "b c"]]


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of n images.

    Attributes:
      features: [n, c] float32.
      path: [n] str, image files, or 'DATASET SPLIT INDEX' for images of a dataset.
      label: [n] int64, or [n, classes] bool for multi-label data; None if there are no labels.
      class_names: names in the order of the labels.
      weights: SHA-256 of the weights that computed them.
    """

    features: np.ndarray
    path: np.ndarray
    label: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    weights: str = ""


def make_embedder(network: Network) -> Embedder:
    """Returns a function from preprocessed images [b, s, s, 3] to their features."""
    import jax  # not needed to read features

    from xception_jax.models import create_model

    model, variables = create_model(network.model), jax.device_put(network.variables)

    @jax.jit
    def features_of(variables: dict[str, Any], images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False)[1]["pre_logits"]

    return lambda images: np.asarray(features_of(variables, images), np.float32)


def save_features(path: str, features: Features) -> None:
    """Writes features to an .npz or a .csv file.

    Raises:
      StorageError: the file cannot be written.
    """
    content = _as_csv(features) if Path(path).suffix.lower() == ".csv" else _as_npz(features)
    write_output("file of features", path, content)


def _as_npz(features: Features) -> bytes:
    arrays = {"features": features.features, "path": features.path, "weights": np.array(features.weights)}
    if features.label is not None:
        arrays |= {"label": features.label, "class_names": np.array(features.class_names)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _as_csv(features: Features) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labelled = features.label is not None
    writer.writerow(["path", *["label"] * labelled, *(f"f{i}" for i in range(features.features.shape[1]))])
    for i, (path, row) in enumerate(zip(features.path, features.features, strict=True)):
        # Nine digits identify a float32.
        names = [path, *[_label_text(features, i)] * labelled]
        writer.writerow([*map(csv_cell, map(str, names)), *(f"{value:.9g}" for value in row)])
    return text.getvalue()


def _label_text(features: Features, row: int) -> str:
    if features.label is None:
        return ""
    labels = np.flatnonzero(features.label[row]) if features.label.ndim == 2 else [features.label[row]]
    return ";".join(features.class_names[label] for label in labels)


def load_features(path: str | os.PathLike[str]) -> Features:
    """Reads an .npz file written by `save_features`.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file is damaged, has a different format, or holds values that are not finite.
    """
    with reading("file of features", path, "write it with embed --out FILE.npz"):
        arrays = read_arrays(path, ("features", "path", "weights"), ("label", "class_names"))
        loaded = Features(
            features=arrays["features"].astype(np.float32),
            path=arrays["path"],
            label=arrays.get("label"),
            class_names=tuple(map(str, arrays.get("class_names", ()))),
            weights=str(arrays["weights"]),
        )
        if loaded.label is not None and loaded.label.dtype.kind not in "biu":
            raise ValueError(f"the labels are {loaded.label.dtype}")
        if loaded.label is not None and loaded.label.ndim == 1:  # numbers of classes
            loaded = dataclasses.replace(loaded, label=loaded.label.astype(np.int64))
        shape = loaded.features.shape
        if len(shape) != 2 or not shape[0] or len(loaded.path) != shape[0] or not np.isfinite(loaded.features).all():
            raise ValueError(f"features of shape {shape} for {len(loaded.path)} files, or values that are not finite")
        return loaded
