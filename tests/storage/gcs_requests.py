"""Requests to the test server, the faults that they meet, and the tokens that they need."""

from __future__ import annotations

import dataclasses
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
      status: the answer, instead of doing what was asked for.
      delay: seconds before anything happens.
      cut: the connection ends in the middle of the body of the answer.
      lost: the request is carried out, but the connection ends without an answer.
    """

    status: int = 0
    delay: float = 0
    cut: bool = False
    lost: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: method, unquoted path, parameters, headers and body."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @property
    def changes(self) -> bool:
        """Whether it may change a bucket."""
        return self.method != "GET"


def parse_request(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Request:
    """Builds a request from the first line of HTTP, its headers (names in lower case) and its body."""
    parts = urllib.parse.urlsplit(target)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    return Request(method, urllib.parse.unquote(parts.path), query, headers, body)


ACCOUNT = "/computeMetadata/v1/instance/service-accounts/"


class Tokens:
    """Access tokens as a virtual machine gets them from its metadata server. Each is valid for a while.

    Args:
      promised: seconds of validity that clients are told.
      valid: seconds of validity.
    """

    def __init__(self, promised: float, valid: float) -> None:
        self.promised, self.valid = promised, valid
        self.issued: dict[str, float] = {}

    def metadata(self, path: str) -> dict[str, Any]:
        """Returns a new token, or the description of the account."""
        if not path.endswith("/token"):
            return {"email": "test@test", "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
        token = f"token{len(self.issued)}"
        self.issued[token] = time.monotonic()
        return {"access_token": token, "expires_in": self.promised, "token_type": "Bearer"}

    def accepts(self, authorization: str) -> bool:
        """Returns whether a header has a token that is still valid."""
        begin = self.issued.get(authorization.removeprefix("Bearer "))
        return begin is not None and time.monotonic() - begin < self.valid
