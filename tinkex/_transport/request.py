"""One request and one response, as sent over the wire, and where a redirect leads.

Values and pure functions only: Transport does the sending.
"""

from __future__ import annotations

import dataclasses
from typing import Any, List, Mapping, Optional, Tuple, Union
from urllib.parse import urljoin, urlsplit

import orjson

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import ResponseDecodeError
from tinkex.wire.codec import JSON_CONTENT_TYPE, Parts

NOT_JSON_HINT = ErrorText(
    "Is ", Setting("base_url"), " the address of a Tinker server, and its path prefix right?"
)

#: How many redirects in a row are followed.
MAX_HOPS = 5

#: Redirects that keep the method and the body.  The others turn a POST into a GET, which no route
#: of the protocol intends.
_KEEP_METHOD = (307, 308)
_REDIRECTS = (301, 302, 303, *_KEEP_METHOD)

Body = Union[bytes, Parts, None]


@dataclasses.dataclass(frozen=True)
class Request:
    """One logical request; every attempt sends the same bytes and the same idempotency key.

    Attributes:
        body: bytes, or the parts of a batch, whose arrays must not change until they were sent.
        read_timeout_s: the read timeout of one attempt; None takes the config's.
        headers: headers of this request only; not sent to another origin after a redirect.
        secrets: strings in *headers* or *body* that must not be shown if the server echoes them.
        idempotency_key: the key of all attempts; None makes one.
        raw_credential: send the credential itself, never a token exchanged for it.
        secret_reply: the response is a secret and never shown.
        follow_redirects: follow redirects (see `next_hop`), without credentials to another origin;
            False returns the 3xx response itself.
        empty_response_ok: a success may have no body: the caller does not read it.
        encode_s: the seconds it took to encode the body, for `ServiceClient.metrics`; None is not
            counted.
    """

    method: str
    path: str
    body: Body = dataclasses.field(default=None, repr=False)
    content_type: str = JSON_CONTENT_TYPE
    accept: str = JSON_CONTENT_TYPE
    traffic: str = "work"
    read_timeout_s: Optional[float] = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    secrets: Tuple[str, ...] = dataclasses.field(default=(), repr=False)
    raw_credential: bool = False
    idempotency_key: Optional[str] = None
    secret_reply: bool = False
    follow_redirects: bool = True
    empty_response_ok: bool = False
    encode_s: Optional[float] = dataclasses.field(default=None, repr=False, compare=False)

    def keep_body(self) -> None:
        """Copy the body's arrays, so that a later attempt sends the same bytes as the first."""
        if isinstance(self.body, Parts):
            self.body.keep()

    @property
    def name(self) -> str:
        """Method and path without the query, for messages."""
        return f"{self.method} {self.path.partition('?')[0]}"


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response of any status, read to its end.

    Attributes:
        headers: headers by lower-case name.
        read_s: the seconds from the response's headers to its end.
    """

    status: int
    headers: Mapping[str, str] = dataclasses.field(repr=False)
    body: bytes = dataclasses.field(repr=False)
    read_s: float = dataclasses.field(default=0.0, repr=False, compare=False)
    # The decoded body, kept from `is_damaged` for `json`, so that it is decoded only once.  A list,
    # because the fields of a frozen dataclass cannot be replaced.
    _decoded: List[Any] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def content_type(self) -> str:
        """The lower-case content type, with its parameters."""
        return self.headers.get("content-type", "").lower()

    @property
    def is_damaged(self) -> bool:
        """True for a success that is not JSON; if it should be, it was damaged in transit."""
        if self.status >= 300:
            return False
        try:
            self._decoded[:] = [orjson.loads(self.body)]
        except orjson.JSONDecodeError:
            return True
        return False

    def json(self) -> Any:
        """Return the decoded body, the caller's own; ResponseDecodeError if it is not JSON."""
        if self._decoded:
            # Pop it rather than share it: the caller may change the value.
            return self._decoded.pop()
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ResponseDecodeError(
                f"the response (status {self.status}, {self.content_type or 'no content type'}) "
                f"is not JSON: {self.body[:200]!r}",
                status=self.status,
                hint=NOT_JSON_HINT,
            ) from error


def next_hop(method: str, url: str, status: int, location: Optional[str]) -> Optional[str]:
    """Return the absolute URL that a redirect from *url* leads to, or None if it is not followed.

    A GET follows every redirect, another method only those that keep it (307, 308).  *location* is
    the header of that name.
    """
    if status not in (_REDIRECTS if method in ("GET", "HEAD") else _KEEP_METHOD) or not location:
        return None
    try:
        target = urljoin(url, location)
        scheme = _origin(target)[0]
    except ValueError:  # a malformed port or address
        return None
    if scheme not in ("http", "https") or not urlsplit(target).hostname:
        return None
    # From https to http, the request and its response would travel unencrypted.
    if scheme == "http" and urlsplit(url).scheme == "https":
        return None
    return target


def same_origin(one: str, other: str) -> bool:
    """True if two URLs have the same scheme, host and port."""
    return _origin(one) == _origin(other)


def host_of_redirect(location: str) -> str:
    """Return where a redirect leads, for messages: no path or query, which may hold a signature."""
    try:
        parts = urlsplit(location)
        return f"{parts.scheme}://{parts.hostname}" if parts.hostname else "elsewhere"
    except ValueError:
        return "elsewhere"


def _origin(url: str) -> Tuple[str, Optional[str], int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
