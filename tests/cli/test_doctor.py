"""``tinkex doctor``, with each of the faults that it should find."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import Any, Dict, Iterator
from unittest import mock

import pytest
from support.programs import Done, Server, environment, interrupt, started, tinkex
from support.scripted_server import CERTIFICATE, Answer, ScriptedServer
from support.session_server import BEAT, CAPABILITIES, CREATE, SessionServer

HEALTH = "GET /api/v1/healthz"
MODELS = {"supported_models": [{"model_name": "llama"}]}
PAGE = b"<!doctype html><html>Please sign in</html>"
#: The checks that follow those of the network.
OF_THE_SERVER = ("HTTP", "access", "session", "heartbeat", "round trip", "encoding")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """No proxy, no CA bundle, no stored key, and no server on this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.endswith(("_CA_BUNDLE", "SSL_CERT_FILE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tinkex.cli.serve.DEFAULT_PORT", 9)


@pytest.fixture
def scripted() -> Iterator[SessionServer]:
    """A healthy server."""
    with SessionServer() as server:
        server.on(HEALTH, Answer())
        server.on(CAPABILITIES, Answer(body=MODELS))
        yield server


def checks(done: Done) -> Dict[str, Any]:
    """Return the outcome of each check, by its name, and check the exit code."""
    found = json.loads(done.stdout)
    failed = [check for check in found["checks"] if check["status"] == "failed"]
    assert found["ok"] == (not failed)
    assert done.returncode == (1 if failed else 0)
    for check in found["checks"]:
        assert (check["fault"] is not None) == (check["status"] == "failed")
        assert (check["advice"] is not None) == (check["status"] == "failed")
    return {check["name"]: check for check in found["checks"]}


def examine(base_url: str) -> Dict[str, Any]:
    return checks(tinkex("doctor", "-f", "json", base_url=base_url))


def only_failure(found: Dict[str, Any]) -> Any:
    (failure,) = [check for check in found.values() if check["status"] == "failed"]
    return failure


def assert_skipped_after(found: Dict[str, Any], name: str) -> None:
    names = list(found)
    later = names[names.index(name) + 1 :]
    assert later
    assert all(found[other]["status"] == "skipped" for other in later)


def test_a_healthy_server_gets_a_line_for_each_check(server: Server):
    done = tinkex("doctor", "--base-url", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line[9:20].strip() for line in lines] == [
        *("settings", "key", "proxy", "CA bundle", "DNS", "TCP", "TLS"),
        *OF_THE_SERVER,
    ]
    assert {line.split()[0] for line in lines} == {"ok", "skipped"}
    assert lines[0] == f"ok       settings    base URL {server.url} (from --base-url)"
    assert server.model in done.stdout
    assert "batches: protobuf, or JSON if the first one is refused" in lines[-1]
    (end,) = server.ends()
    assert "404" in end or "410" in end, "the session of the check was ended"


def test_the_report_names_the_variable_that_gives_the_server(server: Server):
    found = examine(server.url)
    assert found["settings"]["detail"] == f"base URL {server.url} (from $TINKER_BASE_URL)"
    assert all(found[name]["status"] == "ok" for name in OF_THE_SERVER)
    assert found["round trip"]["ms"] > 0


def test_a_port_without_a_listener_is_a_fault_of_the_server(scripted: SessionServer):
    url = scripted.url
    scripted.close()
    found = examine(url)
    assert found["TCP"]["status"] == "failed"
    assert "connection refused" in found["TCP"]["detail"]
    assert found["TCP"]["fault"].startswith("the server")
    assert "TINKER_BASE_URL" in found["TCP"]["advice"]
    assert_skipped_after(found, "TCP")


def test_a_host_name_without_an_address_is_found_by_the_dns_check(monkeypatch):
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=error))
    found = examine("http://tinker.exmaple")
    assert "tinker.exmaple has no address" in found["DNS"]["detail"]
    assert found["DNS"]["fault"] == "the base URL, or this machine's network"
    assert_skipped_after(found, "DNS")


def test_a_certificate_of_an_unknown_ca_is_a_fault_of_the_bundle(monkeypatch):
    with ScriptedServer(tls=True) as server:
        found = examine(server.url)
        assert found["CA bundle"]["status"] == "ok"
        assert "not trusted" in found["TLS"]["detail"]
        assert "CA bundle" in found["TLS"]["fault"]
        assert "SSL_CERT_FILE" in found["TLS"]["advice"]
        assert_skipped_after(found, "TLS")
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        found = examine(server.url)
        assert found["CA bundle"]["detail"] == f"{CERTIFICATE} (from $SSL_CERT_FILE)"
        assert found["TLS"]["status"] == "ok"
        assert found["TLS"]["detail"].startswith("TLSv1.")


def test_a_ca_bundle_without_certificates_is_a_fault_of_the_settings(monkeypatch, tmp_path):
    bundle = tmp_path / "bundle.pem"
    bundle.write_text("nothing")
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    found = examine("https://127.0.0.1:9")
    assert str(bundle) in found["CA bundle"]["detail"]
    assert found["CA bundle"]["fault"] == "your settings"
    assert "$SSL_CERT_FILE" in found["CA bundle"]["advice"]
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    assert "does not exist" in examine("https://127.0.0.1:9")["settings"]["detail"]


def test_https_to_an_http_server_is_a_fault_of_the_base_url(scripted: SessionServer):
    found = examine(scripted.url.replace("http:", "https:"))
    assert "handshake failed" in found["TLS"]["detail"]
    assert found["TLS"]["fault"].startswith("the base URL")
    assert scripted.url in found["TLS"]["advice"]


@pytest.mark.parametrize("url", ["localhost:8642", "http://u:secret@host", "nonsense"])
def test_an_invalid_base_url_is_a_fault_of_the_settings(url):
    found = examine(url)
    assert found["settings"]["fault"] == "your settings"
    assert "secret" not in str(found)
    assert_skipped_after(found, "settings")


@pytest.mark.parametrize("status", [200, 403, 503])
def test_another_programs_page_is_not_taken_for_the_server(scripted: SessionServer, status: int):
    scripted.on(HEALTH, Answer(status, PAGE, content_type="text/html"))
    found = examine(scripted.url)
    assert only_failure(found)["name"] == "HTTP"
    assert "other web server" in found["HTTP"]["fault"]
    assert_skipped_after(found, "HTTP")


def test_a_web_server_without_any_route_is_not_a_tinker_server():
    with ScriptedServer() as server:
        found = examine(server.url)
    assert only_failure(found)["name"] == "session"
    assert found["session"]["fault"] == "the base URL"
    assert "TINKER_BASE_URL" in found["session"]["advice"]


def test_a_wrong_path_in_the_base_url_is_reported_in_one_sentence(server: Server):
    done = tinkex("doctor", base_url=f"{server.url}/wrong")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    assert "404: no route POST /wrong/api/v1/create_session.  Fault: the base URL." in line
    assert ".." not in line


def test_a_wrong_key_is_reported_and_never_shown(scripted: SessionServer, monkeypatch):
    key = "tml-secret-of-mine"
    scripted.on(CAPABILITIES, Answer(401, {"detail": f"unknown key {key}"}))
    with_key = {**environment(scripted.url), "TINKER_API_KEY": key}
    with mock.patch("support.programs.environment", return_value=with_key):
        done = tinkex("doctor", base_url=scripted.url)
        found = checks(tinkex("doctor", "-f", "json", base_url=scripted.url))
    assert found["key"]["detail"] == "from the environment ($TINKER_API_KEY)"
    assert only_failure(found)["name"] == "access"
    assert found["access"]["fault"] == "the key"
    assert "TINKER_API_KEY" in found["access"]["advice"]
    assert key not in done.stdout + done.stderr + str(found)
    assert scripted.created == 0


def test_without_a_key_the_hosted_service_cannot_be_used(monkeypatch):
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=error))
    found = checks(tinkex("doctor", "-f", "json"))
    assert found["settings"]["detail"].endswith("(the default)")
    assert found["key"]["fault"] == "your settings"
    assert "tinkex auth login" in found["key"]["advice"]
    assert found["DNS"]["status"] == "failed", "the network is checked all the same"


def test_a_server_without_some_optional_routes_passes(scripted: SessionServer):
    for route in (HEALTH, CAPABILITIES):
        scripted.on(route, Answer(404, {"detail": "Not Found"}))
    scripted.finish_answer = Answer(404, {"detail": "Not Found"})
    found = examine(scripted.url)
    assert found["HTTP"]["status"] == "skipped"
    assert found["access"]["status"] == "skipped"
    for name in ("session", "heartbeat", "round trip", "encoding"):
        assert found[name]["status"] == "ok"


def test_a_server_without_heartbeats_is_at_fault(scripted: SessionServer):
    scripted.on(BEAT, Answer(404, {"detail": "Not Found"}))
    failure = only_failure(examine(scripted.url))
    assert (failure["name"], failure["fault"]) == ("heartbeat", "the server")
    scripted.assert_ended_once()


def test_a_server_that_creates_no_session_is_at_fault(scripted: SessionServer):
    scripted.on(CREATE, Answer(400, {"detail": "no room"}))
    found = examine(scripted.url)
    assert only_failure(found)["name"] == "session"
    assert "no room" in found["session"]["detail"]
    assert found["heartbeat"]["status"] == "skipped"


def test_a_proxy_is_named_with_the_variable_and_without_its_password(monkeypatch):
    with ScriptedServer() as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
        proxy.on("GET http://tinker.example/api/v1/healthz", Answer(407, PAGE))
        found = examine("http://tinker.example")
        assert found["proxy"]["detail"] == f"http://127.0.0.1:{proxy.port} (from $http_proxy)"
        assert found["HTTP"]["status"] == "failed"
        assert "proxy" in found["HTTP"]["fault"]
        assert "secret" not in str(found)
    found = examine("http://tinker.example")
    assert found["TCP"]["fault"].startswith("the proxy")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost,tinker.example")
    monkeypatch.setattr(socket, "getaddrinfo", mock.Mock(side_effect=socket.gaierror()))
    assert examine("http://tinker.example")["proxy"]["status"] == "skipped"


def test_an_interrupt_ends_the_session_that_was_opened(scripted: SessionServer):
    hold = threading.Event()
    scripted.on(BEAT, Answer(hold=hold))
    with started(["-m", "tinkex", "doctor"], scripted.url) as process:
        scripted.wait_for(BEAT)
        done = interrupt(process)
    hold.set()
    assert done.returncode == 130
    assert "Interrupted." in done.stderr
    assert "Traceback" not in done.stderr
    assert scripted.wait_for_finish() == ["success"]
