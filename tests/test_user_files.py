"""Whatever a file of a user holds, its reader answers in three lines. A new reader is one line in `READERS`."""

from __future__ import annotations

import io
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from xception_jax import user_files
from xception_jax.cli.convert import _model, _read_names
from xception_jax.command_line import read_config
from xception_jax.config import ExperimentConfig, from_json, load_config, to_json
from xception_jax.data.prepare.groups import read_groups
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UserError
from xception_jax.evaluation.compare import compare_files
from xception_jax.evaluation.features import load_features
from xception_jax.evaluation.real import load_real_labels
from xception_jax.export.card import read_evaluation
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.metrics.predictions import load_predictions
from xception_jax.runs import open_run
from xception_jax.study.power import plan_seeds
from xception_jax.study.store import read_study
from xception_jax.study.study_file import load_study
from xception_jax.training.workdir import open_workdir


def _inside(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Returns a reader of a directory that has the file under this name."""

    def read_directory(path: Path) -> object:
        directory = path.parent / f"{path.name}.directory"
        directory.mkdir(exist_ok=True)
        if os.path.lexists(path):
            os.rename(path, directory / name)
        return read(directory)

    return read_directory


def _open_workdir(path: Path) -> None:
    with open_workdir(path, ExperimentConfig()):
        pass


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_config,
    "config.json of a run": _inside("config.json", lambda path: open_run(str(path))),
    "config.json of a run that resumes": _inside("config.json", _open_workdir),
    "--config": lambda path: read_config(f"{path}.py", []),
    "study": lambda path: load_study(f"{path}.py"),
    "study.json": _inside("study.json", lambda path: read_study(path)),
    "metrics.jsonl": read_metrics,
    "metrics.jsonl.xz": lambda path: read_metrics(f"{path}.xz"),
    "--real": lambda path: load_real_labels(path, 1000),
    "--evaluation": lambda path: read_evaluation(path, None),
    "--compare": lambda path: compare_files(str(path), str(path)),
    "predictions": load_predictions,
    "features": load_features,
    "--model": lambda path: _model(str(path)),
    "--classes": lambda path: _read_names(path),
    "cells.csv": lambda path: plan_seeds(path, 0.005),
    "--groups": lambda path: read_groups(f"{path}.csv", ["a.png"]),
}
# Readers that accept more: damaged lines are left out, any text may be a name, and a config without a checkpoint may be
# replaced.
LENIENT = ("metrics.jsonl", "--classes", "config.json of a run that resumes")
# A run that has no config yet gets one.
MAY_BE_MISSING = ("metrics.jsonl", "metrics.jsonl.xz", "config.json of a run that resumes")


def _zip_with_array(header: dict, content: bytes) -> bytes:
    """Returns an .npz with an array whose header may lie."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, header)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("index", "label", "classes", "probabilities", "features", "path", "weights"):
            archive.writestr(f"{name}.npy", array.getvalue() + content)
    return buffer.getvalue()


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "null": b"null",
    "list": b"[1]",
    "list of numbers": b"[1, 2]",
    "number": b"3",
    "text": b"abc\n",
    "not UTF-8": "h\u00e4".encode("latin-1"),
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested a little too much": b'{"a":' * 100 + b"1" + b"}" * 100,
    "other objects": b'{"seconds": "abc", "step": 1, "split": "dev", "model": [], "study": 3, "costs": [1]}',
    "wrong types": b'{"model": {"name": ["xception"]}, "count": [], "top1": "x", "study": {}, "costs": {}}',
    "huge number": b"9" * 5000,
    "infinite": b'{"batch_size": 1e999}',
    "NaN": b'{"count": NaN, "top1": NaN}',
    "twice": b'{"batch_size": 1, "batch_size": 2}',
    "zip": _zip_with_array({"descr": "<f4", "fortran_order": False, "shape": (3,)}, bytes(12)),
    "lying array": _zip_with_array({"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**3)}, b""),
    "empty strings": _zip_with_array({"descr": "<U0", "fortran_order": False, "shape": (10**12,)}, b""),
    "npy": b"\x93NUMPY\x01\x00" + bytes(100),
    "object array": _zip_with_array({"descr": "|O", "fortran_order": False, "shape": (3,)}, bytes(24)),
}
KINDS = (*CONTENTS, "missing", "directory", "fifo", "loop")


def make(path: Path, kind: str) -> None:
    match kind:
        case "missing":
            pass
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case _:
            path.write_bytes(CONTENTS[kind])


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_answers_in_three_lines(reader, tmp_path):
    silent = []
    for number, kind in enumerate(KINDS):
        path = tmp_path / str(number)
        make(path, kind)
        suffix = {"--config": ".py", "study": ".py", "--groups": ".csv", "metrics.jsonl.xz": ".xz"}.get(reader)
        if suffix and os.path.lexists(path):
            os.rename(path, f"{path}{suffix}") if kind != "loop" else Path(f"{path}{suffix}").symlink_to(path)
        try:
            READERS[reader](path)
        except UserError as error:
            lines = str(error).splitlines()
            assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"], (kind, lines)
            assert len(lines[0]) < 1000, (kind, lines)
        else:
            silent.append(kind)
    if reader in MAY_BE_MISSING:
        silent.remove("missing")
    assert not silent or reader in LENIENT
    assert not {"missing", "directory", "fifo", "loop"}.intersection(silent)


# Parsers that do not use `user_files`, with the reason.
OTHER_PARSERS = {
    "user_files.py": "the one place",
    "data/imagenet_classes.py": "a file of the package",
    "data/prepare/imagenet.py": "a file of TensorFlow Datasets",
    "environment.py": "/proc",
    "export/check.py": "a digest, and arrays of our own process",
    "reports/environment.py": "a file of the package",
    "study/study_file.py": "what was written by json.dumps",
    "study/dial/design.py": "what was written by json.dumps",
    "study/dial/records.py": "text that user_files has read",
    "study/runner.py": "a log, whose damaged bytes are replaced",
    "study/cells.py": "what was written by json.dumps",
    "training/checkpoint.py": "a record and a reason in a checkpoint, see tests/training",
    "training/journal.py": "what process 0 wrote by json.dumps",
    "training/features.py": "a cache with checksums, in the work directory",
    "training/manifest.py": "sealed by a digest",
    "training/restore.py": "sealed by a digest",
    "training/summary.py": "/proc",
    "roll_call.py": "what another process of the run wrote by json.dumps",
    "study/power.py": "text that user_files has read",
    "study/turns.py": "text that user_files has read",
    "processes.py": "what another process of the run wrote by json.dumps",
    "training/agreement.py": "what was written by json.dumps",
    "training/digest.py": "sealed by a digest, see tests/training",
    "storage/lease.py": "an object in a bucket, see tests/storage",
    "data/shards.py": "the headers of shards, see tests/data",
    "training/workdir.py": "the lock, and what was written by json.dumps",
    "logs/trackers.py": "inside of a tracker, which may fail in any way",
    "ops": "the cache of the kernels, see tests/ops",
    "data/prepare/groups.py": "text that user_files has read",
    "weights": "files of weights, see tests/weights",
}


def test_no_reader_is_missing_in_the_table():
    """A reader that parses by itself would have to find out again what a stranger's file can do."""
    parses = re.compile(r"json\.loads?\(|\.read_text\(|np\.load\(|csv\.(?:Dict)?[rR]eader\(")
    package = ROOT / "xception_jax"
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if parses.search(path.read_text())]
    missing = [name for name in files if not {name, name.split("/")[0]}.intersection(OTHER_PARSERS)]
    assert not missing, "use user_files.reading and add a line to READERS, or to OTHER_PARSERS"


def test_text_may_begin_with_a_byte_order_mark_and_old_configs_open(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + to_json(ExperimentConfig()).encode())
    assert load_config(path) == ExperimentConfig()
    assert from_json('{"batch_size": 7}').batch_size == 7


def test_the_size_is_limited_before_anything_is_parsed(tmp_path):
    path = tmp_path / "large.json"
    path.write_bytes(b'{"a": "' + b"x" * 1000 + b'"}')
    assert user_files.read_json(path, dict, limit=2000)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        user_files.read_json(path, dict, limit=1000)


@pytest.mark.parametrize("kind", ["missing", "directory", "read-only", "device", "pipe"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(kind, tmp_path):
    path = tmp_path / "out" / "file.csv"
    if kind == "directory":
        path.mkdir(parents=True)
    elif kind == "read-only":
        path = Path("/proc/self/file.csv")
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "pipe":
        path.parent.mkdir()
        os.mkfifo(path)
    with pytest.raises(InputMissingError if kind == "missing" else StorageError) as raised:
        user_files.require_directory(path)
    assert len(str(raised.value).splitlines()) == 3


def test_an_output_may_be_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    link, target = tmp_path / "file.csv", tmp_path / "large" / "file.csv"
    link.symlink_to(target)
    for content in ("a", "b"):
        user_files.require_directory(link)
        user_files.write_output("table", link, content)
        assert link.is_symlink()
        assert target.read_text() == content
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "file.csv")
    with pytest.raises(InputMissingError, match="no directory"):
        user_files.require_directory(link)


def test_whatever_a_library_raises_is_blamed_on_the_file():
    for error in (KeyError("a"), RecursionError(), OverflowError("x"), AttributeError("y"), MemoryError(), Exception()):
        with pytest.raises(BadDataError, match="the table cannot be read"), user_files.reading("table", "here", "fix"):
            raise error
    with pytest.raises(StorageError), user_files.reading("table", "here", "fix"):
        raise OSError(5, "Input/output error")


def test_reading_reserves_no_more_than_the_file_needs(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        assert len(user_files.read_bytes(path, 1 << 31)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="more than 999 bytes"):
        user_files.read_bytes(path, 999)
