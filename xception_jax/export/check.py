"""Checks an export: runs the code of its card in a separate process, on photographs, and compares the logits."""

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
from xception_jax.errors import BadDataError, UsageError
from xception_jax.export.formats import loading_code
from xception_jax.export.inference import Infer, scaling
from xception_jax.files import open_regular, sha256
from xception_jax.user_files import reading
from xception_jax.weights.network import Network, Preprocessing

TOLERANCE = 1e-5
"""The largest accepted difference for logits up to 1; for larger logits it is relative to the largest one."""

_MAX_LINE = 1 << 16  # bytes of FILE.sha256 that are read
_BATCHES = (3, 1)  # two sizes, because an export must take any

# Runs the code of the card once for each batch, and asserts that it imports this package only explicitly.
_RUN = """\
import sys
import numpy as np

code = open("lines.txt", encoding="utf-8").read()
for number in range(int(sys.argv[1])):
    scope = {"np": np, "number": number}
    exec(code, scope)
    np.save(f"logits{number}.npy", np.asarray(scope["logits"]))
assert "xception_jax" in code or "xception_jax" not in sys.modules
"""


@dataclasses.dataclass(frozen=True)
class Difference:
    """The result of the check of an export.

    Attributes:
      largest: the largest difference between a logit of the export and of the network.
      logits: magnitude of the largest logit of the network.
      images: number of compared images.
    """

    largest: float
    logits: float
    images: int

    @property
    def accepted(self) -> bool:
        """Returns whether the export computes the same function as the network."""
        return self.largest <= TOLERANCE * max(1.0, self.logits)


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        name = os.environ.get("JAX_PLATFORMS", "")
        what = "the export is compared on the CPU, which JAX_PLATFORMS excludes"
        raise UsageError(what, f"JAX_PLATFORMS={name}", f"set JAX_PLATFORMS={name},cpu, or pass --no_check") from None


def check_export(
    path: Path, format: str, network: Network, reference: Infer, *, uint8: bool = False, name: str = ""
) -> Difference:
    """Runs an export in a separate process and compares its logits.

    Args:
      path: path of the file.
      format: format of the file.
      network: the network that was exported.
      reference: the network as a function of preprocessed images.
      uint8: whether the file takes pixels from 0 to 255.
      name: name of the file in error messages, if not `path`.

    Raises:
      BadDataError: the file cannot be run or computes something else, or the network gives logits that are not finite.
    """
    pixels = photographs(network.preprocessing)
    scale, shift = scaling(network.preprocessing)
    scaled = pixels.astype(np.float32) * scale + shift
    with jax.default_device(_cpu()):  # as the separate process does
        expected = np.asarray(reference(scaled), np.float64)
    if not np.isfinite(expected).all():
        raise BadDataError("the network gives logits that are not finite", network.source, "use another checkpoint")
    found = _run(path, format, np.split(pixels if uint8 else scaled, [_BATCHES[0]]), name or str(path))
    if found.shape != expected.shape:
        what = f"the export gives {found.shape[-1]:,} logits, and the network {expected.shape[-1]:,}"
        raise BadDataError(
            what, name or str(path), f"name the network that the file was made from, not {network.source}"
        )
    difference = Difference(float(np.abs(found - expected).max()), float(np.abs(expected).max()), len(pixels))
    if not difference.accepted:
        raise BadDataError(
            f"the export differs from the network by {difference.largest:.2g} in logits of up to"
            f" {difference.logits:.2g}",
            name or str(path),
            f"if the file was made from another network than {network.source}, name that one; otherwise export again",
        )
    return difference


def _run(path: Path, format: str, batches: list[np.ndarray], name: str) -> np.ndarray:
    """Returns the logits that a separate process computes from the file."""
    with tempfile.TemporaryDirectory() as scratch:
        for number, batch in enumerate(batches):
            np.save(Path(scratch) / f"images{number}.npy", batch)
        code = loading_code(str(path.absolute()), format, 'images = np.load(f"images{number}.npy")')
        (Path(scratch) / "lines.txt").write_text(code, encoding="utf-8")
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
        with reading("output of the export", name, "export again"):
            logits = [np.load(Path(scratch) / f"logits{number}.npy") for number in range(len(batches))]
            for found, batch in zip(logits, batches, strict=True):
                if found.ndim != 2 or len(found) != len(batch) or found.dtype.kind != "f":
                    raise ValueError(f"it is {found.dtype} of shape {found.shape} for {len(batch)} images")
        return np.concatenate(logits)


def photographs(preprocessing: Preprocessing) -> np.ndarray:
    """Returns views of the photograph of Grace Hopper that is part of Matplotlib (US Navy), uint8 [4, s, s, 3]."""
    photograph = images.decode(Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).read_bytes())
    height, width = photograph.shape[:2]
    views = (
        photograph,
        photograph[: height // 2, : width // 2],
        photograph[:, ::-1],
        photograph[height // 2 :, width // 2 :],
    )
    return np.stack([images.central_view(view, preprocessing.size, preprocessing.crop) for view in views])


def checksum_line(digest: str, name: str) -> bytes:
    """Returns the line of a file that `sha256sum --check` reads, which escapes line breaks and backslashes in names."""
    plain = name.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r")
    return os.fsencode(f"{chr(92) * (plain != name)}{digest}  {plain}\n")


def check_sha256(path: Path) -> None:
    """Compares a file with the digest in `FILE.sha256`.

    Raises:
      BadDataError: the digests differ, or FILE.sha256 cannot be read.
    """
    beside = Path(f"{path}.sha256")
    try:
        with open_regular(beside) as file:
            stored = os.fsdecode(file.read(_MAX_LINE)).split()[0].removeprefix("\\")
    except (OSError, IndexError):
        raise BadDataError("there is no digest to compare with", str(beside), "export again") from None
    found = sha256(path)
    if found != stored:
        raise BadDataError(f"the file is damaged: its SHA-256 is {found}, not {stored}", str(path), "export again")
