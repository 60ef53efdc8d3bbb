"""The buckets of the test server: objects with generations, preconditions under one lock, a record of all writes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import google_crc32c

PAGE = 1000  # names in a page of a listing, as in the service


class Refused(Exception):
    """An answer other than success: a status of HTTP, and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object: its content, its generation (a new one for each write), and what else the client sent."""

    bucket: str
    name: str
    content: bytes
    generation: int
    metageneration: int = 1
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.value(self.content).to_bytes(4, "big")).decode()

    @property
    def md5(self) -> str:
        return base64.b64encode(hashlib.md5(self.content).digest()).decode()

    def resource(self) -> dict[str, Any]:
        """Returns the object as the JSON API describes it."""
        created = f"2026-01-01T00:00:{self.generation % 60:02}.{self.generation // 60 % 1000:03}Z"
        return {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "bucket": self.bucket,
            "name": self.name,
            "size": str(len(self.content)),
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "timeCreated": created,
            "updated": created,
            "crc32c": self.crc32c,
            "md5Hash": self.md5,
            "etag": f"{self.generation}.{self.metageneration}",
            **self.attributes,
        }


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of a bucket: the object that was written, or None and the name of the object that was deleted."""

    bucket: str
    name: str
    stored: Stored | None


# The generation of an object that does not exist is 0.
_CONDITIONS = {
    "GenerationMatch": lambda stored, wanted: (stored.generation if stored else 0) == wanted,
    "GenerationNotMatch": lambda stored, wanted: (stored.generation if stored else 0) != wanted,
    "MetagenerationMatch": lambda stored, wanted: stored is not None and stored.metageneration == wanted,
    "MetagenerationNotMatch": lambda stored, wanted: stored is not None and stored.metageneration != wanted,
}


class Objects:
    """All objects of all buckets. Every method is atomic.

    Args:
      buckets: the names of the buckets.
      mutations: changes recorded by another instance, which are applied in order.
    """

    def __init__(self, buckets: Iterable[str] = ("bucket",), mutations: Iterable[Mutation] = ()) -> None:
        self.buckets = frozenset(buckets)
        self.mutations: list[Mutation] = []
        self._lock = threading.RLock()
        self._stored: dict[tuple[str, str], Stored] = {}
        self._generation = 1_700_000_000_000_000
        for mutation in mutations:
            self._apply(mutation)
            self._generation = max(self._generation, mutation.stored.generation if mutation.stored else 0)

    def _apply(self, mutation: Mutation) -> None:
        if mutation.stored is None:
            del self._stored[mutation.bucket, mutation.name]
        else:
            self._stored[mutation.bucket, mutation.name] = mutation.stored
        self.mutations.append(mutation)

    def _find(self, bucket: str, name: str, query: Mapping[str, str], prefix: str, status: int) -> Stored | None:
        """Returns an object, after checking the preconditions of a request."""
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        stored = self._stored.get((bucket, name))
        for condition, holds in _CONDITIONS.items():
            wanted = query.get(f"{prefix}{condition}")
            if wanted is not None and not holds(stored, int(wanted)):
                not_match = "NotMatch" in condition
                raise Refused(status if not_match and stored else 412, "At least one pre-condition did not hold.")
        wanted = query.get("sourceGeneration" if prefix == "ifSource" else "generation")
        return stored if wanted is None or (stored and stored.generation == int(wanted)) else None

    def get(self, bucket: str, name: str, query: Mapping[str, str], prefix: str = "if", status: int = 304) -> Stored:
        """Returns an object.

        Raises:
          Refused: with 404, it does not exist; with 304 or 412, a precondition in `query` does not hold.
        """
        with self._lock:
            stored = self._find(bucket, name, query, prefix, status)
        if stored is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def put(
        self,
        bucket: str,
        name: str,
        content: bytes,
        query: Mapping[str, str],
        attributes: Mapping[str, Any] | None = None,
    ) -> Stored:
        """Writes an object, if the preconditions in `query` hold."""
        kept = ("contentType", "metadata", "cacheControl", "contentEncoding", "customTime")
        attributes = {key: value for key, value in (attributes or {}).items() if key in kept}
        with self._lock:
            self._find(bucket, name, query, "if", 412)
            self._generation += 1
            stored = Stored(bucket, name, content, self._generation, attributes=attributes)
            self._apply(Mutation(bucket, name, stored))
            return stored

    def patch(self, bucket: str, name: str, query: Mapping[str, str], attributes: Mapping[str, Any]) -> Stored:
        """Changes the metadata of an object, which keeps its generation."""
        with self._lock:
            stored = self.get(bucket, name, query, status=412)
            changed = dict(stored.attributes) | {"metadata": attributes.get("metadata", {})}
            stored = dataclasses.replace(stored, metageneration=stored.metageneration + 1, attributes=changed)
            self._apply(Mutation(bucket, name, stored))
            return stored

    def copy(self, source: tuple[str, str], target: tuple[str, str], query: Mapping[str, str]) -> Stored:
        """Copies an object, if the preconditions on both sides hold."""
        with self._lock:
            stored = self.get(*source, query, "ifSource", 412)
            conditions = {name: value for name, value in query.items() if name.startswith("if")}
            return self.put(*target, stored.content, conditions, stored.attributes)

    def delete(self, bucket: str, name: str, query: Mapping[str, str]) -> None:
        """Deletes an object, if the preconditions in `query` hold."""
        with self._lock:
            self.get(bucket, name, query, status=412)
            self._apply(Mutation(bucket, name, None))

    def list(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
        """Returns one page of a listing, with the current objects."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start = query.get("pageToken") or query.get("startOffset", "")
        with self._lock:
            if bucket not in self.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            stored = sorted((item for item in self._stored.values() if item.bucket == bucket), key=lambda s: s.name)
        items: list[Any] = []
        prefixes: list[Any] = []
        entry: Any
        for item in stored:
            if (
                not item.name.startswith(prefix)
                or item.name < start
                or item.name >= query.get("endOffset", "\U0010ffff")
            ):
                continue
            head, found, tail = item.name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            group = f"{prefix}{head}{found}"
            if found and (tail or query.get("includeTrailingDelimiter") != "true"):
                if group in prefixes or (query.get("pageToken") and group < start):
                    continue
                entries, entry = prefixes, group
            else:
                entries, entry = items, item.resource()
            if len(items) + len(prefixes) == min(PAGE, int(query.get("maxResults", PAGE))):
                return {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": item.name}
            entries.append(entry)
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}
