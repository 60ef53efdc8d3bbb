"""Opens Orbax's manager of a directory of checkpoints, on a file system or in gs://."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp

from xception_jax.storage import is_url
from xception_jax.training import digest
from xception_jax.training.digest import DigestHandler
from xception_jax.training.preservation import LatestOrBest


def open_manager(
    directory: Path, policy: LatestOrBest, read_only: bool, before_commit: Callable[[], None] | None
) -> ocp.CheckpointManager:
    """Opens the manager of a directory.

    In a bucket, the caller deletes what killed runs left, and old steps: Orbax deletes their objects in any order.

    Args:
      directory: parent of the steps.
      policy: the steps that are kept on a file system.
      read_only: whether to leave all files as they are.
      before_commit: called in the background on process 0, just before a step is committed.

    Raises:
      OSError: the directory cannot be created or read. In a bucket, this can be any exception.
    """
    in_bucket = is_url(directory)
    options = ocp.CheckpointManagerOptions(
        read_only=read_only,  # also disables the next option
        cleanup_tmp_directories=not in_bucket,  # left behind by a killed process
        preservation_policy=None if in_bucket else policy,
        lightweight_initialize=True,  # does not read metrics, see LatestOrBest
        # Before a save into a bucket, Orbax would send requests for which training would wait.
        file_options=ocp.options.FileOptions(**({"skip_sync_file_validations": True} if in_bucket else {})),
        async_options=ocp.AsyncOptions(
            # On a read-only disk, this would delay the exit by 300 seconds.
            create_directories_asynchronously=in_bucket,
            post_finalization_callback=before_commit,
        ),
    )
    # In this order: the digest covers the files of the state.
    handlers = {digest.STATE: ocp.StandardCheckpointHandler(), digest.ITEM: DigestHandler()}
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
