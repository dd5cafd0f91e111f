"""``tinkex doctor``: finds out what does not work between this machine and the server, and why.

The network checks are in `network_checks`; the server's checks use the library's own transport.  No
threads; each check blocks for a few seconds at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from typing import Any, Callable, Dict, Generator, List, Optional, Tuple

import click

from tinkex._api._optional import is_missing_route
from tinkex._api.encoding_choice import server_dialect
from tinkex._api.sessions import (
    CAPABILITIES_PATH,
    HEALTH_PATH,
    create_session,
    finish_session,
    session_heartbeat,
)
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._transport.request import Reply, Request
from tinkex._transport.request_errors import GATEWAY_HINT
from tinkex._transport.response_reading import ACCEPT_ENCODING
from tinkex._transport.server_flags import flags_for
from tinkex._transport.transport import Transport
from tinkex.auth import ask_once, credential_source
from tinkex.cli import network_checks, status_line
from tinkex.cli.commands import Command, in_flags
from tinkex.cli.connect import NO_TINKER_SERVER, advice, base_url_option, chosen_server
from tinkex.cli.network_checks import CHECK_PROXY, PATIENCE_S, Failed, Skipped
from tinkex.cli.output import format_option, print_json, wants_json
from tinkex.cli.terminal import echo, visible
from tinkex.config import DEFAULT_BASE_URL, Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    ConfigError,
    PermissionDeniedError,
    ResponseDecodeError,
    TinkexError,
)
from tinkex.types import GetServerCapabilitiesResponse

OK, FAILED, SKIPPED = "ok", "failed", "skipped"

#: Number of requests whose round trips are measured.
_TRIPS = 5


@click.command(cls=Command)
@base_url_option
@format_option
@click.pass_context
def doctor(ctx: click.Context, base_url: Optional[str]) -> None:
    """Check the settings, the network and the server, one after the other.

    Each check prints one line: ok, failed or skipped, and what was found; for a failure, also what
    is at fault and what to do.  The exit code is 1 if a check failed.  The command opens a session
    and ends it; nothing is trained or sampled.
    """
    made: List[Check] = []
    checks = Diagnosis(base_url).run(lambda name: status_line.waiting_for(f"checking: {name}"))
    with contextlib.closing(checks):
        for check in checks:
            made.append(_in_flags(check, ctx))
            if not wants_json():
                echo(_line(made[-1]))
    well = all(check.status != FAILED for check in made)
    if wants_json():
        print_json({"ok": well, "checks": [dataclasses.asdict(check) for check in made]})
    ctx.exit(0 if well else 1)


def _in_flags(check: Check, ctx: click.Context) -> Check:
    advice = None if check.advice is None else in_flags(check.advice, ctx)
    return dataclasses.replace(check, detail=in_flags(check.detail, ctx), advice=advice)


def _line(check: Check) -> str:
    text = f"{check.status:<8} {check.name:<11} {check.detail}"
    if check.fault is not None:
        text = f"{text.rstrip('.')}.  Fault: {check.fault}.  {check.advice}"
    return visible(text, one_line=True)


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        status: ``"ok"``, ``"failed"``, or ``"skipped"`` if it does not apply or cannot be made.
        detail: what was found.
        fault: what is at fault for a failure; None otherwise.
        advice: what to do about it; None otherwise.
        ms: how long the check took, in milliseconds.
    """

    name: str
    status: str
    detail: str
    fault: Optional[str] = None
    advice: Optional[str] = None
    ms: float = 0.0


class Diagnosis:
    """Checks everything between this machine and one server.  For one thread.

    Args:
        base_url: value of the option ``--base-url``, if it was given.
    """

    def __init__(self, base_url: Optional[str]) -> None:
        self._given_url = base_url
        self._config = Config(DEFAULT_BASE_URL)  # replaced once the settings are read
        self._transport: Optional[Transport] = None
        self._session_id: Optional[str] = None
        self._health: Optional[Request] = None  # a request that the server responds to
        self._codings: List[str] = []  # the content encodings of the responses

    def run(self, on_start: Callable[[str], object]) -> Generator[Check, None, None]:
        """Make the checks, one after the other; call *on_start* with the name of each.

        Closing the generator ends the session that was opened for the checks.
        """
        # The flag marks checks without which all later checks would fail as well.
        checks: Tuple[Tuple[str, Callable[[], str], bool], ...] = (
            ("settings", self._check_settings, True),
            ("key", self._check_key, False),
            ("proxy", self._of_network(network_checks.check_proxy), True),
            ("CA bundle", self._of_network(network_checks.check_ca_bundle), True),
            ("DNS", self._of_network(network_checks.check_dns), True),
            ("TCP", self._of_network(network_checks.check_tcp), True),
            ("TLS", self._of_network(network_checks.check_tls), True),
            ("HTTP", self._check_health, True),
            ("access", self._check_access, True),
            ("session", self._check_session, False),
            ("heartbeat", self._check_heartbeat, False),
            ("round trip", self._check_round_trip, False),
            ("encoding", self._check_encoding, False),
        )
        stopped_by: Optional[str] = None
        try:
            for name, method, stops in checks:
                if stopped_by is not None:
                    yield Check(name, SKIPPED, f"needs {stopped_by}")
                    continue
                on_start(name)
                check = self._make(name, method)
                if stops and check.status == FAILED:
                    stopped_by = name
                yield check
        finally:
            self._close()

    def _make(self, name: str, method: Callable[[], str]) -> Check:
        began = time.perf_counter()
        facts: Dict[str, Any] = {}
        try:
            facts.update(status=OK, detail=method())
        except Skipped as skipped:
            facts.update(status=SKIPPED, detail=str(skipped))
        except Failed as failed:
            facts.update(status=FAILED, detail=str(failed), fault=failed.fault)
            facts.update(advice=failed.advice)
        except TinkexError as error:
            fault, remedy = self._blame(error)
            facts.update(status=FAILED, detail=error.message, fault=fault, advice=remedy)
        return Check(name, ms=round(1000 * (time.perf_counter() - began), 1), **facts)

    def _close(self) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        try:
            if self._session_id is not None:
                finish_session(transport, self._session_id, "success", "tinkex doctor", 2.0)
        except TinkexError:
            pass  # without heartbeats, the server ends the session by itself
        finally:
            transport.abort()

    def _of_network(self, check: Callable[[Config], str]) -> Callable[[], str]:
        return lambda: check(self._config)

    # Settings

    def _check_settings(self) -> str:
        base_url, source = chosen_server(self._given_url)
        # Short timeouts: the command should report an outage, not wait for its end.
        self._config = Config.resolve(
            base_url=base_url,
            startup_timeout_s=PATIENCE_S / 2,
            read_timeout_s=PATIENCE_S,
            display_name="tinkex doctor",
        )
        self._transport = Transport(self._config)
        return f"base URL {self._config.base_url} ({source})"

    def _check_key(self) -> str:
        source = credential_source()
        if source is not None:
            return f"from {source}"
        if self._config.base_url == DEFAULT_BASE_URL:
            raise Failed(
                "there is none",
                "your settings",
                ErrorText(
                    "Set TINKER_API_KEY or run `tinkex auth login`; for another server, give ",
                    Setting("base_url"),
                    ".",
                ),
            )
        raise Skipped("there is none; some servers need none")

    # The server

    @property
    def _open_transport(self) -> Transport:
        assert self._transport is not None
        return self._transport

    def _ask(self, path: str, **details: Any) -> Reply:
        request = Request("GET", path, traffic="control", **details)
        reply = ask_once(self._open_transport, request)
        # Measure round trips with a route that responds: not all servers have healthz.
        self._health = self._health or request
        self._codings.append(reply.headers.get("content-encoding", "none"))
        return reply

    def _check_health(self) -> str:
        try:
            reply = self._ask(HEALTH_PATH, empty_response_ok=True)
        except APIStatusError as error:
            if is_missing_route(error):
                raise Skipped("the server has no route for this") from error
            if error.status in (401, 403) and not _is_page(error):
                raise Skipped("the server requires a key for this") from error
            raise
        name = reply.headers.get("server", "")
        return f"the server is healthy{f' ({name})' if name else ''}"

    def _check_access(self) -> str:
        try:
            reply = self._ask(CAPABILITIES_PATH)
            found = GetServerCapabilitiesResponse.from_wire(reply.json())
        except APIStatusError as error:
            if is_missing_route(error):  # the next check finds out whether it is a Tinker server
                raise Skipped("the server has no route that shows it") from error
            raise
        names = [model.model_name or "?" for model in found.supported_models]
        with_key = self._config.api_key or self._config.credential_cmd
        models = f"{len(names)} models" if len(names) != 1 else names[0]
        return f"{'the key is accepted' if with_key else 'no key is needed'}; it offers {models}"

    def _check_session(self) -> str:
        self._session_id = create_session(self._open_transport, self._config).session_id
        return f"{self._session_id} was created"

    def _check_heartbeat(self) -> str:
        reply = self._beat()
        if not 200 <= reply.status < 300:
            raise Failed(
                f"the server returned {reply.status} for the heartbeat of {self._session_id}",
                "the server",
                "Without heartbeats it ends every session: check its version, and any gateway "
                "that sends this path elsewhere.",
            )
        return f"the server accepts heartbeats (one every {self._config.heartbeat_interval_s:g} s)"

    def _beat(self) -> Reply:
        if self._session_id is None:
            raise Skipped("there is no session")
        return session_heartbeat(self._open_transport, self._session_id, timeout_s=PATIENCE_S)

    def _check_round_trip(self) -> str:
        took_ms = []
        for _ in range(_TRIPS):
            began = time.perf_counter()
            if self._health is not None:
                self._open_transport.send_once(self._health)
            else:
                self._beat()
            took_ms.append(1000 * (time.perf_counter() - began))
        middle, most = statistics.median(took_ms), max(took_ms)
        return f"{middle:.1f} ms (median of {_TRIPS} requests, the longest {most:.1f} ms)"

    def _check_encoding(self) -> str:
        flags = flags_for(self._open_transport, once=True)
        known = server_dialect(self._open_transport).encoding
        batches = known or "protobuf, or JSON if the first one is refused"
        zstd = ", zstd" if flags.proto_compress_fwdbwd else ""
        used = ", ".join(dict.fromkeys(self._codings)) or "unknown"
        return f"batches: {batches}{zstd}; responses: {used} (of {ACCEPT_ENCODING})"

    # Faults

    def _blame(self, error: TinkexError) -> Tuple[str, str]:
        """Return what is at fault for *error*, and what to do about it."""
        remedy = advice(error) if isinstance(error, APIError) else error.hint
        if isinstance(error, ConfigError):
            fault = "your settings"
        elif _is_page(error):
            fault = "a proxy, sign-on page or other web server that responds instead"
            remedy = NO_TINKER_SERVER if error.status in (200, 404) else GATEWAY_HINT
        elif isinstance(error, (AuthenticationError, PermissionDeniedError)):
            fault = "the key"
        elif isinstance(error, APITimeoutError):
            fault = "the server, or the network"
        elif isinstance(error, APIConnectionError):
            fault = "the proxy, or the CA bundle" if self._config.proxy else "the network"
            remedy = CHECK_PROXY if self._config.proxy else remedy
        elif isinstance(error, APIStatusError) and is_missing_route(error):
            fault = "the base URL"
        else:
            fault = "the server"
        return fault, remedy or "Try again later."


def _is_page(error: TinkexError) -> bool:
    """Return whether the response was a web page."""
    body = error.body if isinstance(error, APIStatusError) else None
    return isinstance(error, ResponseDecodeError) or (
        isinstance(body, str) and body.lstrip().startswith("<")
    )
