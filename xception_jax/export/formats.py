"""The formats of exports: writes a network in each, and gives the lines of code that load it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp

from xception_jax.errors import UsageError
from xception_jax.export.inference import make_inference
from xception_jax.files import write_atomically
from xception_jax.names import escaped
from xception_jax.weights.network import Network

PLATFORMS = ("cpu", "cuda", "tpu")

# The code that loads a file and runs it. The card shows it, and the check runs it on its own images.
_LOADING = {
    "stablehlo": """\
from jax import export

{images}
network = export.deserialize(bytearray(open({file}, "rb").read()))
logits = network.call(images)""",
    "onnx": """\
import onnxruntime

{images}
network = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])
(logits,) = network.run(["logits"], {{"images": images}})""",
    "safetensors": """\
import jax
from xception_jax.models import create_model
from xception_jax.weights import load_network

{images}
network = load_network({file})
logits, endpoints = jax.jit(create_model(network.model).apply)(network.variables, images)""",
}


def loading_code(file: str, format: str, images: str) -> str:
    """Returns the code that loads a file and runs it on the images that the line `images` makes."""
    return _LOADING[format].format(file=_literal(file), images=images)


def _literal(text: str) -> str:
    """Returns Python code for a text, in double quotes if it has none; what is not visible is escaped."""
    code = escaped(repr(text))
    return f'"{code[1:-1]}"' if code[0] == "'" and '"' not in code else code


def write_network(network: Network, path: Path, format: str, *, uint8: bool = False) -> None:
    """Writes a network as one file.

    Args:
      network: the network.
      path: the file.
      format: 'stablehlo' or 'onnx', which contain a function from images to logits, or 'safetensors', weights.
      uint8: whether the function takes pixels from 0 to 255; not for 'safetensors'.

    Raises:
      UsageError: the network is too large for the format, or its images are turned, which the format cannot do.
      InputMissingError: a package that the format needs is not installed.
      OSError: the file could not be written.
    """
    if network.preprocessing.turn is not None and format != "safetensors":
        what = f"the network was trained on turned images (config.data.turn), which {format} files do not turn"
        raise UsageError(what, network.source, "export it as safetensors, which records the turn")
    if format == "stablehlo":
        write_atomically(path, to_stablehlo(network, uint8=uint8))
    elif format == "onnx":
        from xception_jax.export.onnx_graph import to_onnx  # the package `onnx` is an extra

        write_atomically(path, to_onnx(network, uint8=uint8))
    else:
        from xception_jax.weights import save_network

        save_network(path, network)


def to_stablehlo(network: Network, *, uint8: bool = False) -> bytes:
    """Returns a serialized `jax.export.Exported` for any batch size and for the platforms in `PLATFORMS`.

    It contains plain StableHLO only, with the fastest lowering of convolutions for each platform (ops/conv.py).
    """
    (batch,) = jax.export.symbolic_shape("b")
    size = network.preprocessing.size
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8 if uint8 else jnp.float32)
    with _for_other_machines():
        infer = make_inference(network, uint8=uint8)
        exported = jax.export.export(jax.jit(infer), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


@contextlib.contextmanager
def _for_other_machines() -> Iterator[None]:
    """Makes exports portable: no calls of kernels built on this machine, and no paths of this machine in locations."""
    name, lines = "XCEPTION_JAX_CPU_KERNELS", "jax_traceback_in_locations_limit"
    before, limit = os.environ.get(name), getattr(jax.config, lines)
    os.environ[name] = "0"
    jax.config.update(lines, 0)
    try:
        yield
    finally:
        jax.config.update(lines, limit)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
