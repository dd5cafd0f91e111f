"""The one place where commands find their server, and open and close clients."""

from __future__ import annotations

import http.client
import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional, TypeVar

import click

import tinkex
from tinkex._api._optional import is_missing_route
from tinkex.cli import serve, status
from tinkex.cli.terminal import echo_error
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    ConfigError,
    InvalidInputError,
    ResponseDecodeError,
    SessionLostError,
)
from tinkex.types.checkpoint_path import ParsedCheckpointTinkerPath, locate_checkpoint

F = TypeVar("F", bound=Callable[..., Any])

base_url_option = click.option(
    "--base-url",
    metavar="URL",
    help="The server to talk to (default: TINKER_BASE_URL, else the hosted service).",
)

_NO_TINKER_SERVER = (
    "This does not look like a Tinker server: check base_url, its port and its path. "
    "`tinkex serve` prints the URL of its own."
)


def find_server(base_url: Optional[str], otherwise: str = "") -> Config:
    """Return the settings for the server that the options and the environment name.

    Where they name none, and there is no key for the hosted service, a `tinkex serve` on its usual
    port is used.

    Raises:
        ConfigError: there is none either; or a setting is wrong.
    """
    if (
        not base_url
        and not os.environ.get("TINKER_BASE_URL")
        and not tinkex.auth.tinker_has_credentials()
    ):
        if not _is_served_here(serve.DEFAULT_PORT):
            raise ConfigError(
                "no server to talk to",
                hint="Give --base-url or set TINKER_BASE_URL (`tinkex serve` starts a server "
                "here), or set TINKER_API_KEY (or run `tinkex auth login`) for the hosted "
                f"service{otherwise}.",
            )
        base_url = f"http://127.0.0.1:{serve.DEFAULT_PORT}"
        echo_error(f"Using the server at {base_url}.")
    config = Config.resolve(base_url=base_url)
    status.waiting_for(f"waiting for {config.host_and_port}")
    return config


def _is_served_here(port: int) -> bool:
    """Tell whether the embedded server listens on *port* of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", "/api/v1/healthz")
        found = connection.getresponse()
        return found.status == 200 and found.headers.get("Server") == "tinkex"
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def open_service(
    base_url: Optional[str], *, local_model: Optional[str] = None, data_dir: Optional[str] = None
) -> Iterator[tinkex.ServiceClient]:
    """Open a session; it ends with the block, as interrupted after Ctrl-C.

    Args:
        base_url: the server, or None for the environment's.
        local_model: start the embedded server with this model instead.
        data_dir: where the embedded server keeps checkpoints; None keeps none.
    """
    if local_model is not None:
        status.waiting_for(f"loading {local_model}")
        with tinkex.ServiceClient.local(model=local_model, data_dir=data_dir) as service:
            yield service
        return
    config = find_server(base_url, ", or add --local")
    with explained(config), tinkex.ServiceClient(base_url=config.base_url) as service:
        yield service


@contextmanager
def open_rest(base_url: Optional[str]) -> Iterator[tinkex.RestClient]:
    """Open a client for lists and records, without a session; it closes with the block."""
    config = find_server(base_url)
    with explained(config), tinkex.RestClient(base_url=config.base_url) as rest:
        yield rest


@contextmanager
def open_admin(base_url: Optional[str]) -> Iterator[tinkex.AdminClient]:
    """The same, for audit and billing."""
    config = find_server(base_url)
    with explained(config), tinkex.AdminClient(base_url=config.base_url) as admin:
        yield admin


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Have errors of the block name the server, and say what to do."""
    try:
        yield
    except APIError as error:
        explain(error, config)
        raise
    except SessionLostError as error:  # of the command's own session
        error.hint = "Run the command again."
        raise


def explain(error: APIError, config: Config) -> None:
    """Have *error* name the server of *config*, and say what to do."""
    if config.host_and_port not in error.message:
        error.message = f"{config.host_and_port}: {error.message}"
    error.hint = advice(error)


def advice(error: APIError) -> Optional[str]:
    """What to do about *error*: its own hint, or what its kind suggests."""
    if error.hint is not None:
        return error.hint
    if error.status is not None and error.status >= 500:
        return "The server, or a proxy before it, fails: look at its log, or try again later."
    if isinstance(error, ResponseDecodeError):
        return _NO_TINKER_SERVER
    if isinstance(error, APIConnectionError):
        return "Is this the address of a Tinker server, and does it run? Check base_url."
    if isinstance(error, APIStatusError) and is_missing_route(error):
        return _NO_TINKER_SERVER
    return None


def check_path(path: str) -> ParsedCheckpointTinkerPath:
    """Return the parts of a ``tinker://`` path; InvalidInputError says where to find one."""
    try:
        return locate_checkpoint(path)
    except InvalidInputError as error:
        error.hint = (
            "A path looks like tinker://<run>/weights/<name>; `tinkex checkpoint list` lists them."
        )
        raise
