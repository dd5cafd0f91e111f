"""Config: all settings of a client, resolved once, when the client is created."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Tuple
from urllib.parse import urlsplit

from tinkex._runtime.base_url import normal_base_url, normal_proxy, proxy_for
from tinkex._runtime.numeric import convert_fields, is_finite, is_int, to_bool
from tinkex.credentials import COMMAND_VARIABLE, KEY_VARIABLE, stored_key
from tinkex.errors import ConfigError, InvalidInputError, a_type
from tinkex.usage import Budget, Price, check_prices

DEFAULT_BASE_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110

#: Header -> variable, for servers behind Cloudflare Access.
_ACCESS_VARIABLES = {
    "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
    "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
}

#: Values of an environment variable that mean "on".
_YES = ("1", "true", "yes", "on")

_CHOICES = {
    "wire": ("auto", "json", "protobuf"),
    "on_billing": ("raise", "wait"),
    "on_backpressure": ("wait", "raise"),
}

#: Settings that are integers.
_COUNTS = (
    "max_concurrent_samples",
    "max_unanswered_samples",
    "max_sample_bytes",
    "max_batch_bytes",
    "max_result_bytes",
    "max_unread",
    "max_heartbeat_failures",
)

#: Environment variables that name a CA bundle; the first one set is used.
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one client.  Create it with `Config.resolve`; the environment is not read later.

    Times are seconds.

    Attributes:
        base_url: the server, without a trailing slash; may hold a path prefix.  It is normalized:
            scheme and host in lower case, the path escaped.
        api_key: sent as ``X-API-Key``, or exchanged for a token if the server requires one; None
            for servers that need no key.
        credential_cmd: a shell command that prints a key or a token, run whenever one is needed;
            used if there is no api_key, or if the server requires the command.
        project_id, tags, user_metadata, display_name: labels of new sessions.
        wire: how training batches are sent: ``"auto"``, ``"protobuf"`` or ``"json"``.
        extra_headers: headers sent with every request to base_url; they override the library's own.
        access_headers: like extra_headers, but from the environment, for a proxy in front of the
            server.
        connect_timeout_s, read_timeout_s: timeouts of one HTTP attempt.
        poll_timeout_s: read timeout of a long poll; must exceed the server's longest hold.
        startup_timeout_s: a server that cannot be reached is reported after this long.
        max_outage_s: how long calls are retried during an outage, once a session exists.
        operation_timeout_s: a future fails after this long; None disables it.
        no_progress_timeout_s: a future fails after this long without contact with the server; None
            disables it.
        notice_after_s: the reason for a wait is logged after this long, and then at growing
            intervals.
        heartbeat_interval_s: interval between the heartbeats of a session.
        heartbeat_warn_after_s: warn when no heartbeat has succeeded for this long.
        max_heartbeat_failures, max_heartbeat_failure_s: a session counts as lost after this many
            consecutive failures, or this long without a success; None means never.
        quiet: log the server-side end of a session at DEBUG instead of INFO.
        on_billing: ``"raise"`` a 402 immediately, or ``"wait"`` until the account is topped up.
        proxy: URL of the proxy to use for base_url, or None.
        ca_bundle: path of a CA bundle to trust instead of the built-in one, or None; ``~`` is the
            home folder.
        max_concurrent_samples: the most sampling requests in flight if each takes a thread; others
            are queued.  The server may lower this limit.
        max_unanswered_samples: the same limit if one poll waits for all samples of a sampler, so
            that a sample takes no thread.
        max_sample_bytes, max_batch_bytes, max_result_bytes: the most bytes, in total, of sampling
            requests being submitted, of training batches being submitted, and of large results
            being fetched; others are queued.  The server's limit applies if it is lower, or for
            None.
        max_unread: the most unread futures; None means no limit.  A future counts as read after
            `result`, `exception` or a callback, or once it is garbage-collected.
        on_backpressure: what happens to a call beyond *max_unread*, and to a request that the
            server rejects with 429: ``"wait"``, or ``"raise"`` BackpressureError or RateLimitError
            immediately.  Training runs always wait after a 429.
        telemetry: report sessions and failures to the server; see `tinkex._sessions.telemetry`.
        tracing: make OpenTelemetry spans for operations and requests; see docs/telemetry.md.
        budget: a request that might exceed it raises `BudgetExceededError` and is not sent.
        prices: `Price` by base model name; ``"*"`` matches all other models.
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
    tracing: bool = False
    budget: Optional[Budget] = None
    prices: Mapping[str, Price] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "base_url", normal_base_url(self.base_url))
        set_field(self, "proxy", normal_proxy(self.proxy) if self.proxy else None)
        if self.ca_bundle is not None:
            set_field(self, "ca_bundle", _expanded("ca_bundle", self.ca_bundle))
        # Copied, because the caller may later change them.
        for name in ("user_metadata", "extra_headers", "access_headers"):
            set_field(self, name, _string_map(name, getattr(self, name)))
        set_field(self, "tags", _strings("tags", self.tags))
        set_field(self, "prices", check_prices(self.prices))
        for name in ("api_key", "credential_cmd", "project_id", "display_name"):
            _check_text(name, getattr(self, name))
        if self.api_key is not None:
            check_header("the API key", self.api_key)
        for name, text in {**self.access_headers, **self.extra_headers}.items():
            if not _HEADER_NAME.fullmatch(name):
                raise ConfigError(f"{name!r} is not a valid header name")
            check_header(f"the header {name!r}", text)
        if not isinstance(self.budget, (Budget, type(None))):
            raise ConfigError(f"budget is {self.budget!r}; it must be a Budget")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        self._take_numbers()
        # Check the CA bundle only if it is used: the environment may name one that is meant for
        # other programs.
        if (
            self.ca_bundle
            and self.base_url.startswith("https:")
            and not os.path.exists(self.ca_bundle)
        ):
            raise ConfigError(
                f"the CA bundle {self.ca_bundle!r} does not exist",
                hint=f"It was set by ca_bundle= or one of {', '.join(CA_VARIABLES)}.",
            )

    def _take_numbers(self) -> None:
        """Convert and check the settings that are numbers or flags."""
        seconds = [field.name for field in dataclasses.fields(self) if field.name.endswith("_s")]
        convert_fields(self, ints=_COUNTS, floats=seconds, text=False)
        for name in seconds:
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value > 0):
                raise ConfigError(f"{name} is {value!r}; it must be a positive number of seconds")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and not is_int(value, 1):
                raise ConfigError(f"{name} is {value!r}; it must be an integer, at least 1")
        for name in ("quiet", "telemetry", "tracing"):
            value = to_bool(getattr(self, name))
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}; it must be True or False")
            object.__setattr__(self, name, value)

    @classmethod
    def resolve(
        cls,
        *,
        environ: Optional[Mapping[str, str]] = None,
        own_credentials: bool = True,
        **settings: Any,
    ) -> Config:
        """Create a Config from keywords, then the environment, then defaults.

        A keyword that is None counts as missing.  These variables are read: ``TINKER_BASE_URL``,
        ``TINKER_API_KEY``, ``TINKER_CREDENTIAL_CMD``, ``TINKER_PROJECT_ID``, ``TINKER_TAGS``
        (comma-separated), ``CLOUDFLARE_ACCESS_CLIENT_ID`` and ``_SECRET``, ``TINKER_TELEMETRY`` (1,
        true, yes or on), and, through the standard library, the usual proxy and CA variables.
        Without a key or a command, the default key in ``~/.tinker/credentials.json`` is used, if
        there is one.

        If *own_credentials* is False, this process's key, command and access headers are not used:
        the keywords name a server that must not receive them.

        Servers on this machine (localhost, 127.x.x.x) are reached without a proxy.

        Raises:
            ConfigError: a setting is unknown, or a value is invalid.
            CredentialError: the credentials file is needed, but cannot be read or is broken.
        """
        env = os.environ if environ is None else environ
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting: {', '.join(unknown)}",
                hint=f"Known settings: {', '.join(sorted(known))}.",
            )
        given: Dict[str, Any] = {
            name: value for name, value in settings.items() if value is not None
        }
        base_url = normal_base_url(given.get("base_url") or own_base_url(env))
        given["base_url"] = base_url
        for name in ("credential_cmd", "api_key"):
            given[name] = _stripped(given.get(name))
        if own_credentials:
            _add_own_credentials(given, env, environ)
        given["project_id"] = _stripped(given.get("project_id")) or _stripped(
            env.get("TINKER_PROJECT_ID")
        )
        given.setdefault("tags", env.get("TINKER_TAGS", ""))
        given.setdefault("telemetry", env.get("TINKER_TELEMETRY", "").strip().lower() in _YES)
        given.setdefault("proxy", proxy_for(base_url))
        given.setdefault("ca_bundle", next((env[v] for v in CA_VARIABLES if env.get(v)), None))
        return cls(**given)

    @property
    def host_and_port(self) -> str:
        """``host:port`` of the server, for messages."""
        parts = urlsplit(self.base_url)
        return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"

    @property
    def key_digest(self) -> str:
        """A short digest of the key, to distinguish accounts without revealing keys."""
        source = self.api_key or ""
        if self.credential_cmd:
            source += f"\0{self.credential_cmd}"
        return _digest(source)

    # A copy of an object that refers to a Config keeps its key; through `__reduce__`, it would lose
    # the key.
    def __copy__(self) -> Config:
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> Config:
        return self

    def __reduce__(self) -> Tuple[Callable[..., Config], Tuple[Any, ...]]:
        # Leave out credentials: the process that unpickles the Config uses its own.
        fields = (field.name for field in dataclasses.fields(self))
        kept = {name: getattr(self, name) for name in fields if name not in _SECRET}
        return _resolve, (kept,)


def check_config(config: object) -> Config:
    """Return *config*; InvalidInputError if it is not a Config."""
    if not isinstance(config, Config):
        raise InvalidInputError(
            f"config is of type {type(config).__name__}, not a Config",
            hint="Create one with Config.resolve(base_url=...), or pass the settings by name.",
        )
    return config


#: Settings that may hold secrets.  A proxy's URL may hold a password.
_SECRET = ("api_key", "credential_cmd", "extra_headers", "access_headers", "proxy")


def _resolve(settings: Mapping[str, Any]) -> Config:
    return Config.resolve(**settings)


def own_base_url(environ: Optional[Mapping[str, str]] = None) -> str:
    """Return the base URL that clients of this process use by default.

    Raises:
        ConfigError: ``TINKER_BASE_URL`` is not the http(s) URL of a server.
    """
    env = os.environ if environ is None else environ
    return normal_base_url(_stripped(env.get("TINKER_BASE_URL")) or DEFAULT_BASE_URL)


def _add_own_credentials(
    given: Dict[str, Any], env: Mapping[str, str], environ: Optional[Mapping[str, str]]
) -> None:
    """Add this process's key, command and access headers if none are given."""
    given["credential_cmd"] = given["credential_cmd"] or _stripped(env.get(COMMAND_VARIABLE))
    given["api_key"] = given["api_key"] or _stripped(env.get(KEY_VARIABLE))
    if given["api_key"] is None and given["credential_cmd"] is None:
        given["api_key"] = stored_key(environ)
    access = {name: env.get(variable, "").strip() for name, variable in _ACCESS_VARIABLES.items()}
    given.setdefault("access_headers", {name: text for name, text in access.items() if text})


def _stripped(text: Any) -> Any:
    """Return *text* stripped (keys read from files often end in a line break); None if empty."""
    return text.strip() or None if isinstance(text, str) else text


def _check_text(name: str, text: object) -> None:
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{name} is of type {type(text).__name__}, not a string")


def _expanded(name: str, path: object) -> str:
    """Return *path* as a string, with ``~`` replaced by the home folder."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{name} is of type {type(path).__name__}, not a path")
    return os.path.expanduser(os.fspath(path))


def _strings(name: str, given: Any) -> Tuple[str, ...]:
    """Return *given*, a list of strings or one comma-separated string, as a tuple of strings."""
    if isinstance(given, str):
        return tuple(part.strip() for part in given.split(",") if part.strip())
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    for one in found:
        if not isinstance(one, str):
            raise ConfigError(f"{name} is {given!r}; it must be a list of strings")
    return found


def _string_map(name: str, given: Any) -> Dict[str, str]:
    """Return a copy of *given*, which must map strings to strings.  May hold secrets."""
    if not isinstance(given, Mapping):
        is_url = isinstance(given, str) and "://" in given
        raise ConfigError(
            f"{name} is of type {type(given).__name__}; it must be a dict",
            hint=f"Pass the server's address by name: base_url={given!r}." if is_url else None,
        )
    for key, value in given.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ConfigError(
                f"{name}[{key!r}] is of type {type(value).__name__}; names and values must be "
                "strings"
            )
    return dict(given)


def check_header(what: str, text: str) -> None:
    """Raise ConfigError unless *text* can be sent as a header; the message leaves *text* out."""
    if not isinstance(text, str):
        raise ConfigError(f"{what} is {a_type(text)}, not a string")
    if (
        not all(" " <= char <= "~" or "\xa0" <= char <= "\xff" for char in text)
        or text != text.strip()
    ):
        raise ConfigError(
            f"{what} cannot be sent: it holds a line break, a control character, surrounding "
            "spaces or a character outside Latin-1"
        )


@functools.lru_cache(64)  # computed for every request
def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]
