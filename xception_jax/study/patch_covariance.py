"""Measures how separable the patches of images are into channels and space, without a network.

The covariance of patches [side, side, channels] is a matrix over pairs of (channel, tap). If correlations across
channels and correlations in space were separable, it would be a Kronecker product: channels x space. The measure is the
share of its squared norm in the best such product, which is the share of the largest singular value of the rearranged
matrix (Van Loan and Pitsianis 1993).

Brightness that is constant over a patch rules the covariance of photographs. So the measure is also taken after
whitening by the marginal covariances of channels and of taps, which is itself a Kronecker product.

Two controls turn the patches by random orthogonal matrices, which change neither their eigenvalues nor what could be
known from them. After a Kronecker turn (channels and taps apart) a separable covariance stays separable; after a free
turn it does not. If the eigenvalues are nearly equal (white noise), a free turn goes no further than chance does: few
patches do not look separable, even if their true covariance is. How far they go by chance is known from how images
vary, because patches of one image resemble each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from xception_jax.data import folders, images
from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.files import local_directory
from xception_jax.logs.metrics_log import json_ready
from xception_jax.names import printable_path

_TURNS = 20
_MOST_IMAGES = 2000
_UNCLEAR = 0.1  # position by chance above which a position is called unclear
_FEWEST_IMAGES = 10  # of fewer images, too little is known of how they vary
_FLOOR = 1e-9  # of a marginal covariance, relative to its largest eigenvalue

Covariance = Float[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True)
class Shares:
    """The share of a covariance in its best Kronecker product.

    Attributes:
      share: share of the patches as they are.
      free: (mean, lowest, highest) after free turns.
      kronecker: the same after Kronecker turns.
      noise: 1 - share of a separable covariance by chance; NaN for patches of one image.
    """

    share: float
    free: tuple[float, float, float]
    kronecker: tuple[float, float, float]
    noise: float

    @property
    def dial(self) -> float:
        """Returns the place on the dial's axis: 1 - share, which is 0 if the covariance is separable."""
        return 1 - self.share

    @property
    def position(self) -> float:
        """Returns the dial as a share of its mean after free turns: 0 is separable, 1 is as free as the controls."""
        return self.dial / (1 - self.free[0])

    @property
    def chance(self) -> float:
        """Returns the mean position of separable covariances by chance: one is known no better than by this."""
        return self.noise / (1 - self.free[0])


@dataclasses.dataclass(frozen=True)
class PatchSeparability:
    """The separability of the patches of a set of images.

    Attributes:
      source: the folder or dataset.
      images: number of images that were read.
      skipped: number of files that are damaged or smaller than a patch.
      patches: number of patches.
      side: side of a patch, in pixels.
      raw: shares of the covariance.
      whitened: shares of the covariance after whitening by its marginals.
    """

    source: str
    images: int
    skipped: int
    patches: int
    side: int
    raw: Shares
    whitened: Shares

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data, with the places on the dial's axis; null is unknown."""
        data = dataclasses.asdict(self)
        for name, shares in (("raw", self.raw), ("whitened", self.whitened)):
            data[name] |= {"dial": shares.dial, "position": shares.position, "chance": shares.chance}
        return json_ready(data)


def measure_patches(source: str, *, split: str = "train", patches: int, side: int, seed: int) -> PatchSeparability:
    """Measures the patches of the images of a folder or a prepared dataset.

    Args:
      source: a folder of images, the directory of a prepared dataset, or the name of one.
      split: split of the dataset.
      patches: at most about as many are read, at different places of at most 2,000 images that are spread evenly.
      side: side of a patch, in pixels. The covariance has side^4 x channels^2 elements.
      seed: seed of their places, and of the controls.

    Raises:
      InputMissingError: there is no such folder or dataset, or no image in it.
      BadDataError: all images are grey, or all patches are equal.
    """
    encoded = _encoded_images(source, split)
    chosen = np.unique(np.linspace(0, len(encoded) - 1, min(len(encoded), _MOST_IMAGES, patches)).round().astype(int))
    rng = np.random.default_rng(seed)
    each = -(-patches // len(chosen))
    found = [_patches(encoded, int(index), each, side, rng) for index in chosen]
    used = [part for part in found if part is not None]
    if not used:
        fix = f"name a folder with images of at least {side} x {side} pixels"
        raise InputMissingError("there is no image that can be read", source, fix)
    values = np.concatenate(used)
    if np.ptp(values, axis=-1).max() == 0:
        fix = "name a set of colour images"
        raise BadDataError("all images are grey, so there are no correlations across channels", source, fix)
    if np.ptp(values, axis=0).max() == 0:
        raise BadDataError("all patches are equal, so there are no correlations", source, "name a set of photographs")
    raw, whitened = measure(used, rng)
    return PatchSeparability(source, len(used), len(found) - len(used), len(values), side, raw, whitened)


class _Files:
    """The image files of a folder, encoded."""

    def __init__(self, folder: Path):
        self._paths = [path for path in folders.files(folder) if path.suffix.lower() in images.SUFFIXES]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> bytes:
        return images.read(self._paths[index])


class _Dataset:
    """The images of a prepared dataset, encoded."""

    def __init__(self, directory: Path, split: str):
        from xception_jax.data.sources import TfdsSource

        self._source = TfdsSource(directory, split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        return self._source[index]["image"]


def _encoded_images(source: str, split: str) -> _Files | _Dataset:
    from xception_jax.data.sources import find_dataset, is_complete, resolve_data_dir

    folder = local_directory(source, "separability")
    directory = folder if folder.is_dir() else find_dataset(source, resolve_data_dir(""))
    if directory is None:
        fix = "name a folder of images, or a dataset that `xception-jax prepare` wrote"
        raise InputMissingError("there is no such folder and no such dataset", source, fix)
    found = _Dataset(directory, split) if is_complete(directory) else _Files(directory)
    if not len(found):
        suffixes = ", ".join(images.SUFFIXES)
        raise InputMissingError("there is no image", source, f"name a folder with files of {suffixes}")
    return found


def _patches(
    encoded: _Files | _Dataset, index: int, count: int, side: int, rng: np.random.Generator
) -> Float[np.ndarray, "n s s c"] | None:
    """Returns patches at different random places of one image; None if it is damaged or too small."""
    try:
        image = images.decode(encoded[index])
    except (images.DamagedImageError, OSError):
        return None
    height, width = image.shape[:2]
    if min(height, width) < side:
        return None
    across = width - side + 1
    places = rng.choice((height - side + 1) * across, min(count, (height - side + 1) * across), replace=False)
    rows, columns = (place[:, None, None] for place in np.divmod(places, across))
    taps = np.arange(side)
    return image[rows + taps[:, None], columns + taps].astype(np.float64)


def covariance(patches: Float[np.ndarray, "n s s c"]) -> Covariance:
    """Returns the covariance of at least two patches; its rows and columns are (channel, tap), the channel first."""
    return np.cov(_flat(patches), rowvar=False)


def _flat(patches: Float[np.ndarray, "n s s c"]) -> Float[np.ndarray, "n d"]:
    return patches.reshape(len(patches), -1, patches.shape[-1]).transpose(0, 2, 1).reshape(len(patches), -1)


def kronecker_share(matrix: Covariance, channels: int) -> float:
    """Returns the share of the squared norm in the best Kronecker product of a channel and a tap matrix."""
    energy = np.square(np.linalg.svd(_rearranged(matrix, channels), compute_uv=False))
    return float(energy[0] / energy.sum())


def _rearranged(matrix: Covariance, channels: int) -> Float[np.ndarray, "c2 t2"]:
    """Returns a row for each pair of channels and a column for each pair of taps: a product has rank one."""
    taps = len(matrix) // channels
    return matrix.reshape(channels, taps, channels, taps).transpose(0, 2, 1, 3).reshape(channels**2, taps**2)


def _noise(groups: Sequence[Float[np.ndarray, "_ d"]], channels: int) -> float:
    """Returns the mean `1 - kronecker_share` by chance if the true covariance is separable; NaN for one image.

    Only noise outside of the products near the best one counts, to first order. The noise of a covariance is known from
    how the sums of the images vary, which are independent of each other.

    Args:
      groups: the patches of each image, around the mean of all patches.
      channels: the number of channels.
    """
    if len(groups) < 2:
        return math.nan
    count = sum(map(len, groups))
    mean = sum(group.T @ group for group in groups) / count
    rearranged = _rearranged(mean, channels)
    u, _, v = np.linalg.svd(rearranged, full_matrices=False)

    def outside(group: np.ndarray) -> float:
        noise = _rearranged(group.T @ group - len(group) * mean, channels)
        noise = noise - np.outer(u[:, 0], u[:, 0] @ noise)
        return np.square(noise - np.outer(noise @ v[0], v[0])).sum()

    variance = sum(map(outside, groups)) / count**2 * len(groups) / (len(groups) - 1)
    return float(variance / np.square(rearranged).sum())


def whiten(matrix: Covariance, channels: int) -> Covariance:
    """Returns the covariance after whitening channels and taps by their marginal covariances.

    A separable covariance becomes a multiple of the identity.
    """
    turn = _whitening(matrix, channels)
    return turn @ matrix @ turn.T


def _whitening(matrix: Covariance, channels: int) -> Float[np.ndarray, "d d"]:
    taps = len(matrix) // channels
    blocks = matrix.reshape(channels, taps, channels, taps)
    return np.kron(_inverse_root(np.einsum("ctdt->cd", blocks)), _inverse_root(np.einsum("ctcu->tu", blocks)))


def _inverse_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(np.maximum(values, _FLOOR * values[-1]))) @ vectors.T


def measure(groups: Sequence[Float[np.ndarray, "_ s s c"]], rng: np.random.Generator) -> tuple[Shares, Shares]:
    """Measures the covariance of the patches of each image, and the same after random turns.

    Returns:
      (raw, whitened).
    """
    channels = groups[0].shape[-1]
    values = _flat(np.concatenate(groups))
    matrix, values = np.cov(values, rowvar=False), values - values.mean(axis=0)
    ends = np.cumsum([len(group) for group in groups])[:-1]
    taps = len(matrix) // channels

    def turned(turn: np.ndarray) -> Covariance:
        return turn @ matrix @ turn.T

    def measured(share_of: Callable[[Covariance], float], values: Float[np.ndarray, "n d"]) -> Shares:
        controls = (
            lambda: turned(_orthogonal(rng, len(matrix))),
            lambda: turned(np.kron(_orthogonal(rng, channels), _orthogonal(rng, taps))),
        )
        found = [[share_of(control()) for _ in range(_TURNS)] for control in controls]
        free, kronecker = ((float(np.mean(each)), min(each), max(each)) for each in found)
        return Shares(share_of(matrix), free, kronecker, _noise(np.split(values, ends), channels))

    raw = measured(lambda matrix: kronecker_share(matrix, channels), values)
    whitened = values @ _whitening(matrix, channels).T
    return raw, measured(lambda matrix: kronecker_share(whiten(matrix, channels), channels), whitened)


def _orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns a random orthogonal matrix, uniformly distributed."""
    q, r = np.linalg.qr(rng.normal(size=(size, size)))
    return q * np.sign(np.diag(r))


def format_patches(found: PatchSeparability) -> str:
    """Returns a table of the shares and the places on the dial's axis."""
    lines = [
        f"{printable_path(found.source)}: {found.patches:,} patches of {found.side} x {found.side} pixels from "
        f"{found.images:,} images" + f", {found.skipped:,} files skipped" * bool(found.skipped),
        f"{'covariance':10} {'share':>7} {'free turn':>26} {'Kronecker turn':>26} {'dial':>7} {'position':>9} "
        f"{'by chance':>9}",
    ]
    for name, shares in (("raw", found.raw), ("whitened", found.whitened)):
        turns = (f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, low, high in (shares.free, shares.kronecker))
        columns = " ".join(f"{turn:>26}" for turn in turns)
        lines.append(
            f"{name:10} {shares.share:7.4f} {columns} {shares.dial:7.4f} {shares.position:9.1%} "
            + ("unknown" if math.isnan(shares.chance) else f"{shares.chance:.1%}").rjust(9)
        )
    lines += [
        "share: of the squared norm of the covariance in its best product of a channel and a space matrix",
        f"turns: the same after {_TURNS} random orthogonal turns; mean (lowest to highest)",
        "dial: 1 - share; position: the dial in percent of that after free turns. 0 % is separable, 100 % is free",
        "by chance: position of a separable covariance of as many such images",
    ]
    unclear = [name for name, shares in (("raw", found.raw), ("whitened", found.whitened)) if shares.chance > _UNCLEAR]
    if found.images < _FEWEST_IMAGES:
        lines.append(
            f"The positions are unclear: the variation between {found.images} images says too little of what is by "
            f"chance. Read at least {_FEWEST_IMAGES} images."
        )
    elif unclear:
        lines.append(
            f"The position of {' and '.join(unclear)} is unclear: separable patches would look free by chance. "
            "Read more images, or they have hardly any correlations."
        )
    return "\n".join(lines)
