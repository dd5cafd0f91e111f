"""URLs that a caller gives: of the server and of a proxy.  Pure functions.

They are checked when the client is made.  Later, a mistake in one would look like an outage, which
clients wait out for minutes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import urllib.request
from typing import Optional
from urllib.parse import SplitResult, quote, urlsplit, urlunsplit

from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.errors import ConfigError

#: A host name, made of labels that the resolver accepts, or an IPv6 address in brackets.
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*\.?|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~-]+)?\]"
_ADDRESS = re.compile(rf"(?P<user>[^@]*@)?(?P<host>{_HOST})(?P<port>:[0-9]{{0,5}})?")
_LONGEST_HOST = 253

#: A per cent sign that escapes nothing.
_BARE_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"

_PROXY_SCHEMES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")


def normal_base_url(url: object) -> str:
    """Return *url* normalized: scheme and host in lower case, the path escaped.

    Surrounding whitespace and trailing slashes are dropped.

    Raises:
        ConfigError: *url* is not an http(s) URL of a host with, at most, a port and a path.
    """
    text = url.strip() if isinstance(url, str) else ""
    parts = _split(text)
    if parts is None or parts.scheme not in ("http", "https"):
        shown = "(not shown: it may hold a password)" if "@" in str(url) else repr(url)
        raise ConfigError(
            ErrorText(Setting("base_url"), f" {shown} is not an http(s) URL"),
            hint=_suggestion(text),
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            ErrorText(
                "the ", Setting("base_url"), f" of {parts.hostname} holds a user name or password"
            ),
            hint="It would end up in logs. Send it as a header: "
            "default_headers_overrides={'Authorization': 'Basic ...'}.",
        )
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise ConfigError(
            ErrorText(Setting("base_url"), f" {url!r} holds a query or a fragment"),
            hint="Give the address only, up to the path: /api/v1 is added to it.",
        )
    path = quote(_BARE_PERCENT.sub("%25", parts.path), safe=_PATH_CHARACTERS).rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _suggestion(text: str) -> str:
    """Return a hint about *text*, which is not an http(s) URL."""
    if "://" not in text and "@" not in text and _split(f"http://{text}") is not None:
        return f"Begin it with the scheme: http://{text} or https://{text}."
    return "Give the server's address, e.g. http://localhost:8080; a port is from 1 to 65535."


def normal_proxy(url: object) -> str:
    """Return the URL of a proxy, with ``http://`` in front if it has no scheme.

    Raises:
        ConfigError: *url* is not a proxy's, or PySocks, which a SOCKS proxy needs, is not
            installed; the message leaves out *url*, which may hold a password.
    """
    text = url.strip() if isinstance(url, str) else ""
    if "://" not in text:
        text = f"http://{text}"
    parts = _split(text)
    if parts is None or parts.scheme not in _PROXY_SCHEMES:
        raise ConfigError(
            "the proxy setting is not a valid proxy URL",
            hint="It looks like http://proxy:3128, and comes from proxy= or from http_proxy, "
            "https_proxy or all_proxy. Name hosts that need no proxy in no_proxy.",
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socks") is None:
        raise ConfigError(
            f"the proxy {parts.scheme}://{parts.hostname} needs PySocks, which is not installed",
            hint='python -m pip install "requests[socks]", or name the server in no_proxy.',
        )
    return urlunsplit(parts)


def proxy_for(url: str) -> Optional[str]:
    """Return the proxy that the environment (or the system's settings) names for *url*, or None.

    Servers on this machine are reached without a proxy.
    """
    parts = _split(url)
    host = (parts.hostname if parts is not None else None) or ""
    if parts is None or host in ("localhost", "::1") or host.startswith("127."):
        return None
    # With the port, since no_proxy may name a port.
    if urllib.request.proxy_bypass(f"{host}:{parts.port}" if parts.port else host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all") or None


def proxy_variable(url: str) -> Optional[str]:
    """Return the environment variable that names the proxy for URLs like *url*, or None."""
    parts = _split(url)
    schemes = () if parts is None else (parts.scheme, "all")
    names = [name for scheme in schemes for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper())]
    return next((name for name in names if os.environ.get(name)), None)


def _split(url: str) -> Optional[SplitResult]:
    """Return the parts of *url*, with the host in lower case and ASCII; None if it is invalid."""
    if not url.isprintable():  # urlsplit would drop line breaks
        return None
    try:
        parts = urlsplit(url)
        user, at, address = parts.netloc.rpartition("@")
        if not address.isascii():
            address = address.encode("idna").decode("ascii")
        match = _ADDRESS.fullmatch(user + at + address)
        if match is None or parts.port == 0 or len(match["host"]) > _LONGEST_HOST:
            return None
    except ValueError:  # an invalid port, IPv6 address or international name
        return None
    port = match["port"] if parts.port else ""
    return parts._replace(netloc=f"{match['user'] or ''}{match['host'].lower()}{port}")
