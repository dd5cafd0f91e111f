"""The network checks of ``tinkex doctor``: proxy, CA bundle, DNS, TCP, TLS.

They use plain sockets, because an HTTP request would report only the first failure.  Each check
returns what it found, or raises `Skipped` or `Failed`; it blocks for a few seconds at most.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from typing import Tuple
from urllib.parse import urlsplit

from requests.utils import DEFAULT_CA_BUNDLE_PATH

from tinkex._runtime.base_url import proxy_variable
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.config import CA_VARIABLES, Config

#: Timeout of a single attempt, in seconds.
PATIENCE_S = 10.0

CHECK_PROXY = (
    "Check the proxy's address and log-in, or name the server in no_proxy to go without it."
)


class Skipped(Exception):
    """The check does not apply, for the reason given."""


class Failed(Exception):
    """The check found a fault."""

    def __init__(self, detail: str, fault: str, advice: str) -> None:
        super().__init__(detail)
        self.fault = fault
        self.advice = advice


def check_proxy(config: Config) -> str:
    """Return the proxy that requests go through, and where it is set."""
    if config.proxy is None:
        if proxy_variable(config.base_url) is None:
            raise Skipped("none is set")
        raise Skipped("not for this server: it is on this machine, or no_proxy names it")
    variable = proxy_variable(config.base_url)
    source = f"${variable}" if variable else "the system's settings"
    return f"{_without_password(config.proxy)} (from {source})"


def check_ca_bundle(config: Config) -> str:
    """Return the CA bundle that certificates are verified with, and where it is set."""
    if not config.base_url.startswith("https:"):
        raise Skipped("not needed for http")
    _tls_context(config)
    if config.ca_bundle is None:
        return "the built-in one (certifi)"
    return f"{config.ca_bundle} (from {_ca_source(config)})"


def _ca_source(config: Config) -> str:
    return next((f"${name}" for name in CA_VARIABLES if os.environ.get(name)), "the settings")


def _tls_context(config: Config) -> ssl.SSLContext:
    bundle = config.ca_bundle or DEFAULT_CA_BUNDLE_PATH
    try:
        if os.path.isdir(bundle):
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise Failed(
            f"{bundle} cannot be read as certificates: {reason}",
            "your settings",
            f"Have {_ca_source(config)} name a file of certificates in PEM format, or unset it.",
        ) from error


def _address(config: Config) -> Tuple[str, int]:
    """Return the host and port to connect to: those of the proxy, if there is one."""
    # A proxy resolves the server's name itself; this machine may not be able to.
    parts = urlsplit(config.proxy or config.base_url)
    default = {"https": 443, "http": 80}.get(parts.scheme, 1080)
    return str(parts.hostname), parts.port or default


def check_dns(config: Config) -> str:
    """Resolve the name of the server, or of the proxy."""
    host, port = _address(config)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        whose = "the proxy's address" if config.proxy else "the base URL"
        raise Failed(
            f"{host} has no address: {reason}",
            f"{whose}, or this machine's network",
            f"Check the spelling of {host}, and whether other names resolve here.",
        ) from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if addresses == [host]:
        raise Skipped(f"{host} is an address")
    return f"{host} is {', '.join(addresses)}"


def _connect(config: Config) -> socket.socket:
    host, port = _address(config)
    where = f"{host}:{port}"
    whose = "the proxy" if config.proxy else "the server"
    try:
        return socket.create_connection((host, port), config.connect_timeout_s)
    except ConnectionRefusedError as error:
        raise Failed(
            f"nothing listens at {where}: connection refused",
            f"{whose} (not running, or another port)",
            CHECK_PROXY
            if config.proxy
            else ErrorText(
                "Start the server (`tinkex serve` starts one here), or correct ",
                Setting("base_url"),
                ".",
            ),
        ) from error
    except socket.timeout as error:
        raise Failed(
            f"{where} did not respond within {config.connect_timeout_s:g} s",
            f"the network: a firewall, or {whose} is down",
            "Check that this machine may connect to it, and whether a proxy must be set "
            "(https_proxy).",
        ) from error
    except OSError as error:
        raise Failed(
            f"cannot connect to {where}: {error.strerror or error}",
            "this machine's network",
            "Check the connection of this machine, and whether a proxy must be set.",
        ) from error


def check_tcp(config: Config) -> str:
    """Connect to the server, or to the proxy, and hang up."""
    began = time.perf_counter()
    with _connect(config) as sock:
        address = str(sock.getpeername()[0])
    took_ms = 1000 * (time.perf_counter() - began)
    return f"connected to {address} in {took_ms:.1f} ms"


def check_tls(config: Config) -> str:
    """Make a TLS handshake with the server, and hang up."""
    if not config.base_url.startswith("https:"):
        raise Skipped("not used with http: traffic is not encrypted")
    if config.proxy:
        raise Skipped("made through the proxy, by the next check")
    host, _ = _address(config)
    context = _tls_context(config)
    with _connect(config) as sock:
        sock.settimeout(PATIENCE_S)
        try:
            with context.wrap_socket(sock, server_hostname=host) as encrypted:
                version = encrypted.version()
                until = (encrypted.getpeercert() or {}).get("notAfter")
        except ssl.SSLCertVerificationError as error:
            raise _distrust(error.verify_message) from error
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or str(error)
            raise Failed(
                f"the handshake failed: {reason}",
                "the base URL, or the server",
                ErrorText(
                    "Does the server speak https? If not, ",
                    Setting("base_url"),
                    f" is {config.base_url.replace('https:', 'http:', 1)}.",
                ),
            ) from error
    return f"{version}, certificate valid until {until}"


def _distrust(why: str) -> Failed:
    if "self" in why or "issuer" in why:
        return Failed(
            f"the certificate is not trusted: {why}",
            "the CA bundle (or something that intercepts TLS)",
            "If your network or server has a CA of its own, set SSL_CERT_FILE to a PEM file "
            "with its certificate.",
        )
    return Failed(
        f"the certificate is not valid: {why}",
        "the server's certificate, or the base URL",
        ErrorText(
            "Check the host name in ",
            Setting("base_url"),
            ", the server's certificate, and this machine's clock.",
        ),
    )


def _without_password(proxy: str) -> str:
    """Return a proxy's scheme, host and port, without the password that its URL may contain."""
    parts = urlsplit(proxy)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"
