"""One endpoint, one function: method, path, body, and the type of the answer."""

from __future__ import annotations

import json
import platform
import tracemalloc
from datetime import datetime, timezone
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import pytest
import responses

from tinkex import types
from tinkex._api import futures, rest, sampling, sessions, training
from tinkex._api._call import encode
from tinkex._transport.transport import Transport
from tinkex._version import PROTOCOL_VERSION
from tinkex.config import Config
from tinkex.errors import InvalidInputError, NotFoundError, ResponseDecodeError
from tinkex.retry import RetryPolicy
from tinkex.types.optimizer import optim_params_to_wire
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

BASE = "http://tinker.example/prefix"
# A request to the wrong place must fail at once, not retry for minutes.
CONFIG = Config.resolve(
    environ={}, base_url=BASE, tags=["t"], user_metadata={"k": "v"}, max_outage_s=0.01
)
LORA = types.LoraConfig(rank=8, seed=3)
LORA_JSON = {
    "rank": 8,
    "seed": 3,
    "train_unembed": True,
    "train_mlp": True,
    "train_attn": True,
}
FUTURE_JSON = {"request_id": "r-1", "model_id": "m"}
FUTURE = types.UntypedFuture("r-1", "m")
ADAM_JSON = {
    "learning_rate": 0.01,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
}
ADAM = optim_params_to_wire(types.AdamParams(learning_rate=0.01))
RUN_JSON = {
    "training_run_id": "s:train:0",
    "base_model": "b",
    "model_owner": "me",
    "is_lora": True,
    "last_request_time": "2026-01-02T03:04:05Z",
}
RUN = types.TrainingRun(
    "s:train:0", "b", "me", True, datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
)
CHECKPOINT_JSON = {
    "checkpoint_id": "weights/a",
    "checkpoint_type": "training",
    "time": "2026-01-02T03:04:05Z",
    "tinker_path": "tinker://s:train:0/weights/a",
}
CHECKPOINT = types.Checkpoint(
    "weights/a",
    "training",
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
    "tinker://s:train:0/weights/a",
)

Call = Callable[[Transport], Any]
Case = Tuple[str, Call, str, str, Optional[Dict[str, Any]], Any, Any]

CASES: Tuple[Case, ...] = (
    (
        "create_session",
        lambda t: sessions.create_session(t, CONFIG),
        "POST",
        "create_session",
        {
            "tags": ["t"],
            "user_metadata": {"k": "v"},
            "sdk_version": PROTOCOL_VERSION,
            "type": "create_session",
        },
        {"session_id": "s", "info_message": "hello"},
        types.CreateSessionResponse("s", info_message="hello"),
    ),
    (
        "get_server_capabilities",
        sessions.get_server_capabilities,
        "GET",
        "get_server_capabilities",
        None,
        {"supported_models": [{"model_name": "m", "new_field": 1}, {"model_id": "x"}]},
        types.GetServerCapabilitiesResponse([types.SupportedModel("m"), types.SupportedModel("x")]),
    ),
    ("healthz", sessions.healthz, "GET", "healthz", None, {"status": "ok"}, None),
    (
        "create_model",
        lambda t: training.submit(
            t,
            "create_model",
            session_id="s",
            model_seq_id=0,
            base_model="b",
            lora_config=LORA.to_wire(),
        ),
        "POST",
        "create_model",
        {
            "session_id": "s",
            "model_seq_id": 0,
            "base_model": "b",
            "lora_config": LORA_JSON,
            "type": "create_model",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "create_model with metadata",
        lambda t: training.submit(
            t,
            "create_model",
            session_id="s",
            model_seq_id=1,
            base_model="b",
            lora_config=types.LoraConfig().to_wire(),
            user_metadata={"k": "v"},
        ),
        "POST",
        "create_model",
        {
            "session_id": "s",
            "model_seq_id": 1,
            "base_model": "b",
            "lora_config": {
                "rank": 32,
                "train_unembed": True,
                "train_mlp": True,
                "train_attn": True,
            },
            "user_metadata": {"k": "v"},
            "type": "create_model",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "create_model_from_weights",
        lambda t: training.submit(
            t,
            "load_weights",
            session_id="s",
            model_seq_id=2,
            path="tinker://x/weights/a",
            optimizer=True,
        ),
        "POST",
        "load_weights",
        {
            "session_id": "s",
            "model_seq_id": 2,
            "path": "tinker://x/weights/a",
            "optimizer": True,
            "type": "load_weights",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "load_weights",
        lambda t: training.submit(
            t,
            "load_weights",
            model_id="m",
            seq_id=4,
            path="tinker://x/weights/a",
            optimizer=False,
            weights_access_token="token",
        ),
        "POST",
        "load_weights",
        {
            "model_id": "m",
            "seq_id": 4,
            "path": "tinker://x/weights/a",
            "optimizer": False,
            "weights_access_token": "token",
            "type": "load_weights",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "get_info",
        lambda t: training.get_info(t, "m"),
        "POST",
        "get_info",
        {"model_id": "m", "type": "get_info"},
        {"model_id": "m", "model_data": {"model_name": "b"}, "lora_rank": 8},
        types.GetInfoResponse("m", types.ModelData(model_name="b"), lora_rank=8),
    ),
    (
        "optim_step",
        lambda t: training.submit(t, "optim_step", model_id="m", seq_id=2, **ADAM),
        "POST",
        "optim_step",
        {"adam_params": ADAM_JSON, "model_id": "m", "seq_id": 2, "type": "optim_step"},
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "optim_step of another optimizer",
        lambda t: training.submit(
            t, "optim_step", model_id="m", seq_id=2, optimizer_params={"type": "dimuon"}
        ),
        "POST",
        "optim_step",
        {
            "optimizer_params": {"type": "dimuon"},
            "model_id": "m",
            "seq_id": 2,
            "type": "optim_step",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "save_weights_external",
        lambda t: training.submit(
            t,
            "save_weights_external",
            model_id="m",
            seq_id=3,
            path="a",
            age_encryption_recipients=["age1x"],
        ),
        "POST",
        "save_weights_external",
        {
            "model_id": "m",
            "seq_id": 3,
            "path": "a",
            "age_encryption_recipients": ["age1x"],
            "type": "save_weights_external",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "unload_model",
        lambda t: training.unload_model(t, "m"),
        "POST",
        "unload_model",
        {"model_id": "m", "type": "unload_model"},
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "create_custom_loss",
        lambda t: training.submit(
            t,
            "create_custom_loss",
            session_id="s",
            custom_loss_seq_id=0,
            name="f",
            inputs=[{"name": "logprobs", "rank": 1}],
            graph={"format": 1, "nodes": []},
        ),
        "POST",
        "create_custom_loss",
        {
            "session_id": "s",
            "custom_loss_seq_id": 0,
            "name": "f",
            "inputs": [{"name": "logprobs", "rank": 1}],
            "graph": {"format": 1, "nodes": []},
            "type": "create_custom_loss",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "save_weights",
        lambda t: training.submit(t, "save_weights", model_id="m", seq_id=3, path="a"),
        "POST",
        "save_weights",
        {"model_id": "m", "seq_id": 3, "path": "a", "type": "save_weights"},
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "save_weights in full",
        lambda t: training.submit(
            t,
            "save_weights",
            model_id="m",
            seq_id=3,
            path="a",
            ttl_seconds=60,
            overwrite=True,
            user_metadata={"k": "v"},
        ),
        "POST",
        "save_weights",
        {
            "model_id": "m",
            "seq_id": 3,
            "path": "a",
            "ttl_seconds": 60,
            "overwrite": True,
            "user_metadata": {"k": "v"},
            "type": "save_weights",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "save_weights_for_sampler by name",
        lambda t: training.submit(t, "save_weights_for_sampler", model_id="m", seq_id=3, path="a"),
        "POST",
        "save_weights_for_sampler",
        {"model_id": "m", "seq_id": 3, "path": "a", "type": "save_weights_for_sampler"},
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "save_weights_for_sampler by number",
        lambda t: training.submit(
            t, "save_weights_for_sampler", model_id="m", seq_id=3, sampling_session_seq_id=0
        ),
        "POST",
        "save_weights_for_sampler",
        {
            "model_id": "m",
            "seq_id": 3,
            "sampling_session_seq_id": 0,
            "type": "save_weights_for_sampler",
        },
        FUTURE_JSON,
        FUTURE,
    ),
    (
        "create_sampling_session of a model",
        lambda t: sampling.create_sampling_session(
            t, session_id="s", sampling_session_seq_id=0, base_model="b"
        ),
        "POST",
        "create_sampling_session",
        {
            "session_id": "s",
            "sampling_session_seq_id": 0,
            "base_model": "b",
            "type": "create_sampling_session",
        },
        {"sampling_session_id": "s:sample:0"},
        types.CreateSamplingSessionResponse("s:sample:0"),
    ),
    (
        "create_sampling_session of a checkpoint",
        lambda t: sampling.create_sampling_session(
            t, session_id="s", sampling_session_seq_id=1, model_path="tinker://x/s1"
        ),
        "POST",
        "create_sampling_session",
        {
            "session_id": "s",
            "sampling_session_seq_id": 1,
            "model_path": "tinker://x/s1",
            "type": "create_sampling_session",
        },
        {"sampling_session_id": "s:sample:1"},
        types.CreateSamplingSessionResponse("s:sample:1"),
    ),
    (
        "asample at its defaults",
        lambda t: sampling.asample(
            t,
            sampling_session_id="s:sample:0",
            seq_id=5,
            request=types.SampleRequest(types.ModelInput.from_ints([1, 2])),
        ),
        "POST",
        "asample",
        {
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
            "sampling_params": {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
            "prompt_logprobs": False,
            "type": "sample",
            "sampling_session_id": "s:sample:0",
            "seq_id": 5,
        },
        {"request_id": "r-2", "sample_sequence_ids": ["q-1"]},
        types.UntypedFuture("r-2", sample_sequence_ids=["q-1"]),
    ),
    (
        "asample with everything",
        lambda t: sampling.asample(
            t,
            sampling_session_id="s:sample:0",
            seq_id=5,
            request=types.SampleRequest(
                types.ModelInput.from_ints([1, 2]),
                2,
                types.SamplingParams(3, 4, ["a"], 0.5, 6, 0.7),
                True,
                8,
                9,
                1,
                types.TensorData([10], "int64", (1, 1)),
                11,
                True,
            ),
        ),
        "POST",
        "asample",
        {
            "num_samples": 2,
            "prompt": {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]},
            "sampling_params": {
                "temperature": 0.5,
                "top_k": 6,
                "top_p": 0.7,
                "max_tokens": 3,
                "seed": 4,
                "stop": ["a"],
            },
            "prompt_logprobs": True,
            "topk_prompt_logprobs": 8,
            "topk_sample_logprobs": 9,
            "prompt_logprobs_last_n": 1,
            "target_prompt_logprobs": {"data": [10], "dtype": "int64", "shape": [1, 1]},
            "prompt_alt_tokens_k": 11,
            "record_stability_info": True,
            "type": "sample",
            "sampling_session_id": "s:sample:0",
            "seq_id": 5,
        },
        {"request_id": "r-2"},
        types.UntypedFuture("r-2"),
    ),
    (
        "join_sampling_session",
        lambda t: sampling.join_sampling_session(t, "s:sample:0"),
        "POST",
        "join_sampling_session",
        {"sampling_session_id": "s:sample:0", "type": "join_sampling_session"},
        {"client_counter": 2, "type": "join_sampling_session"},
        types.JoinSamplingSessionResponse(2),
    ),
    (
        "cancel_future",
        lambda t: futures.cancel_future(t, "r-1"),
        "POST",
        "cancel_future",
        {"request_id": "r-1"},
        {},
        None,
    ),
    (
        "get_sampler",
        lambda t: sampling.get_sampler(t, "s:sample:0"),
        "GET",
        "samplers/s:sample:0",
        None,
        {"sampler_id": "s:sample:0", "base_model": "b"},
        types.GetSamplerResponse("s:sample:0", "b"),
    ),
    (
        "list_training_runs",
        lambda t: rest.list_training_runs(
            t, limit=5, offset=0, access_scope="owned", project_id=None
        ),
        "GET",
        "training_runs?limit=5&offset=0&access_scope=owned",
        None,
        {"training_runs": [RUN_JSON], "cursor": {"offset": 0, "limit": 5, "total_count": 1}},
        types.TrainingRunsResponse([RUN], types.Cursor(0, 5, 1)),
    ),
    (
        "list_training_runs of a project",
        lambda t: rest.list_training_runs(
            t, limit=5, offset=10, access_scope="accessible", project_id="p 1&2"
        ),
        "GET",
        "training_runs?limit=5&offset=10&access_scope=accessible&project_id=p+1%262",
        None,
        {"training_runs": []},
        types.TrainingRunsResponse([]),
    ),
    (
        "get_training_run",
        lambda t: rest.get_training_run(t, "s:train:0", access_scope="owned"),
        "GET",
        "training_runs/s:train:0?access_scope=owned",
        None,
        RUN_JSON,
        RUN,
    ),
    (
        "list_checkpoints",
        lambda t: rest.list_checkpoints(t, "s:train:0"),
        "GET",
        "training_runs/s:train:0/checkpoints",
        None,
        {"checkpoints": [CHECKPOINT_JSON]},
        types.CheckpointsListResponse([CHECKPOINT]),
    ),
    (
        "list_user_checkpoints",
        lambda t: rest.list_user_checkpoints(t, limit=100, offset=0),
        "GET",
        "checkpoints?limit=100&offset=0",
        None,
        {"checkpoints": [CHECKPOINT_JSON]},
        types.CheckpointsListResponse([CHECKPOINT]),
    ),
    (
        "delete_checkpoint",
        lambda t: rest.delete_checkpoint(t, "s:train:0", "weights/a"),
        "DELETE",
        "training_runs/s:train:0/checkpoints/weights/a",
        None,
        None,
        None,
    ),
    (
        "publish_checkpoint",
        lambda t: rest.publish_checkpoint(t, "s:train:0", "weights/a"),
        "POST",
        "training_runs/s:train:0/checkpoints/weights/a/publish",
        None,
        None,
        None,
    ),
    (
        "unpublish_checkpoint",
        lambda t: rest.unpublish_checkpoint(t, "s:train:0", "weights/a"),
        "DELETE",
        "training_runs/s:train:0/checkpoints/weights/a/publish",
        None,
        None,
        None,
    ),
    (
        "set_checkpoint_ttl",
        lambda t: rest.set_checkpoint_ttl(t, "s:train:0", "weights/a", None),
        "PUT",
        "training_runs/s:train:0/checkpoints/weights/a/ttl",
        {"ttl_seconds": None},
        None,
        None,
    ),
    (
        "get_weights_info",
        lambda t: rest.get_weights_info(t, "tinker://x/weights/a"),
        "POST",
        "weights_info",
        {"tinker_path": "tinker://x/weights/a"},
        {"base_model": "b", "is_lora": True, "lora_rank": 8},
        types.WeightsInfoResponse("b", True, 8),
    ),
    (
        "list_sessions",
        lambda t: rest.list_sessions(t, limit=20, offset=0, access_scope="owned"),
        "GET",
        "sessions?limit=20&offset=0&access_scope=owned",
        None,
        {"sessions": ["s"]},
        types.ListSessionsResponse(["s"]),
    ),
    (
        "get_session",
        lambda t: rest.get_session(t, "s", access_scope="owned"),
        "GET",
        "sessions/s?access_scope=owned",
        None,
        {"training_run_ids": ["s:train:0"], "sampler_ids": [], "user_metadata": {"k": "v"}},
        types.GetSessionResponse(["s:train:0"], [], {"k": "v"}),
    ),
)


@pytest.fixture
def mocked() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


@pytest.fixture
def transport() -> Transport:
    return Transport(CONFIG)


def sent(mocked: responses.RequestsMock) -> Any:
    """Return the only request that was sent."""
    assert len(mocked.calls) == 1
    return mocked.calls[0].request


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_endpoint(case: Case, mocked: responses.RequestsMock, transport: Transport) -> None:
    _, call, method, path, body, answer, expected = case
    url = f"{BASE}/api/v1/{path}"
    if answer is None:
        mocked.add(method, url.partition("?")[0], status=200, body=b"")
    else:
        mocked.add(method, url.partition("?")[0], json=answer)
    assert call(transport) == expected
    request = sent(mocked)
    assert request.method == method
    assert request.url == url
    if body is None:
        assert not request.body
    else:
        assert json.loads(request.body) == body
        assert request.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("codec", "forward_only", "path"),
    [
        (JSON, False, "forward_backward"),
        (JSON, True, "forward"),
        (PROTOBUF, False, "forward_backward"),
        (PROTOBUF, True, "forward_backward"),
    ],
)
def test_forward_backward(
    mocked: responses.RequestsMock, transport: Transport, codec: Any, forward_only: bool, path: str
) -> None:
    datum = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
    batch = types.ForwardBackwardRequest("m", 1, [datum], "cross_entropy", {}, forward_only)
    mocked.add("POST", f"{BASE}/api/v1/{path}", json=FUTURE_JSON, status=202)
    assert training.forward_backward(transport, codec, batch, RetryPolicy()) == FUTURE
    request = sent(mocked)
    assert request.headers["Content-Type"] == codec.content_type
    assert codec.decode_forward_backward(request.body) == batch


def test_a_heartbeat_returns_any_reply(
    mocked: responses.RequestsMock, transport: Transport
) -> None:
    mocked.add("POST", f"{BASE}/api/v1/session_heartbeat", status=410, json={"detail": "over"})
    assert sessions.session_heartbeat(transport, "s").status == 410
    assert json.loads(sent(mocked).body) == {"session_id": "s", "type": "session_heartbeat"}


def test_finish_sends_null_fields(mocked: responses.RequestsMock, transport: Transport) -> None:
    mocked.add("POST", f"{BASE}/api/v1/sessions/s/finish", status=404, json={"detail": "Not Found"})
    assert sessions.finish_session(transport, "s", "errored", None, 2.0) == 404
    assert json.loads(sent(mocked).body) == {"reason": {"type": "errored"}, "detail": None}


def test_retrieve_future_returns_any_response(
    mocked: responses.RequestsMock, transport: Transport
) -> None:
    mocked.add("POST", f"{BASE}/api/v1/retrieve_future", status=408)
    reply = futures.retrieve_future(transport, "r", binary=False, read_timeout_s=1.0)
    assert reply.status == 408
    assert json.loads(sent(mocked).body) == {"request_id": "r"}


def test_after_an_announced_size_the_payload_itself_is_requested(
    mocked: responses.RequestsMock, transport: Transport
) -> None:
    mocked.add("POST", f"{BASE}/api/v1/retrieve_future", json={})
    futures.retrieve_future(transport, "r", binary=True, read_timeout_s=1.0, payload=True)
    assert json.loads(sent(mocked).body) == {"request_id": "r", "allow_metadata_only": False}


def test_telemetry_returns_any_response_and_carries_no_key(
    mocked: responses.RequestsMock,
) -> None:
    mocked.add("POST", f"{BASE}/api/v1/client/config", json={})  # asks whether to exchange the key
    mocked.add("POST", f"{BASE}/api/v1/telemetry", status=503)
    keyed = Transport(Config.resolve(environ={}, base_url=BASE, api_key="tml-secret-0815"))
    events = [{"event": "GENERIC_EVENT", "event_data": {"header": "tml-secret-0815"}}]
    reply = sessions.send_telemetry(
        keyed, events, session_id="s", process_uuid="p", channel=keyed.open_channel()
    )
    assert reply.status == 503
    assert json.loads(mocked.calls[-1].request.body) == {
        "events": [{"event": "GENERIC_EVENT", "event_data": {"header": "<api key>"}}],
        "platform": platform.system(),
        "sdk_version": PROTOCOL_VERSION,
        "session_id": "s",
        "process_uuid": "p",
    }
    keyed.abort()


@pytest.mark.parametrize("body", ["[]", "{}", '{"request_id": null}', "not json"])
def test_the_error_about_an_invalid_response_names_the_route(
    mocked: responses.RequestsMock, transport: Transport, body: str
) -> None:
    mocked.add("POST", f"{BASE}/api/v1/optim_step", body=body, content_type="application/json")
    with pytest.raises(ResponseDecodeError, match="POST /api/v1/optim_step"):
        training.submit(transport, "optim_step", model_id="m", seq_id=1, **ADAM)


@pytest.mark.parametrize("session_id", [None, "", 7])
def test_a_session_id_is_a_string(
    mocked: responses.RequestsMock, transport: Transport, session_id: Any
) -> None:
    mocked.add("POST", f"{BASE}/api/v1/create_session", json={"session_id": session_id})
    with pytest.raises(ResponseDecodeError, match="session_id"):
        sessions.create_session(transport, CONFIG)


# Ids and names that would lead to another route


@pytest.mark.parametrize(
    ("run", "checkpoint", "path"),
    [
        ("r", "weights/a#b", "training_runs/r/checkpoints/weights/a%23b"),
        ("r", "weights/a?b", "training_runs/r/checkpoints/weights/a%3Fb"),
        ("r", "weights/50%25", "training_runs/r/checkpoints/weights/50%2525"),
        ("a b", "weights/\u00e9", "training_runs/a%20b/checkpoints/weights/%C3%A9"),
        ("s:train:0", "weights/lr=1e-4", "training_runs/s:train:0/checkpoints/weights/lr=1e-4"),
    ],
)
def test_names_are_escaped_so_that_no_other_checkpoint_is_deleted(
    mocked: responses.RequestsMock, transport: Transport, run: str, checkpoint: str, path: str
) -> None:
    mocked.add("DELETE", f"{BASE}/api/v1/{path}")
    rest.delete_checkpoint(transport, run, checkpoint)
    assert sent(mocked).url == f"{BASE}/api/v1/{path}"


@pytest.mark.parametrize(
    "call",
    [
        lambda t: rest.delete_checkpoint(t, "r", "weights/.."),
        lambda t: rest.delete_checkpoint(t, "r", ""),
        lambda t: rest.delete_checkpoint(t, "..", "weights/a"),
        lambda t: rest.get_training_run(t, "", access_scope="owned"),
        lambda t: rest.get_session(t, ".", access_scope="owned"),
        lambda t: sampling.get_sampler(t, ""),
        lambda t: rest.list_checkpoints(t, 7),
    ],
)
def test_ids_that_name_another_route_are_not_sent(
    mocked: responses.RequestsMock, transport: Transport, call: Call
) -> None:
    with pytest.raises(InvalidInputError):
        call(transport)
    assert len(mocked.calls) == 0


def test_a_not_found_error_carries_the_route(
    mocked: responses.RequestsMock, transport: Transport
) -> None:
    mocked.add("GET", f"{BASE}/api/v1/sessions/s", json={"detail": "no such session"}, status=404)
    with pytest.raises(NotFoundError, match=r"GET /api/v1/sessions/s returned 404: no such"):
        rest.get_session(transport, "s", access_scope="owned")


# encode


def test_numpy_values_are_sent_as_json() -> None:
    body = {"a": np.arange(3, dtype=np.int32), "b": np.float64(0.5), "c": np.int64(7)}
    assert json.loads(encode(body)) == {"a": [0, 1, 2], "b": 0.5, "c": 7}


def test_encoding_a_body_takes_no_more_memory_than_its_length() -> None:
    tracemalloc.start(1)
    try:
        before, _ = tracemalloc.get_traced_memory()
        bodies = [encode({"tokens": list(range(1000, 1100))}) for _ in range(10)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2 * sum(map(len, bodies))


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**70, {3: "x"}, "\ud800"])
def test_values_that_json_cannot_express_are_input_errors(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="JSON"):
        encode({"user_metadata": value})
