"""Writes hostile weight files, and readers that misbehave as libhdf5 does on some of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import h5py
import numpy as np
import safetensors.numpy


def strings_that_share_one(path: Path, count: int = 3500, size: int = 1_100_000) -> None:
    """Writes an attribute of strings, all of which refer to the same long one: a file of 1.2 MB expands to 4 GB."""
    first = "A" * size
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = np.ones((3, 3, 3, 32), np.float32)
        names = np.array([first, *("short" for _ in range(count - 1))], dtype=object)
        file.attrs.create("layer_names", names, dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    place = content.find(struct.pack("<I", size))
    while content[(heap := struct.unpack_from("<Q", content, place + 4)[0]) : heap + 4] != b"GCOL":
        place = content.find(struct.pack("<I", size), place + 1)
    content[place : place + 16 * count] = content[place : place + 16] * count  # length, address and index of each
    path.write_bytes(content)


def own_file(path: Path, metadata: str | None = None, **model: object) -> None:
    """Writes one of our own files with a single small tensor and the description of another model."""
    description = {
        "version": 1,
        "model": {"name": "xception"} | model,
        "preprocessing": {},
        "classes": None,
        "tensors_sha256": "",
    }
    tensors = {"params/block1_conv1/kernel": np.ones((3, 3, 3, 2), np.float32)}
    safetensors.numpy.save_file(tensors, path, {"xception_jax": metadata or json.dumps(description)})


def hanging(path: Path) -> None:
    """Writes a file in which libhdf5 walks for ever: an object among the strings has the size 0."""
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = np.ones((3, 3, 3, 32), np.float32)
        file.attrs.create("layer_names", np.array(["conv", "norm"], dtype=object), dtype=h5py.string_dtype())
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 24 : heap + 32] = bytes(8)
    path.write_bytes(content)


def readers(path: Path) -> list[int]:
    """Returns the processes that read a weight file, which is an argument of theirs; only on Linux."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if b"weights.child" in command and str(path).encode() in command:
            found.append(int(directory.name))
    return found


def is_limited(process: int) -> bool:
    """Returns whether a process has limited its time, which a reader does just before it reads; only on Linux."""
    try:
        lines = Path(f"/proc/{process}/limits").read_text().splitlines()
    except OSError:  # it has ended, such as one that only starts the reader
        return False
    return any(line.startswith("Max cpu time") and "unlimited" not in line for line in lines)
