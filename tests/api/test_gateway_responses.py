"""Every endpoint that reads its answer: a persistent web page or empty body is a typed error."""

from __future__ import annotations

from typing import Iterator

import pytest
from api.endpoint import Clients, Endpoint
from api.test_endpoints import ANSWERED, call, no_thread_is_left as no_thread_is_left
from support.scripted_server import ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex.errors import APIConnectionError, ResponseDecodeError

pytestmark = pytest.mark.usefixtures("short_backoff")


@pytest.fixture(scope="module")
def impatient(no_thread_is_left: None) -> Iterator[Clients]:  # the check comes last
    """Clients whose outages end soon."""
    with ScriptedServer() as server:
        TinkerRoutes(server)
        made = Clients(server, max_outage_s=0.05)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("body", [b"", b"<html></html>"])
@pytest.mark.parametrize("endpoint", ANSWERED, ids=str)
def test_the_error_names_status_and_content_type(
    impatient: Clients, endpoint: Endpoint, body: bytes
) -> None:
    expected = (ResponseDecodeError, APIConnectionError)
    with pytest.raises(expected, match="status 200, application/json"):
        call(impatient, endpoint, body)
