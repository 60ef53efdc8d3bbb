"""What reading a file of Keras and of timm has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xception_jax.errors import BadDataError
from xception_jax.weights import tree
from xception_jax.weights.network import Network


@dataclasses.dataclass(frozen=True)
class Imported:
    """A network read from a file of another library.

    Attributes:
      network: with the default size of images and no SHA-256.
      image_shape: height and width of the network's input, or None if the file does not specify them.
      notes: what was left out or assumed, for the user.
    """

    network: Network
    image_shape: tuple[int, int] | None
    notes: list[str]


def compare_shapes(needed: Sequence[str], found: Sequence[str]) -> str:
    """Returns why the classifier in a file is not that of the model, or ''."""
    texts = [tree.listed(side) or "none" for side in (needed, found)]
    return "" if needed == found else "the model's classifier is {}; the file has {}".format(*texts)


def select_head(
    demanded: bool | None, problem: str, above: Sequence[str], classifier: Sequence[str], where: str
) -> tuple[bool, list[str]]:
    """Decides whether the classifier is read.

    Args:
      demanded: True if it must be read, False if it must not, None to read it if it fits.
      problem: why it does not fit, or ''.
      above: names of everything above the network.
      classifier: names of the classifier among them.
      where: the file, for messages.

    Returns:
      The decision, and a note about what is left out.
    """
    if demanded and problem:
        fix = "leave the head out: --no-head (head=False), or set config.model.num_classes (fc_layers, fc_width) to fit"
        raise BadDataError(f"the head does not fit: {problem}", where, fix)
    is_read = demanded is not False and not problem
    left_out = [name for name in above if not is_read or name not in classifier]
    reason = f" ({problem})" if problem and demanded is None else ""
    return is_read, [f"left out: {tree.listed(left_out)}{reason}"] if left_out else []
