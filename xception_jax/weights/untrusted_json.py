"""Parses the JSON texts in weight files of unknown origin."""

from __future__ import annotations

from typing import Any

from xception_jax.errors import BadDataError
from xception_jax.user_files import parse_json
from xception_jax.weights.limits import COPY_AGAIN

MAX_BYTES = 16 << 20  # the config of Inception V3 takes 150 kB


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Returns the JSON object in a text.

    Raises:
      BadDataError: it is too large, or `parse_json` refuses it.
    """
    if len(text) > MAX_BYTES:
        what = f"a JSON text of {len(text):,} bytes is larger than {MAX_BYTES:,}"
        raise BadDataError(f"the weight file is refused: {what}", where, COPY_AGAIN)
    try:
        return parse_json(text, dict)
    except ValueError as error:
        raise BadDataError(f"the weight file is damaged: its JSON cannot be read: {error}", where, COPY_AGAIN) from None
