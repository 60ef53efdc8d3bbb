"""JPEGs of the size of ImageNet's, from the photographs that scikit-image and scikit-learn bring along."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

SIZE = (500, 375)


def write_photographs(directory: str) -> None:
    """Writes them as numbered .jpg files, quality 90."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = [getattr(skimage.data, name)() for name in ("astronaut", "cat", "coffee", "rocket")]
    for number, photograph in enumerate((*photographs, *load_sample_images().images)):
        ImageOps.fit(Image.fromarray(photograph), SIZE).save(Path(directory, f"{number}.jpg"), quality=90)
