"""Reads, writes, lists and deletes objects below one directory, on a local disk, in gs:// or in s3://."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xception_jax.errors import StorageError, UserError, WorkdirError
from xception_jax.files import local_directory
from xception_jax.storage.cloud import gs_lister
from xception_jax.storage.failures import translate
from xception_jax.storage.paths import Place, is_url, join, parse

if TYPE_CHECKING:
    import tensorstore  # takes a quarter of a second, also for commands that only look at an address

ABSENT = b"\x02"
"""The generation of an object that does not exist, as TensorStore encodes it."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a store is tried before an operation fails.

    Attributes:
      retries: how often a request is repeated after 429, 5xx or a broken connection. Listings of gs:// are repeated
        until `total`.
      first_delay: seconds before the first repetition; doubled for each further one.
      longest_delay: seconds that the delay grows to.
      total: seconds for the operation as a whole, whatever happens, for example if the server never answers.
    """

    retries: int = 7
    first_delay: float = 0.5
    longest_delay: float = 8.0
    total: float = 90.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """The content of an object, or None if it does not exist, and its generation, which changes with each write."""

    content: bytes | None
    generation: bytes


class Store:
    """Objects below one directory, by names such as `tensorboard/events.1`.

    A write replaces the object as a whole: a reader gets the old or the new content. On a local disk it is a file that
    is synced and renamed. Repetitions of requests are bounded in number and in time; then the operation fails.

    Args:
      root: the directory or address, for errors.
      objects: the key-value store.
      names: lists the names that begin with a prefix.
      patience: bounds the repetitions.
      unusable: class of the error if the place cannot be used: `WorkdirError`, or `InputMissingError` for readers.
    """

    def __init__(
        self,
        root: str,
        objects: tensorstore.KvStore,
        names: Callable[[str], list[str]],
        patience: Patience,
        unusable: type[UserError],
    ) -> None:
        self.root = root
        self._objects, self._names, self._patience, self._unusable = objects, names, patience, unusable
        self._unauthenticated = unusable

    def check(self) -> None:
        """Proves that the bucket exists and accepts the credentials. Reading alone finds nothing where no bucket is.

        Raises:
          UserError: of the class `unusable`, or StorageError if the store does not answer.
        """
        self.list("\x7f")
        self._unauthenticated = StorageError

    def read(self, name: str) -> bytes | None:
        """Returns the content of an object, or None if it does not exist.

        Raises:
          UserError: it cannot be read (the class `unusable`, or StorageError after the last repetition).
        """
        return self.entry(name).content

    def entry(self, name: str) -> Entry:
        """Returns content and generation of an object, for `put_if`.

        Raises:
          UserError: as `read`.
        """
        result = self._wait(name, "reading", lambda: self._objects.read(name))
        return Entry(result.value if result.state == "value" else None, result.stamp.generation)

    def exists(self, name: str) -> bool:
        """Returns whether an object exists, without reading it.

        Raises:
          UserError: as `read`.
        """
        stat = self._wait(name, "reading", lambda: self._objects.read(name, byte_range=slice(0, 0)))
        return stat.state == "value"

    def put(self, name: str, content: bytes | str) -> bytes:
        """Writes an object as a whole, and returns its generation.

        Raises:
          UserError: it cannot be written. It has the old content, or the new one if only the answer was lost.
        """
        return self._wait(name, "writing", lambda: self._objects.write(name, content)).generation

    def put_if(self, name: str, content: bytes | str, generation: bytes) -> bytes | None:
        """Writes an object if it still has a generation. Of several processes that try this, one succeeds.

        If the answer to a write is lost, its repetition finds the new generation and is refused. A caller that must
        know compares the content, which must then be unlike that of any other process.

        Args:
          name: the object.
          content: what to write.
          generation: that of an `Entry`; `ABSENT` if the object must not exist.

        Returns:
          The new generation, or None if the object has another generation.

        Raises:
          UserError: as `put`.
        """
        if not generation:
            raise ValueError("an empty generation would make the write unconditional")
        stamp = self._wait(name, "writing", lambda: self._objects.write(name, content, if_equal=generation))
        return stamp.generation or None

    def list(self, prefix: str = "") -> list[str]:
        """Returns the names that begin with a prefix, sorted, as they are now.

        Raises:
          UserError: they cannot be listed completely.
        """
        try:
            return sorted(self._names(prefix))
        except Exception as error:
            raise self._translate(error, self.root, "listing") from error

    def delete(self, name: str) -> None:
        """Deletes an object, if it exists.

        Raises:
          UserError: it cannot be deleted.
        """
        self._wait(name, "deleting", lambda: self._objects.write(name, None))

    def delete_prefix(self, prefix: str, first: str = "") -> None:
        """Deletes all objects whose names begin with a prefix, one after the other.

        Args:
          prefix: not empty.
          first: the rest of a name that is deleted before all others, because it says that they are complete.

        Raises:
          UserError: they cannot be listed, or one cannot be deleted.
        """
        if not prefix:
            raise ValueError("this would delete the whole directory")
        for name in sorted(self.list(prefix), key=lambda name: name != prefix + first):
            self.delete(name)

    def move_prefix(self, prefix: str, target: str, first: str = "") -> None:
        """Renames all objects whose names begin with a prefix.

        No store does this at once. The objects are copied first, so that they are complete under at least one of both
        prefixes at any time. What an interrupted call has copied is replaced by the next.

        Args:
          prefix: not empty.
          target: replaces the prefix in the names.
          first: the rest of a name that is deleted before all others, and copied after them.

        Raises:
          UserError: they cannot be read, written or deleted.
        """
        for name in sorted(self.list(prefix), key=lambda name: name == prefix + first):
            content = self.read(name)
            if content is not None:
                self.put(target + name.removeprefix(prefix), content)
        self.delete_prefix(prefix, first)

    def _wait(self, name: str, action: str, start: Callable[[], Any]) -> Any:
        try:
            future = start()
            try:
                return future.result(timeout=self._patience.total)
            except TimeoutError:
                future.cancel()
                raise TimeoutError(f"no answer within {self._patience.total:g} seconds") from None
        except Exception as error:  # TensorStore raises most of its errors as ValueError
            raise self._translate(error, join(self.root, name), action) from error

    def _translate(self, error: Exception, url: str, action: str) -> UserError:
        return translate(error, url, action, self._unusable, self._unauthenticated)


def _bucket_spec(place: Place) -> dict[str, Any]:
    """Returns the part of a specification that all object stores share. A path ends with a slash."""
    return {"bucket": place.bucket, "path": f"{place.path}/" if place.path else ""}


def _gs_spec(place: Place) -> dict[str, Any]:
    # TensorStore does not read the variable with which all other clients are sent to an emulator.
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    return {"driver": "gcs", **_bucket_spec(place)}


def _s3_spec(place: Place) -> dict[str, Any]:
    # TensorStore does not read these variables, which all other clients of S3 do.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    own = {"endpoint": endpoint, "aws_region": region} if endpoint else {}
    return {"driver": "s3", **_bucket_spec(place), **own}


_SPECS = {"gs": _gs_spec, "s3": _s3_spec}
_RETRIES = ("gcs_request_retries", "s3_request_retries")


def open_store(
    path: str,
    where: str,
    *,
    unusable: type[UserError] = WorkdirError,
    patience: Patience = Patience(),
) -> Store:
    """Opens a directory on a disk or in a bucket, and checks that the bucket exists and can be listed.

    Args:
      path: a local path, gs://bucket/path or s3://bucket/path. A local directory is created by the first write.
      where: the flag or field that gave it, for the error.
      unusable: class of the error if the place cannot be used: `WorkdirError`, or `InputMissingError` for readers.
      patience: bounds the repetitions.

    Raises:
      ConfigError: the path is not valid.
      UserError: of the class `unusable`; credentials, permission, bucket or package are missing.
      StorageError: the store does not answer.
    """
    if not is_url(path):
        directory = local_directory(path, where)
        objects = _open({"driver": "file", "path": f"{directory}/"}, patience)
        return Store(str(directory), objects, _lister(objects, patience), patience, unusable)
    place = parse(path, where)
    objects = _open(_SPECS[place.scheme](place), patience)
    store = Store(place.url, objects, _LISTERS[place.scheme](objects, patience), patience, unusable)
    store.check()
    return store


def _open(spec: dict[str, Any], patience: Patience) -> tensorstore.KvStore:
    import tensorstore

    retries = {
        "max_retries": patience.retries,
        "initial_delay": f"{patience.first_delay}s",
        "max_delay": f"{patience.longest_delay}s",
    }
    context = tensorstore.Context(dict.fromkeys(_RETRIES, retries))
    return tensorstore.KvStore.open(spec, context=context).result()


def _after(prefix: str) -> bytes:
    """Returns the first name after all that begin with a prefix; b'' if there is none."""
    encoded = prefix.encode()
    return encoded[:-1] + bytes([encoded[-1] + 1]) if encoded else b""  # UTF-8 has no byte 255


def _lister(objects: tensorstore.KvStore, patience: Patience) -> Callable[[str], list[str]]:
    """Returns a function that lists names with TensorStore, which has no cache."""
    import tensorstore

    def names(prefix: str) -> list[str]:
        beginning = tensorstore.KvStore.KeyRange(prefix, _after(prefix))
        return [name.decode() for name in objects.list(beginning).result(timeout=patience.total)]

    return names


def _gs_lister(objects: tensorstore.KvStore, patience: Patience) -> Callable[[str], list[str]]:
    names = gs_lister(objects.spec().to_json()["bucket"], patience)
    return lambda prefix: [name[len(objects.path) :] for name in names(objects.path + prefix)]


_LISTERS = {"gs": _gs_lister, "s3": _lister}
