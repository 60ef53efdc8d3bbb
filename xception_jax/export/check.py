"""The check of an export: it is run by a process of its own, as its card says, on photographs, and compared."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.cbook
import numpy as np

from xception_jax.data import images
from xception_jax.errors import BadDataError
from xception_jax.export.formats import loading_code
from xception_jax.export.inference import Infer, scaling
from xception_jax.files import sha256
from xception_jax.weights.network import Network, Preprocessing

TOLERANCE = 1e-5
"""The largest difference that is accepted, where logits are at most 1; of larger ones the same share."""

_BATCHES = (3, 1)  # two sizes, because any is promised

# Runs the lines of the card, once for each batch. They import this package only where they say so.
_RUN = """\
import sys
import numpy as np

code = open("lines.txt").read()
for number in range(int(sys.argv[1])):
    scope = {"np": np, "number": number}
    exec(code, scope)
    np.save(f"logits{number}.npy", np.asarray(scope["logits"]))
assert "xception_jax" in code or "xception_jax" not in sys.modules
"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """What the check of an export found.

    Attributes:
      largest: difference between a logit of the export and of the network.
      logits: the largest logit of the network, by magnitude.
      images: how many were compared.
    """

    largest: float
    logits: float
    images: int

    @property
    def accepted(self) -> bool:
        """Whether the export computes what the network does."""
        return self.largest <= TOLERANCE * max(1.0, self.logits)


def check_export(
    path: Path, format: str, network: Network, reference: Infer, *, uint8: bool = False, name: str = ""
) -> Difference:
    """Runs an export in a process of its own and compares its logits.

    Args:
      path: of the file.
      format: of the file.
      network: what it was made from.
      reference: the network as a function of preprocessed images.
      uint8: the file takes pixels of 0 to 255.
      name: of the file in an error, if it will have another.

    Raises:
      BadDataError: it cannot be read, or computes something else; or the network gives no finite logits.
    """
    pixels = photographs(network.preprocessing)
    scale, shift = scaling(network.preprocessing)
    scaled = pixels.astype(np.float32) * scale + shift
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the process below runs there too
        expected = np.asarray(reference(scaled), np.float64)
    if not np.isfinite(expected).all():
        raise BadDataError("the network gives logits that are not finite", network.source, "take another checkpoint")
    found = _run(path, format, np.split(pixels if uint8 else scaled, [_BATCHES[0]]), name or str(path))
    difference = Difference(float(np.abs(found - expected).max()), float(np.abs(expected).max()), len(pixels))
    if not difference.accepted:
        raise BadDataError(
            f"the export differs from the network by {difference.largest:.2g} in logits of up to"
            f" {difference.logits:.2g}",
            name or str(path),
            f"take the network that it was made from, if {network.source} is another; else its weights are extreme",
        )
    return difference


def _run(path: Path, format: str, batches: list[np.ndarray], name: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        for number, batch in enumerate(batches):
            np.save(Path(scratch) / f"images{number}.npy", batch)
        code = loading_code(str(path.absolute()), format, 'images = np.load(f"images{number}.npy")')
        (Path(scratch) / "lines.txt").write_text(code)
        environment = dict(os.environ)
        environment["JAX_PLATFORMS"] = "cpu"  # an accelerator may be held by this process
        if format == "safetensors":
            root = str(Path(__file__).parents[2])
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        command = [sys.executable, "-c", _RUN, str(len(batches))]
        process = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            raise BadDataError(f"the file cannot be run: {lines[-1]}", name, "export again")
        return np.concatenate([np.load(Path(scratch) / f"logits{number}.npy") for number in range(len(batches))])


def photographs(preprocessing: Preprocessing) -> np.ndarray:
    """Returns [4, s, s, 3] uint8: views of the photograph of Grace Hopper that comes with Matplotlib (US Navy)."""
    photograph = images.decode(Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes())
    height, width = photograph.shape[:2]
    views = (
        photograph,
        photograph[: height // 2, : width // 2],
        photograph[:, ::-1],
        photograph[height // 2 :, width // 2 :],
    )
    return np.stack([images.central_view(view, preprocessing.size, preprocessing.crop) for view in views])


def check_sha256(path: Path) -> str:
    """Compares a file with the digest beside it, `FILE.sha256`, and returns it.

    Raises:
      BadDataError: they differ, or the digest cannot be read.
    """
    beside = Path(f"{path}.sha256")
    try:
        stored = beside.read_text().split()[0]
    except (OSError, UnicodeDecodeError, IndexError):
        raise BadDataError("there is no digest to compare with", str(beside), "export again") from None
    found = sha256(path)
    if found != stored:
        raise BadDataError(f"the file is damaged: its SHA-256 is {found}, not {stored}", str(path), "export again")
    return found
