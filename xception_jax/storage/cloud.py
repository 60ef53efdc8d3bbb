"""Uses what only the packages of the extra [cloud] offer: complete listings of gs://, and Orbax on gs://."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xception_jax.errors import UserError, WorkdirError
from xception_jax.files import local_directory
from xception_jax.storage.failures import translate
from xception_jax.storage.paths import is_url, parse

if TYPE_CHECKING:
    from xception_jax.storage.store import Patience


def gs_lister(bucket: str, patience: Patience) -> Callable[[str], list[str]]:
    """Returns a function that lists the objects of a bucket in gs:// whose names begin with a prefix, without a cache.

    Not with TensorStore: its listing of gs:// takes an answer of 401, 403 or 404 for an empty page (0.1.86). A run
    without permission to list, or whose token expires between two pages, would find no checkpoints. The function
    raises the errors of google-cloud-storage, for `translate`.
    """

    @functools.cache
    def client() -> Any:
        from google.cloud import storage

        return storage.Client(project=None)  # of a bucket; without a default project, it would raise an error

    def names(prefix: str) -> list[str]:
        cloud = client()
        from google.cloud.storage.retry import DEFAULT_RETRY

        retry = DEFAULT_RETRY.with_delay(initial=patience.first_delay, maximum=patience.longest_delay, multiplier=2)
        blobs = cloud.list_blobs(
            bucket,
            prefix=prefix,
            fields="items(name),nextPageToken",
            timeout=patience.total,
            retry=retry.with_timeout(patience.total),
        )
        return [blob.name for blob in blobs]

    return names


def checkpoint_directory(path: str, where: str, unusable: type[UserError] = WorkdirError) -> str:
    """Returns the directory that an Orbax CheckpointManager can be given, for a local path or an address.

    On gs://, gcsfs caches listings by default. A process that polls for checkpoints would then take a step that has
    been deleted in the meantime for committed, so this turns the cache off.

    Args:
      path: a local path, or an address in gs://.
      where: the flag or field that gave it, for the error.
      unusable: class of the error if Orbax cannot use it.

    Raises:
      ConfigError: the path is empty or not an address.
      UserError: of the class `unusable`; Orbax does not support the store, or a package is not installed.
    """
    if not is_url(path):
        return str(local_directory(path, where))
    place = parse(path, where)
    if place.scheme != "gs":
        raise unusable(
            f"checkpoints cannot be kept in {place.scheme}://, because Orbax does not support it",
            f"{where}: {path}",
            "use a local directory, a shared file system, or gs://",
        )
    try:
        import fsspec

        importlib.import_module("gcsfs")
        importlib.import_module("google.cloud.storage")
    except ImportError as error:
        raise translate(error, place.url, "importing", unusable) from None
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return place.url
