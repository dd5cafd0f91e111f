"""Any body gets a response that names the fault: no route crashes, and the run continues."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest
from hypothesis import given, strategies as st
from local.harness import WAIT_S, Api, serving
from support.properties import several

from tinkex.local.settings import ClientFlags
from tinkex.local.state.futures import Failure, Success
from tinkex.wire.proto_codec import PROTOBUF

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)

#: Route -> a valid body, of which the tests replace or drop some fields.
BODIES: Dict[str, Dict[str, Any]] = {
    "create_session": {
        "tags": [], "user_metadata": {}, "sdk_version": "x", "project_id": "p",
        "display_name": "d",
    },
    "session_heartbeat": {"session_id": "SESSION"},
    "create_model": {
        "session_id": "SESSION", "model_seq_id": 5, "base_model": "deterministic",
        "lora_config": {"rank": 8}, "optimizer_config": {"type": "adamw"}, "user_metadata": {},
    },
    "get_info": {"model_id": "MODEL"},
    "load_weights": {
        "session_id": "SESSION", "model_seq_id": 6, "path": "PATH", "optimizer": True,
        "base_model": "deterministic",
    },
    "optim_step": {"model_id": "MODEL", "seq_id": 50, "adam_params": {"learning_rate": 0.1}},
    "forward": {
        "model_id": "MODEL", "seq_id": 60,
        "forward_input": {"data": [], "loss_fn": "cross_entropy", "loss_fn_config": {}},
    },
    "forward_backward": {
        "model_id": "MODEL", "seq_id": 70,
        "forward_backward_input": {
            "data": [{"model_input": {"chunks": []}, "loss_fn_inputs": {}}],
            "loss_fn": "custom", "loss_fn_config": {"loss_id": "x"},
        },
    },
    "save_weights": {
        "model_id": "MODEL", "seq_id": 80, "path": "p", "ttl_seconds": 3600, "overwrite": True,
        "user_metadata": {},
    },
    "save_weights_for_sampler": {
        "model_id": "MODEL", "seq_id": 90, "sampling_session_seq_id": 9, "kind": "inflight",
        "path": "p",
    },
    "save_weights_external": {
        "model_id": "MODEL", "seq_id": 95, "path": "p", "age_encryption_recipients": [],
    },
    "create_sampling_session": {
        "session_id": "SESSION", "sampling_session_seq_id": 7, "base_model": "deterministic",
        "model_path": "PATH",
    },
    "join_sampling_session": {"sampling_session_id": "SAMPLER"},
    "asample": {
        "sampling_session_id": "SAMPLER", "seq_id": 3, "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "sampling_params": {"max_tokens": 1, "stop": [], "seed": 1, "temperature": 1.0},
        "prompt_logprobs": True, "topk_prompt_logprobs": 1, "topk_sample_logprobs": 1,
        "prompt_logprobs_last_n": 1, "prompt_alt_tokens_k": 1,
        "target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]},
    },
    "retrieve_future": {"request_id": "nothing", "allow_metadata_only": True},
    "retrieve_futures": {
        "target": {
            "type": "sampling_session", "sampling_session_id": "SAMPLER", "cloned_sampler_id": 0,
        },
        "prev_cursor": 0, "timeout": 0.0, "retrieved_request_ids": [],
    },
    "cancel_future": {"request_id": "nothing"},
    "weights_info": {"tinker_path": "PATH"},
    "copy_weights": {
        "source_path": "PATH", "destination_project_id": "p", "ttl_seconds": 3600,
    },
    "sessions/search": {
        "session_id": "s", "project_ids": ["p"], "user_metadata": {}, "display_name": "d",
        "owner": {"type": "user", "owner_urns": ["u"]},
        "statuses": [{"type": "client_finished", "reasons": ["success"]}], "limit": 5,
        "cursor": {"last_created_at": "2026-01-01T00:00:00Z", "last_session_id": "s"},
    },
    "telemetry": {
        "events": [{
            "event": "GENERIC_EVENT", "event_id": "e", "event_session_index": 0, "severity": "INFO",
            "timestamp": "2026-01-01T00:00:00Z", "event_name": "n", "event_data": {"a": 1},
        }], "platform": "x", "sdk_version": "x",
        "session_id": "s", "process_uuid": "p",
    },
    "create_custom_loss": {
        "session_id": "SESSION", "custom_loss_seq_id": 0, "name": "f",
        "inputs": [{"name": "logprobs", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                {"op": "placeholder", "name": "a", "target": "a", "args": [], "kwargs": {}},
                {"op": "call_function", "name": "b", "target": "torch.sum", "args": [{"ref": "a"}]},
                {"op": "output", "name": "c", "target": "c", "args": [
                    {"tuple": [{"ref": "b"}, {"dict": {"custom/x:sum": {"ref": "b"}}}]},
                ]},
            ],
        },
    },
    "client/config": {"sdk_version": "x"},
    "auth/token": {},
    "unload_model": {"model_id": "nothing"},
    "sessions/SESSION/finish": {"reason": {"type": "nonsense"}, "detail": None},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[Api, Dict[str, str]]]:
    folder: Path = tmp_path_factory.mktemp("world")
    flags = ClientFlags(custom_loss_server_side=True)
    with serving(folder, retrieve_hold_s=0.0, flags=flags) as api:
        session = api.session()
        model, sampler = api.model(session), api.sampler(session)
        path = api.save(model, 1, "a")
        names = {"SESSION": session, "MODEL": model, "SAMPLER": sampler, "PATH": path}
        yield api, names


def put_in(value: Any, names: Dict[str, str]) -> Any:
    """Replace placeholder names by the objects they stand for."""
    if isinstance(value, dict):
        return {name: put_in(item, names) for name, item in value.items()}
    if isinstance(value, list):
        return [put_in(item, names) for item in value]
    if isinstance(value, str):
        for name, thing in names.items():
            value = value.replace(name, thing)
    return value


@st.composite
def changed(draw: Any, value: Any) -> Any:
    """Draw *value* with one item in it, at any depth, replaced or left out."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 3)):
            copy[key] = draw(changed(value[key]))
        else:
            del copy[key]
        return copy
    return draw(JSON_VALUES)


def check(api: Api, route: str, **sent: Any) -> Any:
    answer = api.client.post(f"/api/v1/{route}", **sent)
    # 501: something that this server needs for it is not installed.
    assert answer.status_code < 500 or answer.status_code == 501, (sent, answer.text)
    if answer.status_code >= 400:
        assert isinstance(answer.get_json()["detail"], str)
    return answer


def in_turn(api: Api, body: Any) -> Any:
    """Give the body the next seq_id, so that it reaches the engine."""
    if isinstance(body, dict) and isinstance(body.get("seq_id"), int):
        lane = api.backend.scheduler._models.get(str(body.get("model_id")))
        number = next(SAMPLES) if lane is None else lane.next_seq
        return {**body, "seq_id": number}
    return body


SAMPLES = itertools.count(10)


@pytest.mark.parametrize("route", sorted(BODIES))
@several(60)
@given(data=st.data())
def test_a_faulty_body_is_never_a_failure_of_the_server(
    world: Tuple[Api, Dict[str, str]], route: str, data: Any
) -> None:
    api, names = world
    body = in_turn(api, put_in(data.draw(changed(BODIES[route])), names))
    answer = check(api, put_in(route, names), json=body)
    queued = answer.status_code == 200 and "request_id" in answer.get_json()
    if queued and route != "retrieve_future":
        outcome = api.backend.futures.wait(answer.get_json()["request_id"], WAIT_S)
        assert isinstance(outcome, (Success, Failure)), body
        assert getattr(outcome, "category", "") != "server", (body, outcome)


@several(100)
@given(data=st.data())
def test_malformed_bytes_are_never_a_failure_of_the_server(
    world: Tuple[Api, Dict[str, str]], data: Any
) -> None:
    api, _ = world
    raw = data.draw(st.binary(max_size=60))
    for route, kind in [
        ("forward_backward", PROTOBUF.content_type),
        ("forward_backward", "application/json"),
        ("asample", "application/json"),
        ("create_model", "text/plain"),
    ]:
        check(api, route, data=raw, content_type=kind)
        check(api, route, data=raw, content_type=kind, headers={"Content-Encoding": "zstd"})


@pytest.mark.parametrize(
    "path",
    [
        "training_runs?limit=x",
        "training_runs?limit=-1",
        "training_runs?offset=99999999999999999999999",
        "checkpoints?limit=0",
        "sessions?limit=²",
        "training_runs/%00",
        "training_runs/a/checkpoints/weights/%2e%2e",
        "training_runs/a/checkpoints/weights/..%2f..%2fx/archive",
        "samplers/%ff",
        "sessions/x",
    ],
)
def test_odd_addresses_are_never_a_failure_of_the_server(
    world: Tuple[Api, Dict[str, str]], path: str
) -> None:
    api, _ = world
    answer = api.client.get(f"/api/v1/{path}")
    assert answer.status_code < 500, answer.text


def test_after_all_faulty_requests_the_server_still_works(
    world: Tuple[Api, Dict[str, str]],
) -> None:
    api, _ = world
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    assert "metrics" in api.result(api.submit_pass(model, 1))
    assert "sequences" in api.result(api.submit_sample(sampler, 0))
