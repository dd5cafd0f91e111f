"""Config: every setting of a client, resolved once, when it is made."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import re
import urllib.request
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple
from urllib.parse import urlsplit

from tinkex.errors import ConfigError
from tinkex.keys.credentials import COMMAND_VARIABLE, KEY_VARIABLE, stored_key
from tinkex.usage import Budget, Price, check_prices

DEFAULT_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110

#: What a site behind Cloudflare Access lets a program in by.
_ACCESS_VARIABLES = {
    "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
    "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
}

#: What switches a variable on.
_YES = ("1", "true", "yes", "on")

_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one client.  Make it with `Config.resolve`; nothing reads the environment later.

    Times are seconds.

    Attributes:
        base_url: the server, without a trailing slash; may hold a path prefix.
        api_key: sent as ``X-API-Key``, or exchanged for a token where the server wants that; None
            for servers that ask for none.
        credential_cmd: a shell command that prints a key or a token, run whenever one is needed;
            used if there is no api_key, or if the server says so.
        project_id, tags, user_metadata, display_name: what a new session is labelled with.
        wire: how training batches are sent: ``"auto"``, ``"protobuf"`` or ``"json"``.
        extra_headers: sent with every request to base_url; they win over our own.
        access_headers: likewise, but those of the environment, for what stands before the server.
        connect_timeout_s, read_timeout_s: of one HTTP attempt.
        poll_timeout_s: read timeout of a long poll; must exceed the server's longest hold.
        startup_timeout_s: a server that cannot be reached is reported after this long.
        max_outage_s: once a session lives, calls ride out an outage for this long.
        operation_timeout_s: a future fails after this long; None is off.
        no_progress_timeout_s: a future fails after this long without contact; None is off.
        notice_after_s: a wait is explained in the log after this long, then at growing intervals.
        heartbeat_interval_s: between two heartbeats of a session.
        heartbeat_warn_after_s: warn when no heartbeat has succeeded for this long.
        max_heartbeat_failures, max_heartbeat_failure_s: give a session up after so many failures
            in a row, or so long without success; None is never.
        quiet: log the server-side end of a session at DEBUG instead of INFO.
        on_billing: ``"raise"`` a 402 at once, or ``"wait"`` until the account is topped up.
        proxy: URL of the HTTP proxy to use for this base URL, or None.
        ca_bundle: path of a CA bundle to trust instead of the built-in one, or None.
        max_concurrent_samples: sampling requests in flight at once, where each takes a thread;
            more wait their turn.  The server may lower it.
        max_unanswered_samples: likewise, where one poll waits for all samples of a sampler and
            they take none.
        max_sample_bytes, max_batch_bytes, max_result_bytes: of sampling requests being submitted,
            training batches being submitted, and large results being fetched at once; more wait
            their turn.  None, or more than the server's own limit, is that limit.
        max_unread: futures given out and not read yet; None is unbounded.  A future is read by
            its result, its exception or a callback, or when it is dropped.
        on_backpressure: what happens to a call beyond *max_unread*, and to a request that the
            server turns away with 429 (of a training run: always ``"wait"``): ``"wait"``, or
            ``"raise"`` BackpressureError or RateLimitError at once.
        telemetry: report sessions and failures to the server; see `tinkex.telemetry`.
        budget: what would exceed it is refused, by `BudgetExceededError`, before it is sent.
        prices: `Price` by name of base model; ``"*"`` stands for all others.
    """

    base_url: str
    api_key: Optional[str] = dataclasses.field(default=None, repr=False)
    credential_cmd: Optional[str] = dataclasses.field(default=None, repr=False)
    project_id: Optional[str] = None
    tags: Tuple[str, ...] = ()
    user_metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    display_name: Optional[str] = None
    wire: str = "auto"
    extra_headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    access_headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    connect_timeout_s: float = 3.05  # just over TCP's first retransmission
    read_timeout_s: float = 60.0
    poll_timeout_s: float = 320.0
    startup_timeout_s: float = 15.0
    max_outage_s: float = 300.0
    operation_timeout_s: Optional[float] = None
    no_progress_timeout_s: Optional[float] = None
    notice_after_s: float = 10.0
    heartbeat_interval_s: float = 10.0
    heartbeat_warn_after_s: float = 120.0
    max_heartbeat_failures: Optional[int] = None
    max_heartbeat_failure_s: Optional[float] = None
    quiet: bool = False
    on_billing: str = "raise"
    proxy: Optional[str] = dataclasses.field(default=None, repr=False)
    ca_bundle: Optional[str] = None
    max_concurrent_samples: int = 400
    max_unanswered_samples: int = 20_000
    max_sample_bytes: Optional[int] = None
    max_batch_bytes: Optional[int] = None
    max_result_bytes: Optional[int] = None
    max_unread: Optional[int] = 1_000_000
    on_backpressure: str = "wait"
    telemetry: bool = False
    budget: Optional[Budget] = None
    prices: Mapping[str, Price] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_base_url(self.base_url)
        if self.api_key is not None:
            check_header("the API key", self.api_key)
        for name, text in {**self.access_headers, **self.extra_headers}.items():
            if not (isinstance(name, str) and _HEADER_NAME.fullmatch(name)):
                raise ConfigError(f"{name!r} is not the name of a header")
            check_header(f"the header {name!r}", text)
        # Copies, because the caller's own may change later.
        object.__setattr__(self, "user_metadata", dict(self.user_metadata))
        object.__setattr__(self, "extra_headers", dict(self.extra_headers))
        object.__setattr__(self, "access_headers", dict(self.access_headers))
        object.__setattr__(self, "prices", check_prices(self.prices))
        if not isinstance(self.budget, (Budget, type(None))):
            raise ConfigError(f"budget is {self.budget!r}; it must be a Budget")
        if self.wire not in ("auto", "json", "protobuf"):
            raise ConfigError(f"wire is {self.wire!r}; it must be auto, json or protobuf")
        if self.on_billing not in ("raise", "wait"):
            raise ConfigError(f"on_billing is {self.on_billing!r}; it must be raise or wait")
        if self.on_backpressure not in ("wait", "raise"):
            raise ConfigError(
                f"on_backpressure is {self.on_backpressure!r}; it must be wait or raise"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_s") and value is not None and not _is_positive(value):
                raise ConfigError(
                    f"{field.name} is {value!r}; it must be a positive number of seconds"
                )
        for name in (
            "max_concurrent_samples",
            "max_unanswered_samples",
            "max_sample_bytes",
            "max_batch_bytes",
            "max_result_bytes",
            "max_unread",
            "max_heartbeat_failures",
        ):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ConfigError(f"{name} is {value!r}; it must be an integer, at least 1")
        if (
            self.ca_bundle
            and self.base_url.startswith("https")
            and not os.path.exists(self.ca_bundle)
        ):
            raise ConfigError(
                f"the CA bundle {self.ca_bundle!r} does not exist",
                hint=f"It comes from one of {', '.join(_CA_VARIABLES)} (or ca_bundle=).",
            )

    @classmethod
    def resolve(
        cls,
        *,
        environ: Optional[Mapping[str, str]] = None,
        own_credentials: bool = True,
        **settings: Any,
    ) -> Config:
        """Make a Config from keywords, then the environment, then defaults.

        A keyword that is None counts as not given.  Variables read: ``TINKER_BASE_URL``,
        ``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, ``TINKER_PROJECT_ID``, ``TINKER_TAGS``
        (comma-separated), ``CLOUDFLARE_ACCESS_CLIENT_ID`` and ``_SECRET``,
        ``TINKER_TELEMETRY`` (1, true, yes or on), and, through the standard library, the usual
        proxy and CA variables.  Without a key and a command, the default key of
        ``~/.tinker/credentials.json`` is taken, if there is one.

        With *own_credentials* False, the key, the command and the access headers of this process
        are left out: they are not meant for the server that the keywords name.

        Programs on this machine (localhost, 127.x.x.x) are reached without a proxy.

        Raises:
            ConfigError: an unknown setting, or a value out of its range.
            CredentialError: the credentials file is needed, and broken.
        """
        env = os.environ if environ is None else environ
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting: {', '.join(unknown)}",
                hint=f"Known are: {', '.join(sorted(known))}.",
            )
        given: Dict[str, Any] = {
            name: value for name, value in settings.items() if value is not None
        }
        given["base_url"] = _without_slash(given.get("base_url") or own_base_url(env))
        for name in ("credential_cmd", "api_key"):
            given[name] = _stripped(given.get(name))
        if own_credentials:
            given["credential_cmd"] = given["credential_cmd"] or _stripped(
                env.get(COMMAND_VARIABLE)
            )
            given["api_key"] = given["api_key"] or _stripped(env.get(KEY_VARIABLE))
            if given["api_key"] is None and given["credential_cmd"] is None:
                given["api_key"] = stored_key(environ)
            access = {
                name: env.get(variable, "").strip() for name, variable in _ACCESS_VARIABLES.items()
            }
            given.setdefault(
                "access_headers", {name: text for name, text in access.items() if text}
            )
        given.setdefault("project_id", env.get("TINKER_PROJECT_ID") or None)
        tags = given.get("tags", env.get("TINKER_TAGS", ""))
        given["tags"] = tuple(_split(tags) if isinstance(tags, str) else tags)
        given.setdefault("telemetry", env.get("TINKER_TELEMETRY", "").strip().lower() in _YES)
        given.setdefault("proxy", proxy_for(given["base_url"]))
        given.setdefault("ca_bundle", next((env[v] for v in _CA_VARIABLES if env.get(v)), None))
        return cls(**given)

    @property
    def host_and_port(self) -> str:
        """``host:port`` of the server, for messages."""
        parts = urlsplit(self.base_url)
        return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"

    @property
    def key_digest(self) -> str:
        """A short digest of the key: tells two accounts apart without revealing either."""
        source = self.api_key or ""
        if self.credential_cmd:
            source += f"\0{self.credential_cmd}"
        return _digest(source)

    def __copy__(self) -> Config:
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> Config:
        return self

    def __reduce__(self) -> Tuple[Callable[..., Config], Tuple[Any, ...]]:
        # Without anything that authenticates: who unpickles it uses its own.
        fields = (field.name for field in dataclasses.fields(self))
        kept = {name: getattr(self, name) for name in fields if name not in _SECRET}
        return _resolve, (kept,)


#: Settings that may hold secrets.  A proxy's URL may hold a password.
_SECRET = ("api_key", "credential_cmd", "extra_headers", "access_headers", "proxy")


def _resolve(settings: Mapping[str, Any]) -> Config:
    return Config.resolve(**settings)


def own_base_url(environ: Optional[Mapping[str, str]] = None) -> str:
    """The server that a client of this process connects to unless it is given another."""
    env = os.environ if environ is None else environ
    return _without_slash(env.get("TINKER_BASE_URL") or DEFAULT_BASE_URL)


def _without_slash(base_url: object) -> str:
    return str(base_url).strip().rstrip("/")


def _stripped(text: Optional[str]) -> Optional[str]:
    """None if there is nothing in it; keys read from files end with a newline."""
    return (text or "").strip() or None


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def _check_base_url(base_url: str) -> None:
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        usable = False
    if not usable:
        raise ConfigError(
            f"base_url {base_url!r} is not an http(s) URL",
            hint="Give the server's address, e.g. http://localhost:8080.",
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the base_url of {parts.hostname} holds a user name or password",
            hint="It would end up in logs. Send it as a header "
            "(default_headers_overrides={'Authorization': 'Basic ...'}).",
        )


def check_header(what: str, text: str) -> None:
    """Raise unless *text* can be sent as a header; the message does not hold it."""
    if not isinstance(text, str):
        raise ConfigError(f"{what} is a {type(text).__name__}, not a string")
    if (
        not all(" " <= char <= "~" or "\xa0" <= char <= "\xff" for char in text)
        or text != text.strip()
    ):
        raise ConfigError(
            f"{what} cannot be sent: it holds a line break, a control character, spaces around it "
            "or a character outside Latin-1"
        )


def _split(text: str) -> List[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def proxy_for(base_url: str) -> Optional[str]:
    """The proxy that the environment (or the system's settings) names for *base_url*."""
    _check_base_url(base_url)
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return None
    # With the port, since no_proxy may name one.
    if urllib.request.proxy_bypass(f"{host}:{parts.port}" if parts.port else host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


@functools.lru_cache(64)  # it is asked for with each request
def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
