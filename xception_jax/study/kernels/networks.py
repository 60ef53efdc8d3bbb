"""Measures the regular kernels of trained networks: of runs, of the cells of a study, and of any weight file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from tqdm import tqdm

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.files import write_atomically
from xception_jax.models import create_model
from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers
from xception_jax.runs import is_run, open_network
from xception_jax.study.cells import KERNELS, Cell
from xception_jax.study.kernels import weight_file
from xception_jax.study.kernels.measure import (
    Spread,
    first_component,
    random_dials,
    random_kernels,
    rank_errors,
)
from xception_jax.study.kernels.weight_file import KernelSet, find_kernels
from xception_jax.study.separability import FAMILIES, dial
from xception_jax.study.store import STUDY, read_study
from xception_jax.training.workdir import CONFIG
from xception_jax.user_files import read_json, reading, writing
from xception_jax.weights.limits import COPY_AGAIN
from xception_jax.weights.load import read_content
from xception_jax.weights.own import METADATA

_SEPARABLE = 1e-9  # the dial of kernels that cannot be anything but separable, up to rounding


@dataclasses.dataclass(frozen=True)
class LayerSeparability:
    """The separability of one regular convolution of one network.

    Attributes:
      network: the arm and seed in a study, or the name of the work directory or weight file.
      layer: path of the layer.
      shape: shape of its kernel, [kh, kw, c, f].
      first_component: mean over filters of the share of the squared norm in the best blueprint (pointwise first).
      null: the same for random kernels of this shape.
      rank_errors: relative error (Frobenius norm) of a sum of r depthwise separable convolutions, from r = 1 to the
        number of taps.
      null_rank_errors: the mean of the same over random kernels of this shape.
      within, across: the place on the dial, see `measure.dial`.
      null_within, null_across: the same for random kernels that have the energies of this kernel.
    """

    network: str
    layer: str
    shape: tuple[int, ...]
    first_component: float
    null: Spread
    rank_errors: tuple[float, ...]
    null_rank_errors: tuple[float, ...]
    within: float
    across: float
    null_within: Spread
    null_across: Spread

    @property
    def is_line(self) -> bool:
        """Returns whether the kernel is a line of pixels, such as 1 x 7."""
        return self.shape[0] != self.shape[1]

    def position(self, family: str) -> float:
        """Returns the dial in units of random kernels with the same energies: 0 is separable, 1 is as they are.

        It is NaN if these cannot be anything but separable.
        """
        null = getattr(self, f"null_{family}").mean
        return getattr(self, family) / null if null > _SEPARABLE else math.nan

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data, with the positions."""
        positions = {f"position_{family}": self.position(family) for family in FAMILIES}
        return dataclasses.asdict(self) | {
            name: value if math.isfinite(value) else None for name, value in positions.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerSeparability:
        """Returns the layer whose `to_json` is `data`.

        Raises:
          Exception: of many kinds: it is something else. Call this inside `user_files.reading`.
        """
        return cls(
            network=str(data["network"]),
            layer=str(data["layer"]),
            shape=tuple(int(side) for side in data["shape"]),
            first_component=float(data["first_component"]),
            null=Spread(**data["null"]),
            rank_errors=tuple(float(error) for error in data["rank_errors"]),
            null_rank_errors=tuple(float(error) for error in data["null_rank_errors"]),
            within=float(data["within"]),
            across=float(data["across"]),
            null_within=Spread(**data["null_within"]),
            null_across=Spread(**data["null_across"]),
        )


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """The regular kernels of some networks.

    Attributes:
      layers: the layers of each network, in the order of its forward pass or of their names.
      left_out: names of the kernels that are not measured, by network and reason.
      axes: how the order of the axes of a weight file was found, by network.
    """

    layers: tuple[LayerSeparability, ...]
    left_out: Mapping[str, Mapping[str, tuple[str, ...]]]
    axes: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "left_out": {network: dict(reasons) for network, reasons in self.left_out.items()},
            "axes": dict(self.axes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelReport:
        """Returns the report whose `to_json` is `data`, as `LayerSeparability.from_json` does."""
        layers = tuple(LayerSeparability.from_json(layer) for layer in data["layers"])
        left_out = {
            str(network): {str(reason): tuple(map(str, names)) for reason, names in reasons.items()}
            for network, reasons in data["left_out"].items()
        }
        return cls(layers, left_out, dict(data["axes"]))

    @classmethod
    def of(cls, reports: Iterable[KernelReport]) -> KernelReport:
        """Returns the report on the networks of several reports."""
        layers: list[LayerSeparability] = []
        left_out: dict[str, Mapping[str, tuple[str, ...]]] = {}
        axes: dict[str, str] = {}
        for report in reports:
            layers += report.layers
            left_out |= report.left_out
            axes |= report.axes
        return cls(tuple(layers), left_out, axes)


def regular_kernels(model: nn.Module, params: Mapping[str, Any], image_size: int) -> KernelSet:
    """Returns the kernels of all regular convolutions with several input channels and a side above one, by path."""
    found: dict[tuple[str, ...], tuple[nn.Module, int]] = {}

    def visit(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(layer, Conv):
            found[layer.path] = layer, inputs.shape[-1]

    trace_layers(model, image_size, visit)
    kernels: dict[str, np.ndarray] = {}
    left_out: dict[str, list[str]] = {}
    for path, (layer, channels) in found.items():
        name = "/".join(path)
        if reason := _reason(layer, channels):
            left_out.setdefault(reason, []).append(name)
            continue
        node: Any = params
        for part in path:
            node = node[part]
        kernels[name] = np.asarray(node["kernel"], np.float64)
    return KernelSet(kernels, left_out)


def _reason(layer: Any, channels: int) -> str:
    """Returns why a convolution is not regular, or ''."""
    if max(layer.kernel_size) == 1:
        return weight_file.ONE_BY_ONE
    if layer.segments == channels:
        return weight_file.DEPTHWISE
    return weight_file.GROUPED if layer.segments > 1 else ""


def analyse(source: str | Path, axes: str | None = None) -> KernelReport:
    """Analyses a trained network, or each finished network of a study.

    A cell of a study keeps what was measured in kernels.json, and is then not measured again.

    Args:
      source: a weight file, the work directory of a run or a study directory.
      axes: order of the axes in a weight file, one of `weight_file.AXES`; by default it is found out.

    Raises:
      InputMissingError: the source has no network, or the network has no checkpoint or no regular convolution.
      BadDataError: a checkpoint, the weight file or a kernels.json is damaged.
      StorageError: a kernels.json cannot be written.
      UsageError: the order of the axes of a weight file is not clear.
    """
    path = Path(source)
    if (path / STUDY).exists():
        report = KernelReport.of(_measure_cell(cell) for cell in read_study(path).cells() if cell.state() == "done")
    elif path.is_dir() and not (path / CONFIG).exists():
        raise InputMissingError(
            "there is no run and no study", str(source), "name a directory with config.json or study.json"
        )
    else:
        report = _measure(path.name or str(source), os.fspath(source), axes)
    if not report.layers:
        what = "there is no trained network with regular convolutions of several channels"
        if counts := format_left_out(report.left_out):
            what += f" ({counts} are left out)"
        raise InputMissingError(
            what, str(source), "train one with --config.model.module=regular, as studies/kernels does, or name another"
        )
    return report


def _measure_cell(cell: Cell) -> KernelReport:
    """Returns what was measured of a finished cell, or measures it and keeps the result beside its metrics."""
    path = cell.directory / KERNELS
    if path.exists():
        with reading("record of kernels", path, "delete it to measure the kernels again, which needs the checkpoint"):
            return KernelReport.from_json(read_json(path, dict))
    if cell.record().get("reused_from"):  # its checkpoints are elsewhere
        return KernelReport.of(())
    report = _measure(cell.name, str(cell.directory), None)
    with writing("record of kernels", path, "free some space, or measure a copy of the study that you may write to"):
        write_atomically(path, json.dumps(report.to_json(), indent=1) + "\n")
    return report


def _measure(name: str, source: str, axes: str | None) -> KernelReport:
    """Measures the kernels of one network, a weight file or a work directory."""
    found = _kernels_of(source, axes)
    progress = tqdm(found.kernels.items(), "measuring kernels", disable=None, leave=False)
    return KernelReport(
        tuple(measure_layer(name, layer, kernel) for layer, kernel in progress),
        {name: {reason: tuple(names) for reason, names in found.left_out.items()}},
        {name: found.axes} if found.axes else {},
    )


def _kernels_of(source: str, axes: str | None) -> KernelSet:
    if not is_run(source):
        content = read_content(source)
        if METADATA not in content.texts or axes:
            return find_kernels(content, source, axes)
    network = open_network(source)
    return regular_kernels(create_model(network.model), network.variables["params"], network.preprocessing.size)


def measure_layer(network: str, layer: str, kernel: np.ndarray) -> LayerSeparability:
    """Measures one kernel.

    Raises:
      BadDataError: it is zero, or holds numbers that are not finite.
    """
    if not np.isfinite(kernel).all() or not kernel.any():
        raise BadDataError(f"{layer} is zero or holds non-finite values", network, COPY_AGAIN)
    null, null_rank_errors = random_kernels(kernel.shape)
    alike = random_dials(kernel)
    return LayerSeparability(
        network=network,
        layer=layer,
        shape=kernel.shape,
        first_component=float(np.nanmean(first_component(kernel))),
        null=null,
        rank_errors=tuple(rank_errors(kernel).tolist()),
        null_rank_errors=null_rank_errors,
        within=dial(kernel, "within"),
        across=dial(kernel, "across"),
        null_within=alike["within"],
        null_across=alike["across"],
    )


def format_left_out(left_out: Mapping[str, Mapping[str, tuple[str, ...]]]) -> str:
    """Returns how many kernels of all networks are left out, by reason: '36 1 x 1, 4 grouped'."""
    counts: dict[str, int] = {}
    for reasons in left_out.values():
        for reason, names in reasons.items():
            counts[reason] = counts.get(reason, 0) + len(names)
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())
