"""Finds the server of a command, and opens and closes clients."""

from __future__ import annotations

import functools
import http.client
import os
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, TypeVar

import click

import tinkex
from tinkex._api._optional import is_missing_route
from tinkex._runtime.error_text import ErrorText, Setting
from tinkex.cli import serve, status_line
from tinkex.cli.output import format_option
from tinkex.cli.terminal import echo_error
from tinkex.config import Config
from tinkex.errors import (
    APIConnectionError,
    APIError,
    APIStatusError,
    BadRequestError,
    ConfigError,
    InvalidInputError,
    NotFoundError,
    ResponseDecodeError,
    RouteMissingError,
    SessionLostError,
    UnprocessableEntityError,
)
from tinkex.types.checkpoint_path import ParsedCheckpointTinkerPath, locate_checkpoint

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

base_url_option = click.option(
    "--base-url",
    metavar="URL",
    help="URL of the server (default: TINKER_BASE_URL, or else the hosted service).",
)

NO_TINKER_SERVER = ErrorText(
    "This does not look like a Tinker server: check ",
    Setting("base_url"),
    ", its port and its path. `tinkex serve` prints its URL.",
)


def find_server(base_url: Optional[str], otherwise: str = "") -> Config:
    """Return the settings for the server that the options and the environment name.

    If they name none and there is no key for the hosted service, a `tinkex serve` on its default
    port is used.

    Raises:
        ConfigError: no server was found, or a setting is wrong.
    """
    base_url, source = chosen_server(base_url)
    if source == _DEFAULT:
        if not tinkex.auth.tinker_has_credentials():
            raise ConfigError(
                "no server was given",
                hint="Give --base-url or set TINKER_BASE_URL (`tinkex serve` starts a server "
                "here), or set TINKER_API_KEY (or run `tinkex auth login`) for the hosted "
                f"service{otherwise}.",
            )
    elif source == _SERVED_HERE:
        echo_error(f"Using the server at {base_url}.")
    config = Config.resolve(base_url=base_url)
    status_line.waiting_for(f"waiting for {config.host_and_port}")
    return config


def chosen_server(base_url: Optional[str]) -> Tuple[Optional[str], str]:
    """Return the base URL that commands use, None for the default, and where it comes from."""
    if base_url:
        return base_url, "from --base-url"
    named = os.environ.get("TINKER_BASE_URL")
    if named:
        return named, "from $TINKER_BASE_URL"
    if not tinkex.auth.tinker_has_credentials() and _is_served_here(serve.DEFAULT_PORT):
        return f"http://127.0.0.1:{serve.DEFAULT_PORT}", _SERVED_HERE
    return None, _DEFAULT


_SERVED_HERE = "`tinkex serve` on this machine"
_DEFAULT = "the default"


def _is_served_here(port: int) -> bool:
    """Return whether an embedded server listens on *port* of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    return is_embedded(connection, "/api/v1/healthz", {})


def is_embedded(connection: http.client.HTTPConnection, path: str, headers: Dict[str, str]) -> bool:
    """Return whether an embedded server responds to *path* on *connection*, which is closed."""
    try:
        connection.request("GET", path, headers=headers)
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
    """Open a session that ends with the block, marked as interrupted after Ctrl-C.

    Args:
        base_url: URL of the server; None takes it from the environment.
        local_model: start the embedded server with this model instead.
        data_dir: folder for the embedded server's checkpoints; None keeps none.
    """
    if local_model is not None:
        status_line.waiting_for(f"loading {local_model}")
        with tinkex.ServiceClient.local(model=local_model, data_dir=data_dir) as service:
            yield service
        return
    config = find_server(base_url, ", or add --local")
    with explained(config), tinkex.ServiceClient(base_url=config.base_url) as service:
        yield service


@contextmanager
def open_rest(base_url: Optional[str]) -> Iterator[tinkex.RestClient]:
    """Open a client without a session, for lists and records; it is closed with the block."""
    config = find_server(base_url)
    with explained(config), tinkex.RestClient(base_url=config.base_url) as rest:
        yield rest


def with_rest(command: Callable[..., None]) -> Callable[..., None]:
    """Have *command* called with an open RestClient as *rest*; add ``--base-url`` and ``-f``."""

    @functools.wraps(command)
    def run(*args: Any, base_url: Optional[str], **given: Any) -> None:
        with open_rest(base_url) as rest:
            command(*args, rest=rest, **given)

    return base_url_option(format_option(run))


def with_admin(command: Callable[..., None]) -> Callable[..., None]:
    """Have *command* called with an open AdminClient as *admin*; add options like `with_rest`."""

    @functools.wraps(command)
    def run(base_url: Optional[str], **given: Any) -> None:
        config = find_server(base_url)
        with explained(config), tinkex.AdminClient(base_url=config.base_url) as admin:
            command(admin=admin, **given)

    return base_url_option(format_option(run))


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Add the server's address and advice to errors raised in the block."""
    try:
        yield
    except APIError as error:
        explain(error, config)
        raise
    except SessionLostError as error:  # this command opened the session
        error.hint = "Run the command again."
        raise


def explain(error: APIError, config: Config) -> None:
    """Add the address of *config*'s server and advice to *error*."""
    # The messages of failed connections name the server already.
    if config.host_and_port not in error.message:
        error.message = ErrorText(f"{config.host_and_port}: ", error.message)
    error.hint = advice(error)


def advice(error: APIError) -> Optional[str]:
    """Return advice about *error*: its own hint, or one chosen by its type."""
    if error.hint is not None:
        return error.hint
    if error.status is not None and error.status >= 500:
        return "The server, or a proxy in front of it, failed: check its log, or try again later."
    if isinstance(error, ResponseDecodeError):
        return NO_TINKER_SERVER
    if isinstance(error, APIConnectionError):
        return ErrorText(
            "Is this the address of a Tinker server, and is it running? Check ",
            Setting("base_url"),
            ".",
        )
    if isinstance(error, APIStatusError) and is_missing_route(error):
        return NO_TINKER_SERVER
    return None


def check_path(path: str) -> ParsedCheckpointTinkerPath:
    """Parse a ``tinker://`` path; the InvalidInputError says where to find valid ones."""
    try:
        return locate_checkpoint(path)
    except InvalidInputError as error:
        error.hint = (
            "A path looks like tinker://<run>/weights/<name>; `tinkex checkpoint list` lists them."
        )
        raise


@contextmanager
def existing(path: str) -> Iterator[None]:
    """Check a ``tinker://`` path; in the block, say so if the server has no such checkpoint."""
    check_path(path)
    try:
        yield
    except NotFoundError as error:
        if not is_missing_route(error):
            error.message = f"there is no checkpoint {path}"
            error.hint = (
                "It was deleted, has expired, or is on another server; `tinkex checkpoint list` "
                "lists the checkpoints on this one."
            )
        raise


def fetch_pages(fetch: Callable[[int, int], List[T]], limit: int, page_size: int) -> List[T]:
    """Return the first *limit* items of a list (all if it is 0), fetched page by page.

    Args:
        fetch: returns the items of one page, given its size and its offset.
        page_size: the largest size of a page.
    """
    found: List[T] = []
    while limit == 0 or len(found) < limit:
        wanted = min(page_size, limit - len(found)) if limit else page_size
        page = fetch(wanted, len(found))
        found += page
        if len(page) < wanted:
            break
    return found


def base_sampler(service: tinkex.ServiceClient, model: str) -> tinkex.SamplingClient:
    """Return a client of the base *model*; the error for an unknown model names the remedy."""
    try:
        return service.create_sampling_client(base_model=model)
    except (BadRequestError, NotFoundError, UnprocessableEntityError) as error:
        error.hint = error.hint or "`tinkex model list` lists the models that the server offers."
        raise


def context_length(service: tinkex.ServiceClient, model: Optional[str]) -> Optional[int]:
    """Return the context length of *model* in tokens; None if the server does not report it.

    If *model* is None, the server's only model is meant.
    """
    try:
        models = service.get_server_capabilities().supported_models
    except RouteMissingError:  # leave it to the server to refuse longer prompts
        return None
    lengths = {found.max_context_length for found in models if model in (None, found.model_name)}
    return lengths.pop() if len(lengths) == 1 else None
