"""Times what a new user does first, on a clean machine with an empty HOME: python -m benchmarks.first_hour --help.

Installs the package into a new virtual environment, and runs each command there as a user would. Without a network
connection to the servers of weights, `--weights random` takes the same network with random weights: times are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorials" / "quickstart.ipynb"

RANDOM_WEIGHTS = """
import os
os.environ["XCEPTION_JAX_CPU_KERNELS"] = "0"  # they are built in the first step that is timed
import jax, numpy as np, sys
from xception_jax.config import resolve_model
from xception_jax.models import create_model
from xception_jax.weights import Network, Preprocessing, save_network
model = resolve_model({"name": "xception"})
variables = create_model(model).init(jax.random.key(0), np.zeros((1, 299, 299, 3), np.float32))
variables = jax.tree.map(np.asarray, variables)
save_network(sys.argv[1], Network(model, variables, Preprocessing(), None, "random", ""))
"""

PHOTOGRAPHS = """
import pathlib, sys
from PIL import Image
from sklearn.datasets import load_sample_images
import numpy as np, skimage.data
folder, side = pathlib.Path(sys.argv[1]), 160
pictures = {name: getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")}
pictures |= dict(zip(("temple", "flower"), load_sample_images().images))
rng = np.random.default_rng(0)
for name, picture in pictures.items():
    (folder / name).mkdir(parents=True)
    height, width = picture.shape[0] - side, picture.shape[1] - side
    for region in range(10):  # crops of one region overlap: they are a group
        top, left = rng.integers(height - 8), rng.integers(width - 8)
        for crop in range(4):
            y, x = top + rng.integers(8), left + rng.integers(8)
            Image.fromarray(picture[y : y + side, x : x + side]).save(folder / name / f"region{region}_{crop}.jpg")
"""


class Machine:
    """A virtual environment and an empty HOME in a directory.

    Args:
      directory: an empty directory.
    """

    def __init__(self, directory: Path):
        self.directory, self.python = directory, directory / "venv" / "bin" / "python"
        home = directory / "home"
        home.mkdir()
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "PIP_", "SSL_", "HTTP"))}
        self.environment = kept | {"HOME": str(home), "PYTHONNOUSERSITE": "1"}

    def run(self, *command: object) -> None:
        """Runs a command in the directory; its output is shown only if it fails.

        Raises:
          SystemExit: the command failed.
        """
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.directory, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stdout[-4000:]}")

    def xception(self, *arguments: object) -> None:
        """Runs `xception-jax ARGUMENTS`."""
        self.run(self.python.with_name("xception-jax"), *arguments)


def steps(machine: Machine, weights: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields what a new user does, as (description, function)."""

    def install() -> None:
        machine.run(sys.executable, "-m", "venv", machine.directory / "venv")
        machine.run(machine.python, "-m", "pip", "install", "--quiet", f"{ROOT}[onnx]")

    yield "install the package with its dependencies", install
    # Not timed: what the user has already, and what only this script needs.
    machine.run(
        machine.python, "-m", "pip", "install", "--quiet", "nbclient", "ipykernel", "scikit-learn", "scikit-image"
    )
    machine.run(machine.python, "-c", PHOTOGRAPHS, "photos")
    if weights == "random":
        weights = str(machine.directory / "random.safetensors")
        machine.run(machine.python, "-c", RANDOM_WEIGHTS, weights)
    photo = "photos/chelsea/region0_0.jpg"

    yield (
        "predict the first photograph (builds the kernels)",
        lambda: machine.xception("predict", "--weights", weights, photo),
    )
    yield "predict another one", lambda: machine.xception("predict", "--weights", weights, photo)
    yield (
        "train the small Xception on the shipped images",
        lambda: machine.xception("train", "--config=fashion_mnist", "--workdir=first"),
    )
    execute = (
        "import nbformat, nbclient, sys; nb = nbformat.read(sys.argv[1], 4); "
        "nb.cells = [c for c in nb.cells if 'skip-execution' not in c.metadata.get('tags', [])]; "
        "nbclient.NotebookClient(nb, timeout=1200).execute()"
    )
    yield "run the quickstart notebook", lambda: machine.run(machine.python, "-c", execute, NOTEBOOK)
    prepare = ("prepare", "image_folder", "--source", "photos", "--name", "photos", "--groups", r"(.+/region\d+)_")
    yield "divide a folder of 200 photographs by groups", lambda: machine.xception(*prepare)
    start = ("--config.data.name=photos", f"--config.init.weights={weights}")
    yield (
        "fine-tune the classifier at 299 pixels, on features that are computed once",
        lambda: machine.xception("train", "--config=finetune:head", "--workdir=head", *start),
    )
    yield "judge it on the test split", lambda: machine.xception("evaluate", "head", "--split", "test")
    yield (
        "explain five photographs",
        lambda: machine.xception(
            "explain", "--weights", "head", *(f"photos/{n}/region1_0.jpg" for n in CLASSES), "--out=why.png"
        ),
    )
    yield "export it as ONNX", lambda: machine.xception("export", "head", "head.onnx", "--format=onnx")
    yield "convert it to a file of Keras", lambda: machine.xception("convert", "head", "head.weights.h5")


CLASSES = ("astronaut", "coffee", "chelsea", "temple", "flower")


def main() -> None:
    """Runs the steps and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="keras/xception", help="file or name of Xception's weights, or 'random'")
    parser.add_argument("--json", metavar="FILE", help="also write the seconds of each step")
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        print("| step | seconds |\n|---|---|", flush=True)
        for name, step in steps(Machine(Path(directory)), args.weights):
            start = time.monotonic()
            step()
            seconds[name] = round(time.monotonic() - start, 1)
            print(f"| {name} | {seconds[name]:.0f} |", flush=True)
    print(f"| all | {sum(seconds.values()):.0f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
