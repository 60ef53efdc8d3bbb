"""Reads bytes as each kind of file that a stranger may give: the only place that knows which reader that is.

Each function takes the content of a file, and may raise only a `UserError`. Another exception, much time, much memory
and the end of the process are finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import google_crc32c
import numpy as np

from xception_jax.errors import BadDataError

SEPARATOR = b"\n%%\n"
"""Stands between the files of targets that read several."""


@functools.cache
def scratch() -> Path:
    """Returns a directory in memory, if there is one, for the files of this process."""
    directory = tempfile.TemporaryDirectory(prefix="fuzz", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    scratch.directory = directory  # type: ignore[attr-defined]  # it is removed with the process
    return Path(directory.name)


@contextlib.contextmanager
def file(data: bytes, name: str) -> Iterator[Path]:
    """Writes a file."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    yield path


def image(data: bytes) -> None:
    """Decodes an image."""
    from xception_jax.data import images

    try:
        pixels = images.decode(data, images.Limits(max_pixels=1 << 22))
    except images.DamagedImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.size <= 3 << 22


def weights(data: bytes, suffix: str) -> None:
    """Loads a weight file of any kind, as users do: HDF5 is parsed in a process of its own, which may hang or crash.

    Many files make libhdf5 hang, so this process has a tenth of the processor time that it has for users.
    """
    from xception_jax.weights import isolation, load_network

    limits = dataclasses.replace(isolation.Limits.of(len(data)), cpu=1)
    with (
        file(data, f"weights{suffix}") as path,
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(isolation.Limits, "of", return_value=limits),
    ):
        load_network(path)


def safetensors(data: bytes) -> None:
    """Loads our safetensors or timm's in this process, so that its lines guide the mutations."""
    from xception_jax.weights import own
    from xception_jax.weights.content import SAFETENSORS
    from xception_jax.weights.load import import_content
    from xception_jax.weights.parse import parse_file

    with file(data, "weights.safetensors") as path:
        content = parse_file(path)
        if content.format != SAFETENSORS:
            return
        if own.METADATA in content.texts:
            own.from_tensors(content.tensors, content.texts, str(path), "")
        else:
            import_content(content, path, None, None)


def config(data: bytes) -> None:
    """Reads the config.json of a run."""
    from xception_jax.config import from_json

    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    from_json(text)


def metrics(data: bytes) -> None:
    """Reads the metrics of a run, and repairs them as a run does that resumes."""
    from xception_jax.logs.metrics_log import MetricsLog, read_metrics

    with file(data, "metrics.jsonl") as path:
        before = read_metrics(path)
        MetricsLog(path, step=1 << 62).close()
        assert len(read_metrics(path)) <= len(before)


def manifest(data: bytes) -> None:
    """Verifies a directory with this manifest."""
    from xception_jax.training import manifest

    with file(data, f"checkpoint/{manifest.NAME}") as path:
        with contextlib.suppress(manifest.DamagedError):
            manifest.compare_files(path.parent, manifest.read_content(path)["files"])


def masked_crc(data: bytes) -> bytes:
    """Returns the checksum of TFRECORD files."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(data: bytes) -> None:
    """Reads records, once as they are and once with a correct checksum for the first length."""
    from xception_jax.data.prepare.tfrecord import read_tfrecord

    for content in (data, data[:8] + masked_crc(data[:8]) + data[12:]):
        with file(content, "a.tfrecord") as path, contextlib.suppress(BadDataError):
            assert sum(len(record) for record in read_tfrecord(path)) <= len(content)


def array_record(data: bytes) -> None:
    """Opens a shard whose first and last block begin with the two halves of the data, and reads its records.

    The second time, the headers of both blocks and of their first chunks have correct checksums.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    from tests.fuzz.riegeli import BLOCK_HEADER, CHUNK_HEADER, signed
    from xception_jax.data import shards

    head, _, tail = data.partition(SEPARATOR)
    content = head[:65536].ljust(65536, b"\0") + tail[:65536].ljust(65536, b"\0")
    first_chunks = BLOCK_HEADER, BLOCK_HEADER + CHUNK_HEADER, 65536 + BLOCK_HEADER
    for shard in (content, signed(content, first_chunks)):
        with file(shard, "a.array_record") as path, contextlib.suppress(BadDataError):
            count = shards._count_records(str(path))
            reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768)
            for index in range(min(count, 100)):
                with contextlib.suppress(RuntimeError):  # which `TfdsSource` converts
                    reader.read([index])
            with contextlib.suppress(RuntimeError):
                reader.close()


def dataset(data: bytes) -> None:
    """Opens a dataset: dataset_info.json, features.json, label.labels.txt, and the record that its shard repeats."""
    from tests.fuzz.seeds import shard
    from xception_jax.data.prepare.shards import write_array_record
    from xception_jax.data.sources import TfdsSource, check_labels

    parts = (*data.split(SEPARATOR, 3), b"", b"", b"")
    for name, part in zip(("dataset_info.json", "features.json", "label.labels.txt"), parts, strict=False):
        with file(part, f"photos/{name}") as path:
            if not part and name.endswith(".txt"):
                path.unlink()
    with file(shard(), "photos/photos-train.array_record-00000-of-00001") as path:
        if parts[3]:
            write_array_record(path, [parts[3]] * 6)
        source = TfdsSource(path.parent, "train")
        check_labels(source)
        source.__getitems__([0, 5])


def archive(data: bytes) -> None:
    """Reads an archive, and those in it, as those of ImageNet."""
    from xception_jax.data.prepare.archives import members

    with file(data, "a.tar") as path:
        for member in members("a.tar", path=path):
            if not member.name.endswith(".tar"):
                member.read()
                continue
            for inner in members(member.name, stream=member.file, size=member.size):
                assert len(inner.read()) <= len(data) * 64


def arguments(data: bytes) -> None:
    """Parses a command line, one argument a line, and the config that it names, but runs nothing."""
    from xception_jax.cli import parse
    from xception_jax.command_line import read_config
    from xception_jax.config import resolve
    from xception_jax.config.fields import duration_in_steps

    # The system ends an argument at a zero, and passes on bytes that are no UTF-8.
    argv = [os.fsdecode(argument.split(b"\0")[0]) for argument in data.split(b"\n")]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            args = parse(argv)
        except SystemExit as end:
            if end.code:  # it is None or 0 after --help and --version
                raise AssertionError(f"exit code {end.code}") from end
            return
    # Other configs are files, which would run.
    if re.fullmatch(r"(fashion_mnist|imagenet)(:\w*)?", getattr(args, "config", None) or ""):
        config = resolve(read_config(args.config, args.overrides))
        for duration in (config.duration, config.log_every, config.evaluation.every, config.checkpoint.every):
            duration_in_steps(duration, config.batch_size, num_examples=50_000)
