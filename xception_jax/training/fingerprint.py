"""Identifies a training state by leaf names, dtypes, shapes, content hash and package versions."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from xception_jax.environment import installed_versions
from xception_jax.names import printable
from xception_jax.parallel import whole


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by name, such as 'params/block2_sepconv1/spatial/kernel'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tree_signature(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of every leaf by name, such as 'float32[3, 3, 32, 64]'."""

    def signature(leaf: Any) -> str:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    return {name: signature(leaf) for name, leaf in named_leaves(tree).items()}


def state_fingerprint(state: Any) -> str:
    """Returns the SHA-256 over the name, dtype, shape and bits of every leaf.

    With several processes, this is a collective that all of them must call. All get the same result.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(state).items()):
        array = whole(leaf)
        digest.update(f"{name} {array.dtype}{list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def compare_signatures(stored: dict[str, str], wanted: dict[str, str], max_rows: int = 10) -> tuple[int, list[str]]:
    """Compares two results of `tree_signature`.

    Returns:
      The number of leaves that differ or exist on one side only, and the lines of a table (parameter, stored,
      wanted) of the first `max_rows` of them.
    """
    names = [name for name in {**wanted, **stored} if stored.get(name) != wanted.get(name)]
    rows = [("parameter", "stored", "wanted")]
    rows += [(printable(name), printable(stored.get(name, "-")), wanted.get(name, "-")) for name in names[:max_rows]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{name:{widths[0]}}  {old:{widths[1]}}  {new}" for name, old, new in rows]
    if len(names) > max_rows:
        lines.append(f"and {len(names) - max_rows} more")
    return len(names), lines


def versions() -> dict[str, str]:
    """Returns the versions of the packages that a checkpoint depends on."""
    packages = ("jax", "flax", "orbax-checkpoint", "xception_jax")
    return dict.fromkeys(packages, "not installed") | installed_versions(packages)
