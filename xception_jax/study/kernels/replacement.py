"""Replaces regular kernels of a run by kernels of low rank, and measures the accuracy that is lost.

How near a kernel is to rank one says little about how much the rest matters to the network. Here each layer is replaced
in turn, and then all layers together, without any further training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from xception_jax.config import ExperimentConfig, MeshConfig
from xception_jax.data.datasets import open_dataset
from xception_jax.data.pipeline import EvaluationBatches
from xception_jax.data.sources import Source
from xception_jax.errors import InputMissingError, UsageError
from xception_jax.evaluation.evaluate import make_evaluation_step
from xception_jax.models import create_model
from xception_jax.names import printable
from xception_jax.parallel import batch_sharding, make_mesh, to_devices
from xception_jax.runs import open_run, run_network
from xception_jax.study.kernels.networks import regular_kernels
from xception_jax.study.separability import FAMILIES, Kernel
from xception_jax.weights import tree

RANKS = (1, 2, 4)
ALL_LAYERS = "all layers"
_BACK = {"within": (1, 2, 0), "across": (1, 0, 2)}  # from the matrices of `FAMILIES` to [taps, c, f]
_Name = tuple[str, str, int]  # layer, family, rank
_AS_IT_IS: _Name = ("", "", 0)


@dataclasses.dataclass(frozen=True)
class Replacement:
    """The accuracy that is lost when kernels are replaced by kernels of a lower rank.

    Attributes:
      layer: path of the layer, or `ALL_LAYERS`.
      family: 'within' filters, of each of which the rank is lowered, or 'across' filters, of each channel.
      rank: the new rank.
      lost: accuracy of the network minus that with the replacement, as a share.
      error: standard error of this difference over the images, which are the same for both.
    """

    layer: str
    family: str
    rank: int
    lost: float
    error: float


@dataclasses.dataclass(frozen=True)
class Replacements:
    """All replacements in one run.

    Attributes:
      source: the work directory.
      split: the split on which it was evaluated.
      images: number of images.
      accuracy: accuracy of the network as it is.
      replacements: the replacements.
    """

    source: str
    split: str
    images: int
    accuracy: float
    replacements: tuple[Replacement, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data."""
        return dataclasses.asdict(self)


def low_rank(kernel: Kernel, family: str, rank: int) -> Kernel:
    """Returns the best approximation of a kernel by kernels of some rank, within or across filters."""
    u, s, v = np.linalg.svd(FAMILIES[family](kernel), full_matrices=False)
    matrices = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
    return matrices.transpose(_BACK[family]).reshape(kernel.shape)


def replace_kernels(workdir: str, data_dir: str | None = None) -> Replacements:
    """Measures what is lost on the test split of a run when its regular kernels are replaced.

    Args:
      workdir: the work directory of the run.
      data_dir: directory of the datasets; by default that of the run.

    Raises:
      InputMissingError: the run or its dataset is missing, or the network has no regular kernel.
      UsageError: the run has no test split, or images of several labels.
      BadDataError: the checkpoint or the dataset is damaged.
    """
    run = open_run(workdir)
    network = run_network(workdir, run)
    config = run.config
    if not config.data.test_split or config.loss.multi_label:
        what = "images of this run have several labels" if config.loss.multi_label else "the run has no test split"
        raise UsageError(what, workdir, "use --replace with a run that has one label for each image and a test split")
    model = create_model(network.model)
    kernels = regular_kernels(model, network.variables["params"], network.preprocessing.size).kernels
    if not kernels:
        fix = "use a run with regular convolutions, such as config.model.segments=1"
        raise InputMissingError("there are no regular kernels to replace", workdir, fix)
    data = config.data if data_dir is None else config.data.replace(data_dir=data_dir)
    source = open_dataset(data, config.data.test_split)
    right = _evaluate(config.replace(data=data), model, network.variables, kernels, source)
    base = right.pop(_AS_IT_IS)
    found = []
    for (layer, family, rank), ours in right.items():
        difference = base.astype(float) - ours
        error = float(difference.std()) / math.sqrt(len(base))
        found.append(Replacement(layer, family, rank, float(difference.mean()), error))
    return Replacements(workdir, source.info.split, len(base), float(base.mean()), tuple(found))


def _replaced(kernels: Mapping[str, Kernel]) -> Iterator[tuple[_Name, dict[str, Kernel]]]:
    """Yields each replacement and its kernels by layer. A kernel that has no more than this rank stays as it is."""
    for family in FAMILIES:
        for rank in RANKS:
            new = {
                layer: low_rank(kernel, family, rank)
                for layer, kernel in kernels.items()
                if rank < min(FAMILIES[family](kernel).shape[1:])
            }
            for layer, kernel in new.items():
                yield (layer, family, rank), {layer: kernel}
            if new:
                yield (ALL_LAYERS, family, rank), new


def _evaluate(
    config: ExperimentConfig, model: Any, variables: Mapping[str, Any], kernels: Mapping[str, Kernel], source: Source
) -> dict[_Name, np.ndarray]:
    """Returns which images are classified correctly: by the network `_AS_IT_IS`, and with each replacement."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    everywhere = NamedSharding(mesh, PartitionSpec())
    leaves = tree.flatten(jax.device_put(variables, everywhere))
    sets: dict[_Name, dict[str, Any]] = {_AS_IT_IS: tree.unflatten(leaves)}
    for name, new in _replaced(kernels):
        placed = {}
        for layer, kernel in new.items():
            path = f"params/{layer}/kernel"
            placed[path] = jax.device_put(kernel.astype(leaves[path].dtype), everywhere)
        sets[name] = tree.unflatten(leaves | placed)
    right: dict[_Name, list[np.ndarray]] = {name: [] for name in sets}
    step = make_evaluation_step(model, config)
    batches = EvaluationBatches(config.data, source, batch_size=config.evaluation.batch_size)
    with jax.set_mesh(mesh), contextlib.closing(iter(batches)) as iterator:
        label = f"evaluating {len(sets)} networks on {printable(source.info.split)}"
        for batch in tqdm(iterator, label, len(batches), unit="batch", disable=None):
            inputs = {name: batch[name] for name in ("image", "label", "mask", "damaged")}
            placed_batch = to_devices(inputs, batch_sharding(mesh))
            for name, chosen in sets.items():
                _, predictions = step(chosen, placed_batch)
                best = np.asarray(predictions["classes"][:, 0])
                known = np.isfinite(np.asarray(predictions["probabilities"][:, 0]))
                right[name].append(((best == batch["label"]) & known)[batch["mask"] & ~batch["damaged"]])
    return {name: np.concatenate(parts) for name, parts in right.items()}


def format_replacements(found: Replacements) -> str:
    """Returns a table of the accuracy that is lost, in percentage points."""
    layers = list(dict.fromkeys(each.layer for each in found.replacements))
    lost = {(each.layer, each.family, each.rank): each for each in found.replacements}
    columns = [(family, rank) for family in FAMILIES for rank in RANKS]
    width = max(len(printable(layer)) for layer in layers)
    lines = [
        f"{printable(found.source)}: accuracy {found.accuracy:.2%} on {found.images:,} images of {found.split}",
        f"{'lost, points':{width}} " + " ".join(f"{f'{family}, rank {rank}':>15}" for family, rank in columns),
    ]
    for layer in layers:
        cells = []
        for family, rank in columns:
            each = lost.get((layer, family, rank))
            cells.append(f"{100 * each.lost:+.2f} ({100 * each.error:.2f})" if each else "-")
        lines.append(f"{printable(layer):{width}} " + " ".join(f"{cell:>15}" for cell in cells))
    lines.append("brackets: standard error over the images; -: the kernel has no higher rank")
    return "\n".join(lines)
