"""Runs where timm is: writes what its evaluation shows a network of photographs.

PEERS_PYTHON timm_views.py OUT.npz PHOTOGRAPHS.npz SIZE:CROP:INTERPOLATION ...
"""

import sys

import numpy as np
from PIL import Image
from timm.data import create_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

out, photographs, *views = sys.argv[1:]
arrays = {}
for view in views:
    size, crop, interpolation = view.split(":")
    transform = create_transform(
        (3, int(size), int(size)), crop_pct=float(crop), interpolation=interpolation, mean=MEAN, std=STD
    )
    for name, photograph in np.load(photographs).items():
        arrays[f"{name}:{view}"] = transform(Image.fromarray(photograph)).permute(1, 2, 0).numpy()
np.savez(out, **arrays)
