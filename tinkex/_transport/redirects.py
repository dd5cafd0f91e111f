"""Which redirects are followed, and with which headers.  Pure functions of URLs and headers.

A GET follows every redirect, another method only those that keep it (307, 308).  Never from https
to http.  Headers that authenticate a request are sent to its own origin only.
"""

from __future__ import annotations

from typing import Optional, Tuple
from urllib.parse import urljoin, urlsplit

#: Redirects in a row that are followed.
MAX_HOPS = 5

_KEEP_METHOD = (307, 308)
_ANY = (301, 302, 303, *_KEEP_METHOD)


def next_hop(method: str, url: str, status: int, location: Optional[str]) -> Optional[str]:
    """Return the absolute URL that a redirect from *url* leads to, or None if it is not followed.

    *location* is the header of that name.
    """
    if status not in (_ANY if method in ("GET", "HEAD") else _KEEP_METHOD) or not location:
        return None
    try:
        target = urljoin(url, location)
        scheme = _origin(target)[0]
    except ValueError:  # a port or an address that is none
        return None
    if scheme not in ("http", "https") or not urlsplit(target).hostname:
        return None
    if scheme == "http" and urlsplit(url).scheme == "https":
        return None
    return target


def same_origin(one: str, other: str) -> bool:
    """True if two URLs have the same scheme, host and port."""
    return _origin(one) == _origin(other)


def shown(location: str) -> str:
    """Where a redirect leads, for messages: without path and query, which may hold a signature."""
    try:
        parts = urlsplit(location)
        return f"{parts.scheme}://{parts.hostname}" if parts.hostname else "elsewhere"
    except ValueError:
        return "elsewhere"


def _origin(url: str) -> Tuple[str, Optional[str], int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
