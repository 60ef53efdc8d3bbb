"""Runs where timm is: `PEERS_PYTHON timm_strict.py NAME CLASSES OURS.safetensors BACK.safetensors`.

timm loads a file that we wrote, strictly, and writes it again.
"""

import sys

import timm
from safetensors.torch import load_file, save_file

name, num_classes, ours, back = sys.argv[1:]
options = {"aux_logits": True} if name == "inception_v3" and num_classes != "0" else {}
model = timm.create_model(name, num_classes=int(num_classes), **options)
model.load_state_dict(load_file(ours), strict=True)
save_file(model.state_dict(), back, metadata={"format": "pt"})
timm.create_model(name, num_classes=int(num_classes), checkpoint_path=ours, **options)  # also strict
