"""Turns the source of weights (a path, a name, or the address of a file on the hub) into a local file.

A path that exists always wins over a name. Downloaded files are kept in a cache; their sums are compared with those in
`released` and with the SHA-256 that was recorded at first use, every time, before anything reads them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from xception_jax import environment
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.files import local_directory, write_atomically
from xception_jax.names import in_shell, printable, printable_path
from xception_jax.storage import checkpoint_directory, names_object_store
from xception_jax.weights.released import CONFIG, PICKLES, RELEASES, WEIGHTS, Release

if TYPE_CHECKING:
    from xception_jax.weights.download import Remote

HUB = "hf://"
_ADDRESS = re.compile(r"hf://([\w-][\w.-]*)/([\w-][\w.-]*)(?:@([\w.%-]+))?(?:/(.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KERAS_SERVER = "https://storage.googleapis.com/tensorflow/keras-applications"
_HUB_SERVER = "https://huggingface.co"
_HUB_HOSTS = ("huggingface.co", "hf.co")  # the hub redirects to its content delivery networks below these
# The hub names a version of a file by a sum of its content: SHA-256 of large files, Git's SHA-1 of small ones.
_HUB_SUMS = {64: "sha256", 40: "git"}
_OFFLINE = ("XCEPTION_JAX_OFFLINE", "HF_HUB_OFFLINE")
_SYNTAX = "hf://OWNER/REPO[@REVISION][/FILE]"
_LIST = "see `xception-jax weights list`"


@dataclasses.dataclass(frozen=True)
class Source:
    """A local weight file.

    Attributes:
      path: the file.
      name: where it comes from: the path as it was given, a name of `RELEASES`, or hf://OWNER/REPO@COMMIT/FILE.
      release: the release that was named, or None.
    """

    path: Path
    name: str
    release: Release | None = None


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file in a repository on the hub."""

    repository: str
    revision: str = "main"
    file: str = WEIGHTS

    @property
    def address(self) -> str:
        """The address as `find` takes it."""
        return f"{HUB}{self.repository}@{quote(self.revision, safe='')}/{self.file}"


def find(source: str | os.PathLike) -> Source:
    """Returns the local file of a source, which is downloaded if it is not in the cache.

    Raises:
      UsageError: the address of a file on the hub is malformed.
      InputMissingError: there is no such file or name, on this machine or on the server, or it is not in the cache and
        downloads are turned off.
      BadDataError: the file does not have the sum that it must have, or is public only as a pickle.
      StorageError: the download failed, or cannot be written.
    """
    text = os.fspath(source)
    if os.path.exists(text):
        return Source(Path(text), text)
    require_known(text)
    if text.startswith(HUB):
        return _find_on_hub(parse(text))
    release = RELEASES[text]
    path = cached_path(text)
    if not path.exists():
        _require_online(text, path)
        _download_release(release, path)
    verify(path, release.pins)
    if release.repository is not None and path.with_name(CONFIG).exists():
        verify(path.with_name(CONFIG), {})
    return Source(path, text, release)


def require_known(source: str) -> None:
    """Raises a UserError unless a source is an existing path, a known name or an address. Does not import JAX.

    Raises:
      ConfigError: the address of an object store is malformed.
      UsageError: the address of a file on the hub is malformed.
      InputMissingError: there is no such path or name, or a package for the object store is missing.
      BadDataError: the weights are public only as a pickle.
    """
    if os.path.exists(source) or source in RELEASES:
        return
    if names_object_store(source):
        checkpoint_directory(source, "the work directory", InputMissingError)
        return
    if source.startswith(HUB):
        parse(source)
        return
    if source in PICKLES:
        fix = (
            'where timm is installed: python -c "import timm, safetensors.torch as s; s.save_file(timm.create_model('
            "'legacy_xception', pretrained=True).state_dict(), 'legacy_xception.safetensors')\""
        )
        raise BadDataError("timm publishes legacy_xception only as a pickle, which may run any code", source, fix)
    similar = difflib.get_close_matches(source.lower(), RELEASES, n=1)
    if similar or source.startswith(("keras/", "timm/")):
        hints = [*(f"did you mean {name}?" for name in similar), _LIST]
        hints += [f"any repository of timm: hf://{source}"] if source.startswith("timm/") else []
        raise InputMissingError("there is no such weight file or name", source, "; ".join(hints))
    fix = f"give the path of a .safetensors, .keras or .h5 file, or the work directory of a run; names: {_LIST}"
    raise InputMissingError("there is no such weight file or work directory", source, fix)


def parse(address: str) -> HubFile:
    """Parses hf://OWNER/REPO[@REVISION][/FILE]. A slash in the revision is written as %2F.

    Raises:
      UsageError: the address is malformed.
    """
    match = _ADDRESS.fullmatch(address)
    parts = (match[4] or WEIGHTS).split("/") if match else []
    if match is None or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise UsageError("this is not the address of a file on the hub", address, f"use {_SYNTAX}")
    revision = unquote(match[3] or "main")
    if {".", ".."} & set(revision.split("/")):
        raise UsageError("there is no such revision on the hub", address, f"use {_SYNTAX}")
    return HubFile(f"{match[1]}/{match[2]}", revision, "/".join(parts))


def cache_directory() -> Path:
    """Returns the directory of downloaded files: `XCEPTION_JAX_CACHE`, or the usual place on this system.

    Raises:
      ConfigError: XCEPTION_JAX_CACHE is not the path of a directory.
      InputMissingError: this user has no cache directory.
    """
    if chosen := os.environ.get("XCEPTION_JAX_CACHE"):
        return local_directory(chosen, "XCEPTION_JAX_CACHE")
    if (usual := environment.cache_directory()) is None:
        what = "this user has no home directory, or XDG_CACHE_HOME is a relative path"
        raise InputMissingError(what, "the cache of downloaded files", "set XCEPTION_JAX_CACHE to a directory")
    return usual


def cached_path(name: str) -> Path:
    """Returns the place of a release in the cache, whether or not it is there."""
    release = RELEASES[name]
    directory = cache_directory() / name if release.repository is not None else cache_directory() / "keras"
    return directory / release.file.rpartition("/")[2]


def offline_variable() -> str | None:
    """Returns the environment variable that turns downloads off, or None if they are on."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), None)


def _require_online(name: str, path: Path) -> None:
    variable = offline_variable()
    if variable:
        what = f"{name} is not in the cache, and {variable} turns downloads off"
        fix = f"unset {variable}; or copy the file from another machine and use its path"
        raise InputMissingError(what, str(path), fix)


def recorded(path: Path) -> Path:
    """Returns the file with the SHA-256 that was recorded at first use, in the format of sha256sum."""
    return path.with_name(f"{path.name}.sha256")


def verify(path: Path, pins: Mapping[str, str], *, kept: Path | None = None, thorough: bool = False) -> None:
    """Compares a file with its pinned sums and its recorded SHA-256, which is recorded if it is not.

    Args:
      path: the file.
      pins: sums by algorithm, see `download.digest`.
      kept: for a file that was just downloaded, the path that it will have; the record is beside that.
      thorough: whether to compare a pinned MD5 also where a SHA-256 was recorded.

    Raises:
      BadDataError: a sum differs.
      StorageError: the file cannot be read, or the sum of a new file cannot be recorded.
    """
    from xception_jax.weights.download import digest

    is_new, kept = kept is not None, kept or path
    record = recorded(kept)
    try:
        remembered = _sums(record) if record.exists() else []
        wanted = [(name, value) for name, value in pins.items() if thorough or name != "md5" or not remembered]
        found = {name: digest(path, name) for name in {"sha256", *dict(wanted)}}
    except OSError as error:
        raise StorageError(f"the file cannot be read: {error}", str(path), "check its permissions") from None
    for name, value in [*wanted, *(("sha256", value) for value in remembered)]:
        if found[name] != value:
            fix = f"remove the file, and it is downloaded again: rm {in_shell(kept)}"
            if is_new:
                fix = "try again; if it stays, a proxy changes the file or its publisher has replaced it"
                fix += f" (then remove {record})" if remembered else ""
            raise BadDataError(f"the file has the wrong {name}: {found[name]}, not {value}", str(kept), fix)
    if not remembered:
        try:
            write_atomically(record, f"{found['sha256']}  {kept.name}\n")
        except OSError as error:
            what = f"the SHA-256 cannot be recorded: {error.strerror}"
            if is_new:
                raise StorageError(what, str(record), "free some space or set XCEPTION_JAX_CACHE") from None
            print(f"note: {what} ({printable_path(record)})", file=sys.stderr)  # a shared cache may be read-only


def _download_release(release: Release, path: Path) -> None:
    if release.repository is None:
        from xception_jax.weights.download import Remote, fetch

        server = os.environ.get("XCEPTION_JAX_WEIGHTS_URL") or _KERAS_SERVER
        remote = Remote(f"{server.rstrip('/')}/{release.file}")
        fetch(remote, path, _lock(path), lambda partial: verify(partial, release.pins, kept=path))
        return
    file = HubFile(release.repository, release.revision, release.file)
    _download_from_hub(file, *_describe(file), path, release.pins)


def _lock(path: Path) -> Path:
    cache = cache_directory()
    name = hashlib.sha256(os.fsencode(path.relative_to(cache))).hexdigest()  # of any length and characters
    return cache / ".locks" / f"{name}.lock"


def _find_on_hub(file: HubFile) -> Source:
    """Returns a file of the hub. A branch or tag is looked up each time; if that fails, its last commit is used."""
    repository = cache_directory() / "hf" / file.repository
    commit, sums = file.revision, dict[str, str]()
    if not _COMMIT.fullmatch(file.revision):
        commit, sums = _look_up(file, repository / "refs" / quote(file.revision, safe=""))
    path = repository / "commits" / commit / file.file
    if path.exists():
        for cached in (path, path.with_name(CONFIG)):
            if cached.exists():
                verify(cached, {})
    else:
        _require_online(file.address, path)
        _download_from_hub(file, commit, sums or _describe(file)[1], path, {})
    return Source(path, dataclasses.replace(file, revision=commit).address)


def _look_up(file: HubFile, reference: Path) -> tuple[str, dict[str, str]]:
    """Returns the commit of a branch or tag, and the sum of the file if the hub was asked."""
    known = reference.read_text(errors="replace").strip() if reference.exists() else ""
    if not _COMMIT.fullmatch(known):  # the file is damaged
        known = ""
    if not known:
        _require_online(file.address, reference)
    if offline_variable():
        return known, {}
    try:
        commit, sums = _describe(file)
    except (InputMissingError, StorageError) as error:
        if not known:
            raise
        print(f"note: {printable(error.what)}; using the cached commit {printable(known)}", file=sys.stderr)
        return known, {}
    _remember(reference, commit)
    return commit, sums


def _sums(record: Path) -> list[str]:
    """Returns the SHA-256 that a record remembers.

    Raises:
      BadDataError: the record is damaged. It would not tell whether the file is.
    """
    found = re.search(r"\b[0-9a-f]{64}\b", record.read_text(errors="replace").lower())  # also in the format of BSD
    if found is None:
        fix = "correct it; if the file beside it is a download, remove both"
        raise BadDataError("the record has no SHA-256", str(record), fix)
    return [found[0]]


def _remember(reference: Path, commit: str) -> None:
    """Writes which commit a branch or tag is at, for when the hub cannot be asked."""
    try:
        if not reference.exists() or reference.read_text(errors="replace").strip() != commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(reference, f"{commit}\n")
    except OSError as error:
        print(f"note: {printable_path(reference)} cannot be written: {error.strerror}", file=sys.stderr)


def _describe(file: HubFile) -> tuple[str, dict[str, str]]:
    """Asks the hub for the commit of a revision, and for the sum of a file in it."""
    from xception_jax.weights.download import describe

    remote = _remote(file)
    headers = describe(remote)
    commit = headers.get("X-Repo-Commit", "")
    if not _COMMIT.fullmatch(commit):
        what = "the server does not answer as the Hugging Face Hub does: the header X-Repo-Commit is missing"
        raise BadDataError(what, remote.url, "check HF_ENDPOINT and the proxy")
    tag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
    algorithm = _HUB_SUMS.get(len(tag)) if re.fullmatch(r"[0-9a-f]+", tag) else None
    return commit, {algorithm: tag} if algorithm else {}


def _remote(file: HubFile) -> Remote:
    from huggingface_hub import get_token, hf_hub_url

    from xception_jax.weights.download import Remote

    server = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _HUB_SERVER
    try:
        url = hf_hub_url(file.repository, file.file, revision=file.revision, endpoint=server)
    except ValueError as error:
        raise UsageError(f"this cannot be a repository: {error}", file.address, f"use {_SYNTAX}") from None
    return Remote(url, _HUB_HOSTS, get_token())


def _download_from_hub(
    file: HubFile, commit: str, sums: Mapping[str, str], path: Path, pins: Mapping[str, str]
) -> None:
    """Downloads a weight file and the config.json beside it, if there is one, at one commit."""
    from xception_jax.weights.download import fetch

    config = dataclasses.replace(file, revision=commit, file="/".join([*file.file.split("/")[:-1], CONFIG]))
    beside = path.with_name(CONFIG)
    try:
        _, config_sums = _describe(config)
    except InputMissingError:
        pass  # without it, timm's defaults for the network are used
    else:
        fetch(_remote(config), beside, _lock(beside), lambda partial: verify(partial, config_sums, kept=beside))
    weights = _remote(dataclasses.replace(file, revision=commit))
    fetch(weights, path, _lock(path), lambda partial: verify(partial, {**sums, **pins}, kept=path))
