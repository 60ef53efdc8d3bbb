"""Copies a TFDS dataset from TFRECORD to ArrayRecord files, byte for byte and in the same order.

TFRECORD files only allow sequential reading. Their format: for each record its length (8 bytes), a checksum of the
length (4), the record, and a checksum of the record (4).
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info as tfds_dataset_info
from tqdm import tqdm

from xception_jax.data.metadata import open_builder
from xception_jax.data.prepare.directory import fingerprint_of_files, incomplete_directory
from xception_jax.data.prepare.shards import shard_template, write_array_record
from xception_jax.data.prepare.writer import Summary, existing, refuse_newer
from xception_jax.data.sources import AS_ARRAY_RECORD, is_complete
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.files import open_regular
from xception_jax.names import printable

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")


def copy_tfrecord(source: Path, data_dir: Path, *, overwrite: bool = False, progress: bool = True) -> Summary:
    """Copies a dataset to data_dir/name/version, under its own name and version.

    Args:
      source: the directory of one version, with dataset_info.json.
      data_dir: the directory of all datasets.
      overwrite: replaces an existing dataset.
      progress: shows progress on standard error.

    Raises:
      InputMissingError: the dataset or one of its files is missing.
      UsageError: the dataset is not stored as TFRECORD, or source and target are the same directory.
      BadDataError: a file is damaged or has the wrong number of records.
      StorageError: the disk is full, or the directory cannot be written.
    """
    if not is_complete(source):
        raise InputMissingError(
            f"{source} is not a TFDS dataset",
            str(source),
            "point --source at the directory of one version, such as tensorflow_datasets/imagenet2012/5.1.0",
        )
    info = open_builder(source).info
    if info.file_format != tfds.core.FileFormat.TFRECORD:
        is_ours = info.file_format == tfds.core.FileFormat.ARRAY_RECORD
        fix = "use it without a copy" if is_ours else AS_ARRAY_RECORD
        raise UsageError(f"the dataset is stored as {info.file_format.value}, not as tfrecord", str(source), fix)
    name = f"{info.name}/{info.config_name}" if info.config_name else info.name
    version = str(info.version)
    target = data_dir / name / version
    if target.resolve() == source.resolve():
        raise UsageError("the copy would replace the original", str(source), "choose another --data_dir for the copy")
    refuse_newer(name, version, data_dir)
    files = sorted(path for path in source.iterdir() if path.is_file())
    identity = fingerprint_of_files(files)
    with incomplete_directory(data_dir, name, version, overwrite=overwrite, source=identity) as partial:
        if partial is None:
            return existing(target)
        splits = [_copy_split(split, info.name, partial, progress) for split in info.splits.values()]
        for path in files:
            # Class names and similar files, but not the records or their description, which changes.
            if ".tfrecord" not in path.name and path.name != "dataset_info.json":
                shutil.copy(path, partial / path.name)
        _write_info(source, partial, splits)
    return Summary(target, {split.name: split.num_examples for split in splits}, already_there=False)


def _copy_split(split: tfds.core.SplitInfo, name: str, partial: Path, progress: bool) -> tfds.core.SplitInfo:
    template = shard_template(partial, name, split.name)
    count = len(split.shard_lengths)
    shards = zip(split.filepaths, split.shard_lengths, strict=True)
    for shard, (path, length) in enumerate(
        tqdm(shards, printable(f"{name} {split.name}"), count, disable=None if progress else True)
    ):
        copy = Path(template.sharded_filepath(shard_index=shard, num_shards=count))
        if not copy.exists():  # a process that was killed may have written it
            write_array_record(copy, _expect(read_tfrecord(Path(path)), length, path))
    return split.replace(filename_template=template)


def _expect(records: Iterator[bytes], length: int, path: os.PathLike) -> Iterator[bytes]:
    number = 0
    for number, record in enumerate(records, start=1):  # noqa: B007
        yield record
    if number != length:
        raise BadDataError(
            f"the file has {number:,} records but dataset_info.json says {length:,}", os.fspath(path), "copy it again"
        )


def _write_info(source: Path, partial: Path, splits: list[tfds.core.SplitInfo]) -> None:
    proto = tfds_dataset_info.read_proto_from_builder_dir(source)
    proto.file_format = tfds.core.FileFormat.ARRAY_RECORD.value
    del proto.alternative_file_formats[:]
    del proto.splits[:]
    proto.splits.extend(split.to_proto() for split in splits)
    (partial / "dataset_info.json").write_text(tfds_dataset_info.json_format.MessageToJson(proto, sort_keys=True))


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """Yields the records of a TFRECORD file and verifies both checksums of each.

    Raises:
      InputMissingError: the file is missing.
      BadDataError: the file is damaged or truncated.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputMissingError("a file of the dataset is missing", str(path), "copy the dataset again") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        while header := file.read(_LENGTH.size):
            at = file.tell() - len(header)
            _verify(header, file.read(_CHECKSUM.size), path, at)
            (length,) = _LENGTH.unpack(header)
            if length > size - file.tell():
                raise BadDataError(f"the record at byte {at:,} ends after the file", str(path), "copy the file again")
            record = file.read(length)
            _verify(record, file.read(_CHECKSUM.size), path, at)
            yield record


def _verify(data: bytes, checksum: bytes, path: Path, at: int) -> None:
    crc = google_crc32c.value(data)
    # The format masks (rotates and shifts) checksums, because a CRC of data that contains CRCs is problematic.
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if len(checksum) != _CHECKSUM.size or _CHECKSUM.unpack(checksum)[0] != masked:
        raise BadDataError(f"the record at byte {at:,} is damaged or truncated", str(path), "copy the file again")
