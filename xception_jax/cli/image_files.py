"""What commands that read image files have in common: the limits for decoding, and the error for unreadable images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xception_jax.command_line import at_least
from xception_jax.config import DataConfig
from xception_jax.errors import BadDataError
from xception_jax.names import printable_path

if TYPE_CHECKING:
    from xception_jax.data.images import Limits


def add_limits(parser: argparse.ArgumentParser, help_of: str = "{default}") -> None:
    """Adds --max_pixels and --max_scans.

    Args:
      parser: the parser.
      help_of: the help, in which {default} stands for what the limit means, and {field} for the field of a config.
    """
    for option, what, default in (
        ("--max_pixels", "width x height", DataConfig.max_pixels),
        ("--max_scans", "number of scans of a JPEG", DataConfig.max_scans),
    ):
        text = f"{what} above which an image counts as damaged (default: {default:,})"
        help_text = help_of.format(default=text, field=f"config.data.{option[2:]}")
        parser.add_argument(option, type=at_least(1), default=default, metavar="N", help=help_text)


def limits(args: argparse.Namespace) -> Limits:
    """Returns the limits that the arguments set."""
    from xception_jax.data.images import Limits  # decoders take a while to import

    return Limits(args.max_pixels, args.max_scans)


def unreadable(damaged: Sequence[str | os.PathLike[str]], total: int, done: str) -> BadDataError:
    """Returns the error for images that cannot be read.

    Args:
      damaged: their paths.
      total: number of all images.
      done: what happened to all others, such as 'predicted'.
    """
    others = f", all others were {done}" if len(damaged) < total else ""
    return BadDataError(
        f"{len(damaged):,} of {total:,} images cannot be read{others}",
        ", ".join(map(printable_path, damaged[:10])),
        "replace them by intact JPEG, PNG or WebP images; large ones need --max_pixels",
    )
