"""Translates errors of TensorStore and of cloud clients into errors that say what the user can do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from xception_jax.errors import StorageError, UserError
from xception_jax.files import free_space

INSTALL = "install them: pip install '.[cloud]' in a checkout of xception_jax"
_RESUME = "check the network and the quota of the bucket; the same command resumes the run"

_LOGIN = {
    "gs": "run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS to a key file",
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_ALLOW = {
    "gs": "give the account the roles 'Storage Object User' and 'Storage Legacy Bucket Reader' on the bucket, or log "
    "in with another one: gcloud auth application-default login",
    "s3": "allow the account s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject, or set AWS_PROFILE",
}
_CREATE = {"gs": "gcloud storage buckets create gs://{bucket}", "s3": "aws s3 mb s3://{bucket}"}

# The path itself is wrong. Other errors of the operating system are problems of the device.
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_Translation = Callable[[str, str, type[UserError]], UserError]


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def _unauthenticated(url: str, message: str, kind: type[UserError]) -> UserError:
    return kind(f"the credentials are missing, expired or not valid: {message}", url, _LOGIN[_scheme(url)])


def _forbidden(url: str, message: str, unusable: type[UserError]) -> UserError:
    return unusable(f"the account has no permission: {message}", url, _ALLOW[_scheme(url)])


def _no_bucket(url: str, message: str, unusable: type[UserError]) -> UserError:
    bucket = url.partition("://")[2].partition("/")[0]
    return unusable(f"the bucket {bucket} does not exist", url, _CREATE[_scheme(url)].format(bucket=bucket))


_BY_STATUS: dict[int, _Translation] = {403: _forbidden, 404: _no_bucket}


def translate(
    error: Exception,
    url: str,
    action: str,
    unusable: type[UserError],
    unauthenticated: type[UserError] | None = None,
) -> UserError:
    """Returns the error to raise instead of one of TensorStore or of a cloud client.

    Args:
      error: what they raised.
      url: what was read, written or listed.
      action: what was tried, such as 'writing'.
      unusable: class of the error if nobody can use the place as it is.
      unauthenticated: class of the error if the credentials are not accepted. By default, that is `unusable`. Once
        they have been accepted, they have expired, and the place is usable again with new ones.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, ImportError):
        return unusable(f"{_scheme(url)}:// needs packages that are not installed ({error.name})", url, INSTALL)
    if type(error).__module__.startswith("google.auth.") and not _of_the_network(error):
        return _unauthenticated(url, _summary(error), unauthenticated or unusable)
    if "Project was not passed" in str(error):  # Orbax asks for a client of the default project
        fix = "set GOOGLE_CLOUD_PROJECT to the project of the bucket"
        return unusable("no project of Google Cloud is set", url, fix)
    if isinstance(error, TimeoutError):
        return StorageError(f"{action} took too long: {_summary(error)}", url, _RESUME)
    if "://" not in url:
        return _local(error, url, action, unusable)
    status = _status(error)
    if status == 401:
        return _unauthenticated(url, _summary(error), unauthenticated or unusable)
    if status in _BY_STATUS:
        return _BY_STATUS[status](url, _summary(error), unusable)
    return StorageError(f"{action} failed: {_summary(error)}", url, _RESUME)


def _of_the_network(error: Exception) -> bool:
    """Returns whether google-auth could not ask for credentials, such as before the metadata server is up."""
    is_transport = "TransportError" in (type(error).__name__, type(error.__cause__).__name__)
    return is_transport or bool(getattr(error, "retryable", False))


def _local(error: Exception, path: str, action: str, unusable: type[UserError]) -> UserError:
    match = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(match[1]) if match else 0
    reason = os.strerror(number) if number else _summary(error)
    if number in _UNUSABLE:
        return unusable(f"{action} is not possible: {reason}", path, "choose a directory that you can write to")
    existing = next(folder for folder in [Path(path), *Path(path).parents] if folder.is_dir())
    fix = f"make room; {free_space(existing)}" if number in _FULL else "check the disk; the same command resumes"
    return StorageError(f"{action} failed: {reason}", path, fix)


def _status(error: Exception) -> int:
    """Returns the status of HTTP that an error reports, or 0."""
    match = re.search(r"(?:http_response_code='|HTTP code )(\d+)", str(error))
    if not match and str(error).startswith("Forbidden"):  # of gcsfs
        return 403
    code = match[1] if match else str(getattr(error, "code", 0))
    return int(code) if code.isdecimal() else 0


def _summary(error: Exception) -> str:
    """Returns the message of an error in one printable line."""
    text = re.split(r" \[(?:http_response_|curl_code|HTTP code)", str(error))[0] or type(error).__name__
    text = re.sub(r"\b[A-Z]+ https?://\S+: ", "", text)  # google-cloud-storage names its requests
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) < 200 else f"{line[:200]}..."
