"""Admission: admits or rejects a request by its headers, before any of its body is kept.

Three kinds of senders are rejected:

- senders without the key, if the server has one;
- web pages whose own name was made to point to this machine (DNS rebinding), so that the browser
  would let them read everything; recognized by ``Host``;
- web pages of other sites that make the browser send requests here; recognized by ``Origin``,
  ``Sec-Fetch-Site`` and the content type, since a browser asks before it sends JSON to another
  site.

Thread-safe; immutable once made.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from typing import Any, FrozenSet, Iterable, Mapping, NamedTuple, Optional
from urllib.parse import urlsplit

from tinkex.errors import LocalServerError
from tinkex.local.errors import HTTPError
from tinkex.local.http.signatures import TokenMint
from tinkex.local.settings import ServerSettings
from tinkex.wire.codec import JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE

#: Prefix of signed URLs.
SIGNED_PREFIX = "/signed/"

#: Prefixes of the OpenAI-compatible endpoint, which also takes the key as OpenAI's clients send it:
#: as ``Authorization: Bearer``.
OPENAI_PREFIXES = ("/oai/api/v1/", "/v1/")

#: Prefix of the web page's files.  They are the same on every server, so they need no key; the
#: page's data does.
PAGE_FILES_PREFIX = "/page/files/"

_OPEN_PATHS = ("/", "/api/v1/healthz")
_OPEN_PREFIXES = (PAGE_FILES_PREFIX, SIGNED_PREFIX)

_CONTENT_TYPES = (JSON_CONTENT_TYPE, PROTOBUF_CONTENT_TYPE, "application/protobuf")

_HEADERS = ("HOST", "ORIGIN", "SEC_FETCH_SITE", "X_API_KEY", "AUTHORIZATION")

# A name, an IPv4 address, or an IPv6 address in brackets; and a port, which may be empty.
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[0-9A-Za-z_.-]+))(?P<port>:\d{0,5})?")


class Head(NamedTuple):
    """What precedes the body of a request.

    Attributes:
        headers: by their names as in CGI, without ``HTTP_``, e.g. ``X_API_KEY``.
        body_bytes: size of the body; None if it is unknown before the body ends.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body_bytes: Optional[int]


def head_of(environ: Mapping[str, Any]) -> Head:
    """Read the head of a WSGI request."""
    headers = {name: environ.get(f"HTTP_{name}", "") for name in _HEADERS}
    headers["CONTENT_TYPE"] = environ.get("CONTENT_TYPE", "")
    # A chunked body ends where its chunks end, whatever Content-Length says.
    length = environ.get("CONTENT_LENGTH") or "0"
    known = length.isdigit() and len(length) < 20 and "HTTP_TRANSFER_ENCODING" not in environ
    return Head(
        environ.get("REQUEST_METHOD", ""),
        environ.get("PATH_INFO", ""),
        headers,
        int(length) if known else None,
    )


class Admission:
    """Admits or rejects requests.

    Args:
        settings: the server's settings: its key, its tokens, the names by which it may be reached.
        bearer: True also takes the key as ``Authorization: Bearer``, on every path.

    Raises:
        LocalServerError: an allowed host is not the name of a host.
    """

    def __init__(self, settings: ServerSettings, *, bearer: bool = False) -> None:
        self.mint = TokenMint(settings.jwt_lifetime_s)
        self._key = None if settings.api_key is None else settings.api_key.encode()
        self._jwt = settings.jwt
        self._max_body_bytes = settings.max_body_bytes
        self._bearer = bearer
        self._allowed_hosts = read_hosts(settings.allowed_hosts)

    def check(self, head: Head) -> None:
        """Reject a request.

        Raises:
            HTTPError: 421 if it is addressed to another host; 403 if it comes from a page of
                another site; 413 if the body is too large; 415 if it is neither JSON nor protobuf;
                401 if the key is missing or wrong.
        """
        self._check_host(head)
        # GET changes nothing, and a browser lets no page read a response of another origin.  A page
        # that made its own name point here fails in `_check_host`, or lacks the key.
        if head.method not in ("GET", "HEAD"):
            self._check_origin(head)
            # A body without a length is measured as it is read (http/messages.py).
            check_size(head.body_bytes or 0, self._max_body_bytes)
            if head.body_bytes != 0:
                _check_content_type(head)
        if not _needs_no_key(head.path):
            self._check_key(head)

    def admits(self, head: Head) -> bool:
        """True if `check` does not reject the request."""
        try:
            self.check(head)
        except HTTPError:
            return False
        return True

    def _check_host(self, head: Head) -> None:
        # A page cannot know the key, so a server that has one may be reached by any name.
        if self._key is not None:
            return
        host = head.headers.get("HOST", "")
        name = host_name(host)
        if name is None or not (is_loopback(name) or name in self._allowed_hosts):
            raise HTTPError(
                421,
                f"Host is {host!r:.100}; this server has no key, so it answers to localhost only: "
                "start it with --allow-host NAME (allowed_hosts), or with a key",
            )

    def _check_origin(self, head: Head) -> None:
        origin = head.headers.get("ORIGIN", "")
        site = head.headers.get("SEC_FETCH_SITE", "").strip().lower()
        if origin and not self._is_own_origin(origin, head.headers.get("HOST", "")):
            raise HTTPError(
                403,
                f"the request comes from a web page at {origin!r:.100}, which is not this server; "
                "if it is this server behind a proxy, start it with --allow-host NAME "
                "(allowed_hosts)",
            )
        # For browsers that send no Origin with such a request.  Other programs send neither header.
        if not origin and site not in ("", "none", "same-origin"):
            raise HTTPError(403, f"the request comes from a web page of another site ({site:.40})")

    def _is_own_origin(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        # `Origin: null`, as of a sandboxed frame, has no host, and is not ours.
        name = host_name(parts.netloc)
        if parts.scheme not in ("http", "https") or name is None:
            return False
        # Either side may leave the default port out.
        default = ":443" if parts.scheme == "https" else ":80"
        same = _with_port(parts.netloc, default) == _with_port(host, default)
        return same or name in self._allowed_hosts

    def _check_key(self, head: Head) -> None:
        given = head.headers.get("X_API_KEY", "")
        if not given and (self._bearer or head.path.startswith(OPENAI_PREFIXES)):
            scheme, _, token = head.headers.get("AUTHORIZATION", "").partition(" ")
            given = token.strip() if scheme.lower() == "bearer" else ""
        # In constant time, since the time of a comparison must not give the key away.  As bytes,
        # since compare_digest takes strings only if they are ASCII.
        if self._key is not None and hmac.compare_digest(given.encode(), self._key):
            return
        # Every token begins with these letters.  A server without a key checks tokens only if it
        # has clients ask for them.
        if given.startswith("eyJ") and (self._jwt or self._key is not None):
            # A client that could exchange a token for another would never need the key again.
            fault = self.mint.fault_of(given)
            if fault is None and head.path.endswith("/auth/token"):
                fault = "a token cannot be exchanged; send the key"
            if fault is not None:
                raise _invalid_token(fault)
        elif self._key is not None:
            what = "is not this server's" if given else "is missing"
            raise HTTPError(401, f"the API key {what}")


def host_name(host: str) -> Optional[str]:
    """Return the name or address in a ``Host`` header, in lower case; None if it is malformed."""
    match = _HOST.fullmatch(host.strip())
    if match is None:
        return None
    name = (match["v6"] or match["name"]).lower()
    # A trailing dot only marks the name as complete.
    return (name[:-1] if name.endswith(".") else name) or None


def is_loopback(name: str) -> bool:
    """True for localhost and for the loopback addresses."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_hosts(names: Iterable[str]) -> FrozenSet[str]:
    """Return the names of allowed hosts, in lower case; LocalServerError if one is malformed."""
    found = set()
    for given in names:
        # With two colons or more it is an IPv6 address, which has brackets in a header.
        name = host_name(f"[{given}]" if given.count(":") > 1 and "[" not in given else given)
        if name is None:
            raise LocalServerError(
                f"{given!r} is not the name of a host",
                hint="Give the name that clients use, such as tinker.example.com, without http://.",
            )
        found.add(name)
    return frozenset(found)


def check_size(size: int, limit: int) -> None:
    """Raise HTTPError 413 if a body of *size* bytes is larger than *limit*."""
    if size > limit:
        raise HTTPError(413, f"the body is larger than {limit} bytes; send smaller batches")


def _with_port(host: str, default: str) -> Optional[str]:
    """Return *host* as ``name:port``, for comparison; None if it is malformed."""
    name, match = host_name(host), _HOST.fullmatch(host.strip())
    if name is None or match is None:
        return None
    port = match["port"] or ""
    return name + (port if len(port) > 1 else default)


def _needs_no_key(path: str) -> bool:
    """True for what everyone may fetch: health, the files of the page, and signed URLs."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIXES)


def _check_content_type(head: Head) -> None:
    given = head.headers.get("CONTENT_TYPE", "")
    if given.partition(";")[0].strip().lower() not in _CONTENT_TYPES:
        raise HTTPError(
            415,
            f"Content-Type is {given!r:.100}, which is not JSON or protobuf: send a JSON object as "
            f"{JSON_CONTENT_TYPE}, or a batch as {PROTOBUF_CONTENT_TYPE}",
        )


def _invalid_token(fault: str) -> HTTPError:
    challenge = f'Bearer error="invalid_token", error_description="{fault}"'
    return HTTPError(
        401, f"the token is not valid: {fault}", headers={"WWW-Authenticate": challenge}
    )
