"""Run by the interpreter of the peers: what timm's networks compute in float64 from the weights of timm_weights.py.

python tests/peers/timm_reference.py OUT.npz PHOTOGRAPH.npy NAME:SIZE ... [--weights DIR]; it also writes the names and
shapes of timm's tensors, and with DIR the weights as timm saves them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm_weights import part, sample, tensor

# Our endpoints by the module whose output they are.
ENDPOINTS = {
    "legacy_xception": {"act2": "block1", **{f"block{i}": f"block{i + 1}" for i in range(1, 13)}, "act4": "block14"},
    "inception_v3": {
        f"Mixed_{name}": f"mixed{i}"
        for i, name in enumerate(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("photograph")
    parser.add_argument("networks", nargs="+", metavar="NAME:SIZE")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    golden = {}
    for network in args.networks:
        name, size = network.split(":")
        model = build(name)
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        golden[f"{name}/names"] = np.array([f"{key} {shape}" for key, shape in shapes.items()])
        if args.weights is not None:
            save_file(model.state_dict(), args.weights / f"{name}.safetensors", metadata={"format": "pt"})
        outputs: dict[str, torch.Tensor] = {}
        for module, endpoint in ENDPOINTS[name].items():
            model.get_submodule(module).register_forward_hook(partial(keep, outputs, endpoint))
        with torch.no_grad():
            images = torch.from_numpy(part(np.load(args.photograph), int(size))).permute(0, 3, 1, 2)
            golden[f"{network}/logits"] = model.double()(images).numpy()
        for endpoint, value in outputs.items():
            golden[f"{network}/{endpoint}"] = sample(value.permute(0, 2, 3, 1).numpy())
    np.savez_compressed(args.out, **golden)


def keep(outputs: dict[str, torch.Tensor], endpoint: str, module, inputs, output: torch.Tensor) -> None:
    """Keeps a copy of an output: later layers change it in place."""
    del module, inputs
    outputs[endpoint] = output.clone()


def build(name: str) -> torch.nn.Module:
    """Returns the network with weights by the rule; Inception V3 with its auxiliary head, as in the public file."""
    options = {"aux_logits": True} if name == "inception_v3" else {}
    model = timm.create_model(name, **options).eval()
    state = {
        key: value if key.endswith("num_batches_tracked") else torch.from_numpy(tensor(key, tuple(value.shape)))
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    if name == "inception_v3":
        model.aux_logits = False  # computed only for training; its weights stay in the file
    return model


if __name__ == "__main__":
    main()
