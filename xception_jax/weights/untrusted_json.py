"""Parses JSON of unknown origin: small and shallow enough for whoever walks through it."""

from __future__ import annotations

import json
from typing import Any

from xception_jax.errors import BadDataError
from xception_jax.weights.limits import COPY_AGAIN

MAX_BYTES = 16 << 20  # the config of Inception V3 takes 150 kB
MAX_DEPTH = 64  # of Keras' config of a network in a model in a model: 20


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Returns the JSON object in a text.

    Raises:
      BadDataError: it is not JSON, not an object, too large, or nested more deeply than `MAX_DEPTH`.
    """
    if len(text) > MAX_BYTES:
        what = f"a JSON text of {len(text):,} bytes is larger than {MAX_BYTES:,}"
        raise BadDataError(f"the weight file is refused: {what}", where, COPY_AGAIN)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadDataError(
            f"the weight file is damaged: its JSON cannot be read: {reason}", where, COPY_AGAIN
        ) from None
    if not isinstance(parsed, dict):
        raise BadDataError("a JSON text in the file is not an object", where, COPY_AGAIN)
    level: list[Any] = [parsed]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return parsed
    raise BadDataError(f"the weight file is refused: its JSON is nested more than {MAX_DEPTH} deep", where, COPY_AGAIN)


def _children(node: Any) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [value for value in values if isinstance(value, dict | list)]
