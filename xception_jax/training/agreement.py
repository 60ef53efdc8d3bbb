"""Checks, before training, that all processes of a run have the same config, code, data and work directory."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from xception_jax.config import ExperimentConfig, flatten, to_json
from xception_jax.errors import ConfigError, InputMissingError, WorkdirError
from xception_jax.processes import agree, gather, together
from xception_jax.training.fingerprint import versions
from xception_jax.training.run_directory import RunDirectory

# Fields that may differ between hosts: each has its own number and may have its own copy of the data.
_OF_A_HOST = ("distributed.", "data.data_dir")
_VISIBLE_SECONDS = 10.0  # a network file system may show a new file late


def agree_on_config_and_code(config: ExperimentConfig) -> None:
    """Raises ConfigError on all processes unless they have the same config, package versions and source files."""
    if not jax.distributed.is_initialized():
        return
    fields = flatten(json.loads(to_json(config)))
    fields = {f"config.{name}": value for name, value in fields.items() if not name.startswith(_OF_A_HOST)}
    agree("config", "configs", fields, ConfigError, "start the same command on every host")
    code = versions() | {"source files": _source_digest()}
    agree("code", "code", code, ConfigError, "install the same versions on every host")


def agree_on_weights(name: str, found: Mapping[str, Any]) -> None:
    """Raises InputMissingError on all processes unless they have found the same in `config.init.weights`."""
    fix = "copy the same weights to every host, or read them from a shared directory"
    agree(name, "initial weights", found, InputMissingError, fix)


def agree_on_data(fingerprint: str) -> None:
    """Raises InputMissingError on all processes unless they read the same dataset."""
    fix = "prepare the dataset once and copy it to every host, or read it from a shared directory"
    agree("data", "datasets", {"fingerprint": fingerprint}, InputMissingError, fix)


def check_shared(directory: RunDirectory) -> None:
    """Raises WorkdirError on all processes unless all of them see what process 0 writes into the directory."""
    if not jax.distributed.is_initialized():
        return
    primary = jax.process_index() == 0
    (nonce, *_) = gather("nonce", uuid.uuid4().hex)
    name = f"shared-{nonce}.tmp"
    path, store = directory.files, directory.store
    proof = path / name

    def write() -> None:
        if primary and store is None:
            proof.touch()
        elif primary and store is not None:
            store.put(name, b"")

    def is_seen() -> bool:
        if store is not None:
            return store.exists(name)
        return proof.exists() or str(proof) in map(str, path.glob("shared-*.tmp"))  # glob: stats may be cached

    def look() -> None:
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not is_seen():
            if time.monotonic() > deadline:
                raise WorkdirError(
                    "the work directory is not shared: this host does not see what process 0 wrote",
                    directory.shown,
                    "choose a directory on a file system that all hosts share",
                )
            time.sleep(0.2)

    try:
        together("write", write)
        together("look", look)
    finally:
        if primary and store is None:
            proof.unlink(missing_ok=True)
        elif primary and store is not None:
            store.delete(name)


def _source_digest() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
