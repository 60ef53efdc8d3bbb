"""Writes JPEG files of ImageNet's typical size, from the photographs included in scikit-image and scikit-learn."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

SIZE = (500, 375)


def write_photographs(directory: str) -> None:
    """Writes the photographs as numbered .jpg files with quality 90."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = [getattr(skimage.data, name)() for name in ("astronaut", "cat", "coffee", "rocket")]
    for number, photograph in enumerate((*photographs, *load_sample_images().images)):
        ImageOps.fit(Image.fromarray(photograph), SIZE).save(Path(directory, f"{number}.jpg"), quality=90)
