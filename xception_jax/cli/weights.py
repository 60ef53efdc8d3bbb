"""`xception-jax weights`: lists, downloads and verifies the public weights that have a name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.names import LINE_LENGTH, in_shell, printable, printable_path
from xception_jax.native import KERNELS
from xception_jax.weights import sources
from xception_jax.weights.released import KERAS_FILES, RELEASES

EXAMPLES = """\
examples:
  xception-jax weights list
  xception-jax weights path keras/xception       (downloads it, unless it is in the cache)
  xception-jax weights verify                    (everything in the cache)
  xception-jax weights verify model.weights.h5

Every command that takes weights also takes such a name, or hf://OWNER/REPO[@REVISION][/FILE].
"""
ENVIRONMENT = """\
environment variables:
  XCEPTION_JAX_CACHE        directory of the downloaded files
  XCEPTION_JAX_OFFLINE=1    never download (HF_HUB_OFFLINE=1 does the same)
  XCEPTION_JAX_WEIGHTS_URL  mirror of https://storage.googleapis.com/tensorflow/keras-applications
  HF_ENDPOINT, HF_TOKEN     mirror of the Hugging Face Hub, and the token for private repositories
  HTTPS_PROXY, NO_PROXY     proxy
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Lists, downloads and verifies the public weights that have a name."
    parser.epilog = f"{EXAMPLES}\n{ENVIRONMENT}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    listing = actions.add_parser("list", help="list the names, and which files are in the cache")
    listing.add_argument("--json", action="store_true", help="print a JSON list")
    path = actions.add_parser("path", help="print the path of a file, which is downloaded if it is not in the cache")
    path.add_argument("name", metavar="NAME", help="a name of the list, or hf://OWNER/REPO[@REVISION][/FILE]")
    verify = actions.add_parser("verify", help="compare files with their pinned and recorded checksums")
    verify.add_argument("files", nargs="*", metavar="NAME|FILE", help="default: everything in the cache")


def run(args: argparse.Namespace) -> int:
    """Runs the action and prints its results.

    Raises:
      UserError: see `sources.find`.
    """
    _ACTIONS[args.action](args)
    return 0


def _list(args: argparse.Namespace) -> None:
    rows = list(_rows())
    if args.json:
        print(json.dumps(rows))
        return
    print(f"{'name':30}{'network':14}{'size':>8}{'top-1':>9}  {'cached':8}sum")
    for row in rows:
        top1 = "no head" if row["top1"] is None else f"{row['top1']:.1f} %"
        pins = ", ".join(row["pins"]) or "recorded at first use"
        doubt = "" if row["checked"] or not row["pins"] else " (published, not yet compared)"
        cached = "yes" if row["cached"] else "no"
        size = f"{row['size'] / 1e6:.0f} MB"
        print(f"{row['name']:30}{row['network']:14}{size:>8}{top1:>9}  {cached:8}{pins}{doubt}")
    print(f"cache: {printable_path(sources.cache_directory())}")


def _rows() -> Iterator[dict[str, Any]]:
    for name, release in RELEASES.items():
        path = sources.cached_path(name)
        fields = {"name": name} | dataclasses.asdict(release)
        yield fields | {"pins": release.pins, "path": str(path), "cached": path.exists()}


def _path(args: argparse.Namespace) -> None:
    source = sources.find(args.name)
    if not source.path.is_file():
        raise InputMissingError("there is no such weight file or name", args.name, "see `xception-jax weights list`")
    # A program gets the bytes of the path, a person sees it escaped.
    path = printable_path(source.path) if sys.stdout.isatty() else source.path
    sys.stdout.flush()
    sys.stdout.buffer.write(os.fsencode(path) + b"\n")


def _verify(args: argparse.Namespace) -> None:
    names = {sources.cached_path(name): name for name in RELEASES}
    # The compiled kernels are in the same cache.
    folders = [path for path in sources.cache_directory().glob("*") if path.name != KERNELS]
    recorded = {path.with_suffix("") for folder in folders for path in folder.rglob("*.sha256")}
    cached = sorted(path for path in recorded | names.keys() if path.exists())
    paths = [_existing(text) for text in args.files] or cached
    if not paths:
        print(f"nothing is in the cache ({printable_path(sources.cache_directory())})")
    failed = []
    for path in paths:
        name = names.get(path)
        try:
            print(f"{name or printable_path(path)}: {_verified(path, name)}")
        except BadDataError as error:
            print(f"{name or printable_path(path)}: {printable(error.what, LINE_LENGTH)}")
            failed.append(path)
    if failed:
        fix = "remove what is damaged; a name is downloaded again"
        raise BadDataError(f"{len(failed)} of {len(paths)} files are damaged", ", ".join(map(str, failed)), fix)


def _existing(text: str) -> Path:
    sources.require_known(text)
    path = sources.cached_path(text) if text in RELEASES and not Path(text).exists() else Path(text)
    if not path.is_file():
        what, fix = "there is no such file", "give a file, or a name from `xception-jax weights list`"
        if text in RELEASES:
            fix = f"download it: xception-jax weights path {in_shell(text)}"
        elif text.startswith("hf://"):
            fix = f"give the file in the cache: xception-jax weights path {in_shell(text)}"
        elif path.is_dir():
            what = "this is a directory"
        raise InputMissingError(what, str(path) if text in RELEASES else text, fix)
    return path


def _verified(path: Path, name: str | None) -> str:
    """Returns what is known about a file of the right content."""
    from xception_jax.weights.download import digest

    if name is not None:
        pins = RELEASES[name].pins
        sources.verify(path, pins, thorough=True)
        return f"has the pinned {', '.join(pins)}" if pins else "has the recorded SHA-256"
    if sources.recorded(path).exists():
        sources.verify(path, {})
        return "has the recorded SHA-256"
    released = KERAS_FILES.get(digest(path, "md5"))
    known = f"is Keras' {released}" if released else "is not one of the files in the list"
    return f"SHA-256 {digest(path, 'sha256')}, {known}"


_ACTIONS = {"list": _list, "path": _path, "verify": _verify}
