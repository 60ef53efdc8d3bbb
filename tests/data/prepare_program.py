"""Prepares ImageNet in many small shards, slowly. Arguments: --source and --data_dir; `run` is also called in tests."""

import sys
import time
from pathlib import Path

from xception_jax.data.prepare import shards, sorting, writer
from xception_jax.data.prepare.imagenet import imagenet2012
from xception_jax.errors import UserError


def run(source: Path, data_dir: Path, *, pause: float = 0.0) -> Path:
    """Prepares the dataset with a pause before each image, and before each shard."""
    sorting.BUCKET_MEMORY = 20_000
    shards.shard_utils.ShardConfig.min_shard_size = 10_000
    dataset, write = imagenet2012(source), shards.write_array_record

    def slowly(examples):
        for example in examples:
            time.sleep(pause / 10)
            yield example

    def write_slowly(path, records):
        time.sleep(pause)
        write(path, records)

    dataset = writer.dataclasses.replace(
        dataset, splits={name: slowly(examples) for name, examples in dataset.splits.items()}
    )
    shards.write_array_record = write_slowly
    try:
        return writer.write_dataset(dataset, data_dir).path
    finally:
        shards.write_array_record = write


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]), pause=0.1)
    except UserError as error:
        sys.exit(f"{error}")
