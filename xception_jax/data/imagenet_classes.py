"""The classes of ImageNet (ILSVRC 2012): WordNet ids and words."""

from __future__ import annotations

import re
from pathlib import Path

VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.jpe?g", re.IGNORECASE)
"""Names of validation images; some distributions add the class."""

_FILE = Path(__file__).with_name("imagenet_words.txt")


def class_names() -> list[str]:
    """Returns the 1,000 WordNet ids in the order of their labels, which is alphabetical."""
    return list(class_words())


def class_words() -> dict[str, str]:
    """Returns a distinct word for each class by its WordNet id, in the order of the labels: 'n01440764' is 'tench'."""
    lines = _FILE.read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
