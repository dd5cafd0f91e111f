"""Sampler handles from a queue: what a forged handle can and cannot make this process do."""

from __future__ import annotations

import base64
import json
import logging
import pickle
from pathlib import Path
from typing import Any, Dict, Optional, Set

import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import InvalidInputError, SamplingClient, types
from tinkex._sampling.sampler_handle import config_of_handle
from tinkex.clients import sampling as sampling_client
from tinkex.config import DEFAULT_BASE_URL
from tinkex.errors import ConfigError

PROMPT = types.ModelInput.from_ints([1, 2, 3])
OWN_KEY = "tml-own-0123456789"


def handle_of(url: str, *, facts: Optional[Dict[str, Any]] = None, **settings: Any) -> str:
    state = {"session_id": "s", "sampling_session_id": "s:sample:0", **(facts or {})}
    state["settings"] = {"base_url": url, **settings}
    return base64.urlsafe_b64encode(json.dumps(state).encode()).decode()


def keys_sent(server: ScriptedServer) -> Set[str]:
    return {request.headers.get("x-api-key", "") for request in server.requests()} - {""}


def sample(client: SamplingClient) -> None:
    try:
        assert client.sample(PROMPT).result(PATIENCE_S).sequences
    finally:
        client._runtime.close()


@pytest.fixture
def own_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    monkeypatch.setenv("TINKER_API_KEY", OWN_KEY)
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_ID", "access-id")
    monkeypatch.setenv("CLOUDFLARE_ACCESS_CLIENT_SECRET", "access-secret")


def test_a_command_in_a_handle_is_not_run(
    server: ScriptedServer,
    routes: TinkerRoutes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    flags = {"pjwt_auth_enabled": False, "credential_default_source": "credential_cmd"}
    routes.serve("client/config", Answer(body=flags))
    mark = tmp_path / "mark"
    forged = handle_of(server.url, credential_cmd=f"echo key; touch '{mark}'")
    sample(SamplingClient.from_sampler_handle(forged))
    assert not mark.exists()
    assert keys_sent(server) == set()


def test_only_the_settings_of_a_handle_are_read() -> None:
    forged = handle_of(
        "http://127.0.0.1:1",
        credential_cmd="true",
        proxy="http://attacker.example:8080",
        ca_bundle="/attacker.pem",
        extra_headers={"X-Evil": "1"},
        access_headers={"X-Evil": "1"},
        telemetry=True,
        on_billing="wait",
        unheard_of=1,
        wire="json",
        max_outage_s=7.0,
    )
    client = SamplingClient.from_sampler_handle(forged)
    config = client._runtime.config
    client._runtime.close()
    assert (config.base_url, config.wire, config.max_outage_s) == ("http://127.0.0.1:1", "json", 7)
    assert config.credential_cmd is config.proxy is None
    assert config.extra_headers == config.access_headers == {}
    assert (config.telemetry, config.on_billing) == (False, "raise")


@pytest.mark.usefixtures("own_credentials")
def test_the_receivers_credentials_are_not_sent_to_the_server_that_a_handle_names(
    server: ScriptedServer, routes: TinkerRoutes, caplog: pytest.LogCaptureFixture
) -> None:
    client = SamplingClient.from_sampler_handle(handle_of(server.url))
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert server.url in record.getMessage()
    assert "TINKER_BASE_URL" in record.getMessage()
    assert OWN_KEY not in record.getMessage()
    sample(client)
    assert keys_sent(server) == set()
    assert not any("cf-access-client-secret" in r.headers for r in server.requests())


@pytest.mark.usefixtures("own_credentials")
def test_the_receivers_credential_command_is_not_run_for_the_server_that_a_handle_names(
    server: ScriptedServer,
    routes: TinkerRoutes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"echo {OWN_KEY}; touch '{mark}'")
    flags = {"pjwt_auth_enabled": False, "credential_default_source": "credential_cmd"}
    routes.serve("client/config", Answer(body=flags))
    sample(SamplingClient.from_sampler_handle(handle_of(server.url)))
    assert not mark.exists()
    assert keys_sent(server) == set()


@pytest.mark.usefixtures("own_credentials")
def test_the_receivers_key_is_sent_to_its_own_server(
    server: ScriptedServer,
    routes: TinkerRoutes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", f"{server.url}/")
    sample(SamplingClient.from_sampler_handle(handle_of(server.url.replace("http", "HTTP"))))
    assert keys_sent(server) == {OWN_KEY}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.usefixtures("own_credentials")
def test_the_key_in_a_handle_is_used_for_its_server(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    sample(SamplingClient.from_sampler_handle(handle_of(server.url, api_key="tml-its-own")))
    assert keys_sent(server) == {"tml-its-own"}


@pytest.mark.usefixtures("own_credentials")
def test_the_key_that_the_receiver_passes_is_used_for_any_server(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    sample(SamplingClient.from_sampler_handle(handle_of(server.url), api_key=OWN_KEY))
    assert keys_sent(server) == {OWN_KEY}


@pytest.mark.usefixtures("own_credentials")
def test_a_pickle_is_trusted_with_the_receivers_key(
    server: ScriptedServer, routes: TinkerRoutes
) -> None:
    client = SamplingClient._from_handle(handle_of(server.url), trusted=True)
    pickled = pickle.dumps(client)
    assert OWN_KEY.encode() not in pickled
    client._runtime.close()
    sample(pickle.loads(pickled))
    assert keys_sent(server) == {OWN_KEY}
    assert sampling_client._unpickle.__name__.encode() in pickled


@pytest.mark.usefixtures("own_credentials")
@pytest.mark.parametrize(
    "url",
    [
        "http://tinker.thinkingmachines.dev/services/tinker-prod",
        "https://tinker.thinkingmachines.dev:8443/services/tinker-prod",
        "https://tinker.thinkingmachines.dev/services/other",
        "https://tinker.thinkingmachines.dev.evil.example/services/tinker-prod",
    ],
)
def test_a_server_that_only_resembles_the_receivers_gets_no_key(url: str) -> None:
    config = config_of_handle({"base_url": url})
    assert config.api_key is None
    assert config.access_headers == {}


@pytest.mark.usefixtures("own_credentials")
@pytest.mark.parametrize(
    "url",
    [
        DEFAULT_BASE_URL,
        "https://TINKER.thinkingmachines.dev:443/services/tinker-prod/",
        "https://evil.example\\@tinker.thinkingmachines.dev/services/tinker-prod",
        "https://tinker.thinking\nmachines.dev/services/tinker-prod",
    ],
)
def test_the_receivers_key_goes_to_its_own_url_however_the_handle_spells_it(url: str) -> None:
    config = config_of_handle({"base_url": url})
    assert (config.base_url, config.api_key) == (DEFAULT_BASE_URL, OWN_KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"session_id": 7},
        {"session_id": ""},
        {"sampling_session_id": ["s"]},
        {"base_model": {"a": 1}},
        {"model_path": 1.5},
        {"settings": None},
        {"settings": {}},
        {"settings": {"base_url": 1}},
        {"settings": {"base_url": "http://127.0.0.1:1", "api_key": 5}},
    ],
)
def test_a_handle_with_values_of_wrong_types_is_refused(change: Dict[str, Any]) -> None:
    state = json.loads(base64.urlsafe_b64decode(handle_of("http://127.0.0.1:1")))
    forged = base64.urlsafe_b64encode(json.dumps({**state, **change}).encode()).decode()
    with pytest.raises(InvalidInputError, match="not a sampler handle"):
        SamplingClient.from_sampler_handle(forged)


@pytest.mark.parametrize(
    "settings",
    [{"wire": "x"}, {"max_outage_s": "long"}, {"max_outage_s": -1}, {"max_concurrent_samples": 0}],
)
def test_a_setting_out_of_range_is_named(settings: Dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SamplingClient.from_sampler_handle(handle_of("http://127.0.0.1:1", **settings))
