"""``--verbose``: logs requests on stderr, without secrets."""

from __future__ import annotations

import json
import logging
import re
from unittest import mock

import pytest
from support.programs import Server, environment, tinkex
from support.scripted_server import Answer, ScriptedServer
from support.session_server import CAPABILITIES, SessionServer
from support.transports import open_transport

import tinkex as library
from tinkex._transport.request import Request
from tinkex._transport.request_log import logger as request_logger
from tinkex.errors import APIConnectionError

KEY = "tml-secret-of-mine"
LINE = r"%s 127\.0\.0\.1:\d+%s %s, \d+ B sent, \d+ B received, \d+\.\d ms"


@pytest.mark.parametrize(
    "arguments",
    [["-v", "model", "list"], ["model", "list", "--verbose"]],
    ids=" ".join,
)
def test_each_request_is_shown_and_stdout_stays_clean(server: Server, arguments):
    done = tinkex(*arguments, "-f", "json", base_url=server.url)
    assert done.returncode == 0
    assert json.loads(done.stdout)["models"]
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(LINE % ("GET", "/api/v1/get_server_capabilities", 200), line)


def test_ids_are_shown(server: Server):
    done = tinkex("-v", "doctor", base_url=server.url)
    assert done.returncode == 0
    created = next(line for line in done.stderr.splitlines() if "/create_session " in line)
    session_id = created.rpartition("session_id=")[2]
    assert f"/api/v1/sessions/{session_id}/finish 200" in done.stderr


def test_a_download_is_shown_without_its_signature(server: Server, tmp_path):
    with library.ServiceClient(base_url=server.url) as service:
        trainer = service.create_lora_training_client(server.model, rank=4)
        path = trainer.save_weights_for_sampler("first").result().path
    command = ("checkpoint", "download", path, "-o", str(tmp_path), "-v")
    done = tinkex(*command, base_url=server.url)
    assert done.returncode == 0
    assert re.search(r"GET 127\.0\.0\.1:\d+/\S+ 200 \(a stream\), 0 B sent, \d", done.stderr)
    assert "?" not in done.stderr


def test_the_key_is_never_shown():
    with ScriptedServer() as server:
        answer = Answer(401, {"detail": f"no such key: {KEY}", "request_id": KEY})
        server.on(CAPABILITIES, answer)
        with_key = {**environment(server.url), "TINKER_API_KEY": KEY}
        with mock.patch("support.programs.environment", return_value=with_key):
            done = tinkex("-v", "model", "list")
    assert done.returncode == 1
    assert re.search(LINE % ("GET", "/api/v1/get_server_capabilities", 401), done.stderr)
    assert "request_id=<api key>" in done.stderr
    assert KEY not in done.stderr


def test_a_retry_is_shown(short_backoff):
    with SessionServer() as server:
        server.on(CAPABILITIES, Answer(503), Answer(body={"supported_models": []}))
        done = tinkex("-v", "model", "list", base_url=server.url)
    assert done.returncode == 0
    first, reason, second = done.stderr.splitlines()
    assert " 503, " in first
    assert "attempt 1, next in" in reason
    assert " 200, " in second


def test_neither_queries_nor_bodies_are_logged(caplog: pytest.LogCaptureFixture):
    with ScriptedServer() as server, open_transport(server) as transport:
        server.on("POST /api/v1/x", Answer(body={"request_id": "r-1", "text": "private"}))
        body = b'{"session_id": "s-1", "seq_id": 3, "prompt": "private", "other_id": {"a": 1}}'
        with caplog.at_level(logging.DEBUG, request_logger.name):
            transport.send_once(Request("POST", "/api/v1/x?signature=private", body))
    (record,) = caplog.records
    line = record.getMessage()
    assert "private" not in line
    assert "/api/v1/x 200, 77 B sent" in line
    assert line.endswith("ms, session_id=s-1, seq_id=3, request_id=r-1")


def test_a_request_without_a_response_is_logged(caplog: pytest.LogCaptureFixture):
    with ScriptedServer() as server, open_transport(server) as transport:
        server.on("GET /api/v1/x", Answer(drop=True))
        with (
            caplog.at_level(logging.DEBUG, request_logger.name),
            pytest.raises(APIConnectionError),
        ):
            transport.send_once(Request("GET", "/api/v1/x"))
    assert "/api/v1/x no response (ConnectionError), 0 B sent" in caplog.records[0].getMessage()


def test_nothing_is_logged_unless_it_was_requested(caplog: pytest.LogCaptureFixture):
    with ScriptedServer() as server, open_transport(server) as transport:
        server.on("GET /api/v1/x", Answer())
        transport.send_once(Request("GET", "/api/v1/x"))
    assert caplog.records == []
