"""The one place where commands open and close clients."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional, TypeVar

import click

import tinkex
from tinkex.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

base_url_option = click.option(
    "--base-url",
    metavar="URL",
    help="The server to talk to (default: TINKER_BASE_URL, else the hosted service).",
)


def check_that_a_server_is_known(base_url: Optional[str], otherwise: str = "") -> None:
    """Raise ConfigError if there is neither a base URL nor a key for the hosted service."""
    if base_url or os.environ.get("TINKER_BASE_URL") or tinkex.auth.tinker_has_credentials():
        return
    raise ConfigError(
        "no server to talk to",
        hint="Give --base-url or set TINKER_BASE_URL (`tinkex serve` starts a server here), or set "
        f"TINKER_API_KEY (or run `tinkex auth login`) for the hosted service{otherwise}.",
    )


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
        service = tinkex.ServiceClient.local(model=local_model, data_dir=data_dir)
    else:
        check_that_a_server_is_known(base_url, ", or add --local")
        service = tinkex.ServiceClient(base_url=base_url)
    with service:
        yield service


@contextmanager
def open_rest(base_url: Optional[str]) -> Iterator[tinkex.RestClient]:
    """Open a client for lists and records, without a session; it closes with the block."""
    check_that_a_server_is_known(base_url)
    with tinkex.RestClient(base_url=base_url) as rest:
        yield rest


@contextmanager
def open_admin(base_url: Optional[str]) -> Iterator[tinkex.AdminClient]:
    """Likewise, for audit and billing."""
    check_that_a_server_is_known(base_url)
    with tinkex.AdminClient(base_url=base_url) as admin:
        yield admin
