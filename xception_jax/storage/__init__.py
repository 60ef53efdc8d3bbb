"""Stores files and small objects on a local disk, in gs:// and in s3://, behind one interface."""

from xception_jax.storage.cloud import checkpoint_directory
from xception_jax.storage.failures import translate
from xception_jax.storage.lease import Lease, Owner, hold
from xception_jax.storage.mirror import Mirror
from xception_jax.storage.paths import is_url, join, names_object_store
from xception_jax.storage.store import ABSENT, Entry, Patience, Store, open_store

__all__ = [
    "ABSENT",
    "Entry",
    "Lease",
    "Mirror",
    "Owner",
    "Patience",
    "Store",
    "checkpoint_directory",
    "hold",
    "is_url",
    "join",
    "names_object_store",
    "open_store",
    "translate",
]
