"""auth: whether there are credentials, whether a server accepts them, and whose they are.

The public names are those of the official SDK's ``auth`` module.
"""

from __future__ import annotations

import os
from typing import Optional

from tinkex._api.sessions import CAPABILITIES_PATH
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex._transport.request import Reply, Request
from tinkex._transport.transport import Transport
from tinkex.config import Config
from tinkex.credentials import (
    COMMAND_VARIABLE,
    KEY_VARIABLE,
    CredentialsFile,
    read_claims,
    stored_key,
)
from tinkex.errors import APIConnectionError, CredentialError, ResponseDecodeError
from tinkex.retry import server_error_behind
from tinkex.types import ApiKeyInfo, GetServerCapabilitiesResponse, WhoamiResponse

_KEY_PATH = "/api/v1/auth/apikey/me"
_KEY_TIMEOUT_S = 30.0


def get_tinker_token() -> Optional[str]:
    """Return the key from the environment, or else the stored key, or else None.

    The credential command is not run.

    Raises:
        CredentialError: the credentials file is needed, but broken.
    """
    return os.environ.get(KEY_VARIABLE, "").strip() or stored_key()


def tinker_has_credentials() -> bool:
    """Return whether there is a key or a credential command.  Sends nothing and runs nothing.

    Raises:
        CredentialError: the credentials file is needed, but broken.
    """
    return bool(os.environ.get(COMMAND_VARIABLE, "").strip()) or get_tinker_token() is not None


def credential_source() -> Optional[str]:
    """Return where the key or token comes from, as text; None if there is none.

    Raises:
        CredentialError: the credentials file is needed, but broken.
    """
    if os.environ.get(KEY_VARIABLE, "").strip():
        return f"the environment (${KEY_VARIABLE})"
    if os.environ.get(COMMAND_VARIABLE, "").strip():
        return f"a command (${COMMAND_VARIABLE})"
    try:
        file = CredentialsFile()
    except CredentialError:
        return None  # without a home folder there is no file
    stored = file.default()
    return None if stored is None else f"{stored.name or 'a key'} ({file.path})"


def raise_if_tinker_not_accessible() -> None:
    """Ask the server that the environment names for its capabilities, without retries.

    Returns if the server accepts the key.  Blocks.

    Raises:
        CredentialError: there is no usable key.
        APIError: the server refuses the key, or cannot be reached.
    """
    check_access(Config.resolve())


def check_access(config: Config) -> None:
    """Ask the server of *config* for its capabilities, without retries.  Blocks.

    Raises:
        CredentialError, APIError: as for `raise_if_tinker_not_accessible`.
        ResponseDecodeError: the server is not a Tinker server.
    """
    path = CAPABILITIES_PATH
    reply = _ask_once(config, Request("GET", path, read_timeout_s=config.startup_timeout_s))
    try:
        GetServerCapabilitiesResponse.from_wire(reply.json())
    except ResponseDecodeError as error:
        raise ResponseDecodeError(f"GET {path}: {error.message}", hint=error.hint) from error


def _ask_once(config: Config, request: Request) -> Reply:
    transport = Transport(config)
    try:
        return ask_once(transport, request)
    finally:
        transport.abort()


def ask_once(transport: Transport, request: Request) -> Reply:
    """Send *request* once and return its 2xx response.  Blocks.

    Raises:
        APIError: the response was not 2xx, or there was none.  A response that looks like a
            gateway's counts as the server's.
    """
    try:
        reply = transport.send_once(request)
        if not 200 <= reply.status < 300:
            raise transport.status_error(request, reply)
        return reply
    except APIConnectionError as error:
        # Without a second attempt we cannot know whether a gateway sent the response, so the user
        # gets the error about the response itself.
        own = server_error_behind(error)
        if own is None:
            raise
        raise own from None


def about_key(config: Config) -> ApiKeyInfo:
    """Return what the server knows about the key of *config*.  Not retried; blocks.

    Raises:
        NotFoundError: the server does not report on keys.
        APIError: the server refuses the key, or cannot be reached.
    """
    reply = _ask_about_key(config, "GET")
    try:
        return ApiKeyInfo.from_wire(reply.json())
    except ResponseDecodeError as error:
        raise ResponseDecodeError(f"GET {_KEY_PATH}: {error.message}") from error


def revoke_key(config: Config) -> None:
    """Have the server forget the key of *config*, for good.  Raises as `about_key`."""
    _ask_about_key(config, "DELETE")


def _ask_about_key(config: Config, method: str) -> Reply:
    # With the key itself: a token issued for it would have no entry of its own on the server.
    request = Request(method, _KEY_PATH, read_timeout_s=_KEY_TIMEOUT_S, raw_credential=True)
    return _ask_once(config, request)


def whoami(transport: Transport) -> WhoamiResponse:
    """Return who the credential belongs to, according to its token.

    Blocks if a token must be requested first.

    Raises:
        CredentialError: there is no key; or the server issues no tokens, and the key is not a
            token itself.
        APIError: the server refuses to issue a token, or cannot be reached.
    """
    config = transport.config
    if not config.api_key and not config.credential_cmd:
        raise CredentialError(
            f"there is no key for {config.host_and_port}",
            hint=ErrorText(
                "Set TINKER_API_KEY",
                Setting("api_key", ..., aside=" (or {})"),
                " or run `tinkex auth login`.",
            ),
        )
    token = transport.token_for(Request("GET", "/api/v1/auth/token"))
    claims = None if token is None else read_claims(token.text)
    if claims is None or claims.subject is None:
        raise CredentialError(
            f"{transport.config.host_and_port} does not report who the key belongs to",
            hint="Only a server that exchanges keys for tokens does; the hosted service is one.",
        )
    org_urn = f"tml:organization:{claims.org_id}" if claims.org_id else ""
    return WhoamiResponse(claims.subject, org_urn, claims.email)
