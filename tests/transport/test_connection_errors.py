"""The error when no response arrives, and its length."""

from __future__ import annotations

import socket
import traceback

import pytest
import requests
from support.scripted_server import Answer, ScriptedServer
from support.transports import open_transport

from tinkex import ServiceClient
from tinkex._transport.request import Request
from tinkex._transport.request_errors import connection_error, forget_frames
from tinkex.config import DEFAULT_BASE_URL, Config
from tinkex.errors import (
    APIConnectionError,
    APITimeoutError,
    InvalidInputError,
    NotFoundError,
    RequestFailedError,
)
from tinkex.retry import RetryPolicy

SUBMIT = Request("POST", "/api/v1/asample", b'{"a":1}')


def test_tls_to_a_port_that_never_completes_the_handshake(server: ScriptedServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}"
        with open_transport(server, base_url=url, connect_timeout_s=0.1) as transport:
            with pytest.raises(APITimeoutError, match="TLS handshake") as caught:
                transport.send(SUBMIT, RetryPolicy(max_elapsed_s=0.0))
    assert url.replace("https", "http") in str(caught.value)
    assert not caught.value.maybe_taken


def test_without_a_base_url_the_error_names_the_default_as_such() -> None:
    error = requests.ConnectionError("no server there")
    text = str(connection_error(Config(base_url=DEFAULT_BASE_URL), SUBMIT, error, str))
    assert f"{DEFAULT_BASE_URL} is the default" in text
    assert "TINKER_BASE_URL" in text


def test_if_the_server_lacks_the_first_route_the_error_suspects_the_url(
    server: ScriptedServer,
) -> None:
    server.on("POST /api/v1/api/v1/create_session", Answer(404))
    with pytest.raises(NotFoundError, match=r"Is base_url \S+/api/v1 right"):
        ServiceClient(base_url=f"{server.url}/api/v1")


def test_an_unreachable_server_is_reported_without_library_internals(
    server: ScriptedServer,
) -> None:
    server.close()
    with pytest.raises(APIConnectionError) as caught:
        ServiceClient(base_url=server.url, startup_timeout_s=0.1)
    text = "".join(traceback.format_exception(None, caught.value, caught.value.__traceback__))
    assert "Connection refused" in text
    assert "urllib3/" not in text
    assert "requests/" not in text


def test_foreign_causes_keep_their_traceback() -> None:
    def raise_from(cause: Exception, error: Exception) -> Exception:
        try:
            try:
                raise cause
            except type(cause) as caught:
                raise error from caught
        except type(error) as raised:
            return raised

    users = FileNotFoundError("in the loss of a user")
    forget_frames(raise_from(users, InvalidInputError("the custom loss raised")))
    assert users.__traceback__ is not None
    bug = KeyError("a bug")
    forget_frames(raise_from(bug, RequestFailedError("failed")))
    assert bug.__traceback__ is not None
    ours = requests.ConnectionError("refused")
    error = raise_from(ours, APIConnectionError("cannot reach"))
    forget_frames(error)
    assert ours.__traceback__ is None
    assert error.__traceback__ is None
    assert error.__cause__ is ours


def test_causes_may_form_a_cycle() -> None:
    first, second = APIConnectionError("one"), APIConnectionError("two")
    first.__cause__, second.__cause__ = second, first
    forget_frames(first)
    assert first.__cause__ is second


@pytest.mark.parametrize("of_a_thread", [False, True])
def test_a_request_that_cannot_be_sent_at_all_is_not_an_outage(
    server: ScriptedServer, of_a_thread: bool
) -> None:
    impossible = Request("POST", "/api/v1/asample", b"{}", headers={"X-Name": "two\nlines"})
    with open_transport(server) as transport:
        channel = transport.open_connection() if of_a_thread else None
        with pytest.raises(APIConnectionError, match="cannot be sent") as caught:
            transport.send(impossible, RetryPolicy(max_elapsed_s=60.0), channel=channel)
    assert not caught.value.retryable
    assert not caught.value.maybe_taken
