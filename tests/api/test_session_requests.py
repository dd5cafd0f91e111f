"""The requests that a session sends by itself, from start to end."""

from __future__ import annotations

import base64
import json
from typing import Any, Iterator, List

import pytest
from api.endpoint import KEY
from support.scripted_server import Answer, Received, ScriptedServer
from support.tinker_routes import API, MODEL, TinkerRoutes

import tinkex
from tinkex import types
from tinkex._version import PROTOCOL_VERSION
from tinkex.retry import RetryConfig

FINISH = f"POST {API}sessions/session-1/finish"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        TinkerRoutes(scripted)
        yield scripted


def opened(server: ScriptedServer, **settings: Any) -> tinkex.ServiceClient:
    return tinkex.ServiceClient(base_url=server.url, **{"api_key": KEY, **settings})


def bodies(server: ScriptedServer, route: str) -> List[Any]:
    return [request.json() for request in server.requests(f"POST {API}{route}")]


def test_create_session(server: ScriptedServer) -> None:
    with opened(server):
        pass
    assert bodies(server, "create_session") == [
        {
            "tags": [],
            "user_metadata": {},
            "sdk_version": PROTOCOL_VERSION,
            "type": "create_session",
        }
    ]


def test_create_session_with_everything(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TAGS", "a,b")
    with opened(server, user_metadata={"k": "v"}, project_id="p", display_name="d"):
        pass
    (body,) = bodies(server, "create_session")
    assert sorted(body.pop("tags")) == ["a", "b"]
    assert body == {
        "user_metadata": {"k": "v"},
        "sdk_version": PROTOCOL_VERSION,
        "project_id": "p",
        "display_name": "d",
        "type": "create_session",
    }


@pytest.mark.parametrize("flags", [Answer(404), Answer(405), Answer(501), Answer(body={})])
def test_flags_are_requested_with_the_version_and_may_be_missing(
    server: ScriptedServer, flags: Answer
) -> None:
    server.on(f"POST {API}client/config", flags)
    with opened(server, wire="protobuf") as service:
        trainer = service.create_lora_training_client("b", rank=8)
        datum = types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})
        trainer.forward_backward([datum], "cross_entropy").result()
        trainer.forward_backward([datum], "cross_entropy").result()
    asked = bodies(server, "client/config")
    assert asked == [{"sdk_version": PROTOCOL_VERSION}]  # once, and remembered


def test_heartbeats(server: ScriptedServer) -> None:
    with opened(server, heartbeat_interval_s=0.05):
        server.wait_for(f"POST {API}session_heartbeat", 2)
    expected = {"session_id": "session-1", "type": "session_heartbeat"}
    assert all(body == expected for body in bodies(server, "session_heartbeat"))


@pytest.mark.parametrize("status", ["success", "errored", "interrupted"])
def test_finish(server: ScriptedServer, status: str) -> None:
    service = opened(server)
    service.close(status, "why")
    service.close("success")  # the first reason stands
    (request,) = server.requests(FINISH)
    assert request.json() == {"reason": {"type": status}, "detail": "why"}


@pytest.mark.parametrize(
    "answer", [Answer(404), Answer(405), Answer(500, b"oops"), Answer(reset=True)]
)
def test_a_session_ends_quietly_on_a_server_without_the_finish_route(
    server: ScriptedServer, answer: Answer
) -> None:
    server.on(FINISH, answer)
    opened(server).close().result(0)


def test_the_messages_of_the_server_are_logged(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    messages = {"info_message": "one", "warning_message": "two", "error_message": "three"}
    server.on(f"POST {API}create_session", Answer(body={"session_id": "session-1", **messages}))
    caplog.set_level("INFO")
    with opened(server):
        pass
    said = {(one.levelname, word) for one in caplog.records
            for word in ("one", "two", "three") if word in one.getMessage().split()}  # fmt: skip
    assert {("INFO", "one"), ("WARNING", "two"), ("ERROR", "three")} <= said


def test_a_run_is_created_and_its_info_requested(server: ScriptedServer) -> None:
    with opened(server) as service:
        info = service.create_lora_training_client("b", rank=8).get_info()
    assert info.model_id == MODEL
    assert bodies(server, "get_info") == [{"model_id": MODEL, "type": "get_info"}]
    poll = server.requests(f"POST {API}retrieve_future")[0]
    assert poll.headers["accept"] == "application/json"


def test_a_key_is_exchanged_for_a_token_if_the_server_sets_the_flag(server: ScriptedServer) -> None:
    token = "eyJhbGciOiJub25lIn0.eyJleHAiOjQxMDI0NDQ4MDAsImlhdCI6MH0.x"
    server.on(f"POST {API}client/config", Answer(body={"pjwt_auth_enabled": True}))
    server.on(f"POST {API}auth/token", Answer(body={"jwt": token}))
    with opened(server) as service:
        service.create_lora_training_client("b", rank=8)
    (exchange,) = server.requests(f"POST {API}auth/token")
    assert exchange.json() == {}
    assert exchange.headers["x-api-key"] == KEY
    (config,) = server.requests(f"POST {API}client/config")
    assert config.headers["x-api-key"] == KEY
    (created,) = server.requests(f"POST {API}create_model")
    assert created.headers["x-api-key"] == token


def test_a_second_client_of_a_sampler_joins_if_the_server_sets_the_flag(
    server: ScriptedServer,
) -> None:
    server.on(f"POST {API}client/config", Answer(body={"sample_join_sampling_session": True}))
    server.on(f"POST {API}join_sampling_session", Answer(body={"client_counter": 3}))
    with opened(server) as service:
        handle = service.create_sampling_client(base_model="b").get_sampler_handle()
        clone = tinkex.SamplingClient.from_sampler_handle(handle, api_key=KEY)
        try:
            clone.sample(types.ModelInput.from_ints([1])).result()
        finally:
            clone.close()
    assert bodies(server, "join_sampling_session") == [
        {"sampling_session_id": "session-1:sample:0", "type": "join_sampling_session"}
    ]
    assert bodies(server, "asample")[-1]["seq_id"] == 3 * 10**9


def test_a_lost_sample_is_drawn_again_under_a_new_number(server: ScriptedServer) -> None:
    samples = {"sequences": [{"stop_reason": "length", "tokens": [5]}]}
    server.on(f"POST {API}retrieve_future", Answer(410), Answer(body=samples))
    quick = RetryConfig(retry_delay_base=0.001)
    with opened(server) as service:
        sampler = service.create_sampling_client(base_model="b", retry_config=quick)
        answer = sampler.sample(types.ModelInput.from_ints([1])).result()
    assert answer.sequences[0].tokens == [5]
    assert [body["seq_id"] for body in bodies(server, "asample")] == [0, 1]


def test_a_sample_is_cancelled_on_the_server_if_it_sets_the_flag(server: ScriptedServer) -> None:
    pending = Answer(408, {"detail": "running"}, {"retry-after-ms": "1"})
    server.on(f"POST {API}retrieve_future", pending)
    server.on(f"POST {API}client/dynamic_config", Answer(body={"sample_cancel_enabled": True}))
    server.on(f"POST {API}cancel_future", Answer(body={}))
    with opened(server) as service:
        sampler = service.create_sampling_client(base_model="b")
        future = sampler.sample(types.ModelInput.from_ints([1]))
        server.wait_for(f"POST {API}retrieve_future")
        assert future.cancel()
        (cancelled,) = server.wait_for(f"POST {API}cancel_future")
    assert cancelled.json() == {"request_id": "asample-0"}
    assert bodies(server, "client/dynamic_config") == [{"sdk_version": PROTOCOL_VERSION}]


def test_telemetry_is_sent_only_if_requested(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_TELEMETRY", raising=False)
    server.on(f"POST {API}telemetry", Answer(body={"status": "accepted"}))
    with opened(server):
        pass
    assert server.requests(f"POST {API}telemetry") == []
    with opened(server, telemetry=True):
        pass
    reports = bodies(server, "telemetry")
    assert reports
    assert all(
        set(one) == {"events", "platform", "sdk_version", "session_id", "process_uuid"}
        for one in reports
    )
    assert {one["session_id"] for one in reports} == {"session-1"}
    events = [event for one in reports for event in one["events"]]
    common = {"event", "event_id", "event_session_index", "severity", "timestamp"}
    assert all(common <= set(event) for event in events)
    assert [event["event_session_index"] for event in events] == list(range(len(events)))
    assert events[0]["event"] == "SESSION_START"
    assert KEY not in json.dumps(reports)


def test_optional_routes_are_not_requested_unasked(server: ScriptedServer) -> None:
    """The complete loop against an older server requests only routes that the server has."""
    with opened(server, wire="json") as service:
        trainer = service.create_lora_training_client("b", rank=8)
        datum = types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2]})
        trainer.train_step([datum], "cross_entropy", types.AdamParams())
        trainer.save_state("a").result()
        sampler = trainer.save_weights_and_get_sampling_client()
        sampler.sample(types.ModelInput.from_ints([1])).result()
    asked = {request.path for request in server.requests()} - {f"{API}session_heartbeat"}
    old = {"create_session", "create_model", "get_info", "forward_backward", "optim_step"}
    old |= {"save_weights", "save_weights_for_sampler", "asample", "retrieve_future"}
    reporting = {"client/config", "client/dynamic_config", "sessions/session-1/finish"}
    assert {f"{API}{route}" for route in old} <= asked
    assert asked <= {f"{API}{route}" for route in old | reporting}


def test_every_request_of_a_session_is_authenticated(server: ScriptedServer) -> None:
    with opened(server, default_headers_overrides={"X-Team": "t"}) as service:
        trainer = service.create_lora_training_client("b", rank=8)
        trainer.optim_step(types.AdamParams()).result()
        service.create_sampling_client(base_model="b").sample(
            types.ModelInput.from_ints([1])
        ).result()
    requests: List[Received] = server.requests()
    assert {request.headers.get("x-api-key") for request in requests} == {KEY}
    assert {request.headers.get("x-team") for request in requests} == {"t"}
    assert all(request.headers["user-agent"].startswith("tinkex/") for request in requests)
    keys = [request.headers.get("x-idempotency-key") for request in requests]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_whoami_reads_the_token_and_sends_nothing(server: ScriptedServer) -> None:
    claims = {"sub": "urn:me", "org_id": "o", "email": "e", "iss": "passport-x", "exp": 4102444800}
    body = base64.urlsafe_b64encode(json.dumps({**claims, "iat": 0}).encode()).decode().rstrip("=")
    server.on(f"POST {API}client/config", Answer(body={"pjwt_auth_enabled": True}))
    server.on(f"POST {API}auth/token", Answer(body={"jwt": f"eyJhbGciOiJub25lIn0.{body}.x"}))
    with tinkex.RestClient(base_url=server.url, api_key=KEY) as rest:
        found = rest.whoami().result()
    assert (found.user_urn, found.org_urn, found.email) == ("urn:me", "tml:organization:o", "e")
    asked = [request.path for request in server.requests()]
    assert asked == [f"{API}client/config", f"{API}auth/token"]


def test_one_poll_serves_all_samples_if_the_server_sets_the_flag(server: ScriptedServer) -> None:
    finished = [{"state": "finished", "request_id": f"asample-{n}"} for n in range(4)]
    done = Answer(body={"completions": finished, "cursor": 7})
    server.on(f"POST {API}client/config", Answer(body={"sample_use_retrieve_futures": True}))
    server.on(f"POST {API}retrieve_futures", done)
    with opened(server) as service:
        sampler = service.create_sampling_client(base_model="b")
        futures = [sampler.sample(types.ModelInput.from_ints([1])) for _ in range(4)]
        assert [future.result().sequences[0].tokens for future in futures] == [[5]] * 4
    first = bodies(server, "retrieve_futures")[0]
    assert first["target"] == {
        "type": "sampling_session",
        "sampling_session_id": "session-1:sample:0",
        "cloned_sampler_id": 0,
    }
    assert first["prev_cursor"] == 0
    assert first["retrieved_request_ids"] == []
    assert len(bodies(server, "retrieve_future")) == 4
