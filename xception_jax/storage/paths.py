"""Handles addresses of object stores as text.

`pathlib` and `epath.Path.absolute` turn gs://bucket into gs:/bucket, a local path. Nothing here does.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from xception_jax.errors import ConfigError

SCHEMES = {"gs": "Google Cloud Storage", "s3": "Amazon S3 and compatible stores"}
"""The object stores that a `Store` can open."""

# `scheme:/x` with one slash is what pathlib makes of a URL. No directory on a disk is meant by it.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# Clients read these as patterns, as escapes or as the generation of an object.
_SPECIAL = re.compile(r"[?#%*\[\]{}\\]")


class Place(NamedTuple):
    """A place in an object store: its scheme, its bucket, and its path without slashes at the ends."""

    scheme: str
    bucket: str
    path: str

    @property
    def url(self) -> str:
        """The address, without a slash at the end."""
        return f"{self.scheme}://{self.bucket}/{self.path}".rstrip("/")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is an address (gs://, s3:// or another scheme) and not a path on this machine."""
    return _URL.fullmatch(os.fspath(path)) is not None


def names_object_store(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is an address with a scheme in `SCHEMES`, valid or not."""
    match = _URL.fullmatch(os.fspath(path))
    return match is not None and match[1].lower() in SCHEMES


def parse(url: str, where: str) -> Place:
    """Splits the address of an object store.

    Args:
      url: the address, such as gs://bucket/runs/first.
      where: the flag or field that gave it, for the error.

    Raises:
      ConfigError: the scheme is not supported, the bucket is missing, or the path has empty parts, '.', '..',
        control characters or characters that clients do not read literally.
    """
    match = _URL.fullmatch(url)

    def refuse(reason: str, fix: str) -> ConfigError:
        return ConfigError(f"{url!r} {reason}", where, fix)

    if match is None or match[1].lower() not in SCHEMES:
        raise refuse("is not the address of a supported object store", "use a local directory or gs://bucket/path")
    scheme, slashes, rest = match[1].lower(), match[2], match[3]
    bucket, _, path = rest.partition("/")
    if slashes == "/":
        raise refuse("has one slash after the colon", f"write {scheme}://{rest}")
    if not _BUCKET.fullmatch(bucket):
        raise refuse("does not name a bucket", f"use {scheme}://bucket/path")
    path = path.rstrip("/")
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") for part in parts):
        raise refuse("has an empty part, '.' or '..' in its path", f"write {scheme}://{bucket}/ and plain names")
    if _SPECIAL.search(path) or not path.isprintable() or len(path.encode(errors="surrogateescape")) > 700:
        raise refuse("is too long or has a character with a special meaning", "use letters, digits, '-', '_' and '.'")
    return Place(scheme, bucket, path)


def join(base: str | os.PathLike[str], *parts: str) -> str:
    """Appends parts to a local path or an address. Unlike `os.path.join`, a part never replaces what is before it."""
    base = os.fspath(base)
    names = [part.strip("/") for part in parts if part.strip("/")]
    start = base.rstrip("/") if base.rstrip("/") else base
    return "/".join([start, *names]) if start != "/" else "/" + "/".join(names)
