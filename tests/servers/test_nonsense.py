"""A server with a profile answers whatever is sent to it; no exception escapes from the layer."""

from __future__ import annotations

import json
from typing import Any, Dict, Iterator

import pytest
from hypothesis import given, strategies as st
from servers.profiles import NAMES, profile_named
from servers.profiles.layer import assemble
from servers.raw import KEY
from support.properties import several
from werkzeug.test import Client

from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ServerSettings
from tinkex.local.state.store import Store

HEADERS = {"X-API-Key": KEY}
#: Fields that a body of each route may contain; SESSION stands for the live session.
BODIES: Dict[str, Dict[str, Any]] = {
    "client/config": {"sdk_version": "x"},
    "create_session": {"tags": [], "sdk_version": "x", "user_metadata": {}},
    "session_heartbeat": {"session_id": "SESSION"},
    "create_model": {
        "session_id": "SESSION", "model_seq_id": 1, "base_model": "deterministic",
        "lora_config": {"rank": 4},
    },
    "get_info": {"model_id": "SESSION_train_0"},
    "load_weights": {"model_id": "SESSION:train:0", "seq_id": 1, "path": "tinker://SESSION/c"},
    "weights_info": {"tinker_path": "tinker://SESSION:train:0/weights/c"},
    "forward_backward": {
        "forward_backward_input": {"data": [], "loss_fn": "x"}, "model_id": "SESSION_train_0",
        "seq_id": 3,
    },
    "optim_step": {"model_id": "SESSION_train_0", "seq_id": 2, "adam_params": {}},
    "save_weights": {"model_id": "SESSION:train:0", "seq_id": 4, "path": "c"},
    "create_sampling_session": {
        "session_id": "SESSION", "sampling_session_seq_id": 0, "base_model": "deterministic",
    },
    "asample": {
        "sampling_session_id": "SESSION:sample:0", "seq_id": 0, "prompt": {"chunks": []},
        "sampling_params": {},
    },
    "retrieve_future": {"request_id": "SESSION:train:0:0"},
    "training_runs/SESSION_train_0/checkpoints/c/archive": {},
    "sessions/SESSION/finished": {},
    "nothing": {},
}  # fmt: skip

values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5)
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@st.composite
def requests(draw: st.DrawFn) -> Dict[str, Any]:
    """Draw requests that are nearly right, or entirely wrong."""
    route = draw(st.sampled_from(sorted(BODIES)))
    body: Any = dict(BODIES[route])
    for name in draw(st.sets(st.sampled_from([*body, "more"]), max_size=2)):
        body[name] = draw(values)
    raw = json.dumps(draw(st.sampled_from([body, body, body, [body], None]))).encode()
    return {
        "path": f"/api/v1/{route}",
        "method": draw(st.sampled_from(["POST", "POST", "POST", "POST", "GET", "PUT"])),
        "data": draw(st.sampled_from([raw, raw, raw, raw[:-1], b"\xff\x00"])),
        "content_type": draw(
            st.sampled_from(["application/json", "application/json", "application/x-protobuf", ""])
        ),
        "headers": {
            **HEADERS,
            "Content-Encoding": draw(st.sampled_from(["", "", "", "zstd", "gzip"])),
            "Accept": draw(st.sampled_from(["", "application/x-protobuf"])),
        },
    }


@pytest.fixture(scope="module", params=NAMES)
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    store = Store(tmp_path_factory.mktemp("store"))
    chosen = ServerSettings(api_key=KEY, retrieve_hold_s=0.01)
    backend, app = assemble(profile_named(str(request.param)), DeterministicEngine(), store, chosen)
    backend.start()
    yield Client(app)
    backend.close()


@pytest.fixture(scope="module")
def session_id(client: Client) -> str:
    body = {"tags": [], "user_metadata": {}, "sdk_version": "x"}
    made = client.post("/api/v1/create_session", json=body, headers=HEADERS)
    session_id = str(made.get_json()["session_id"])
    for route in ("create_model", "create_sampling_session"):
        body = json.loads(json.dumps(BODIES[route]).replace("SESSION", session_id))
        body["model_seq_id" if route == "create_model" else "sampling_session_seq_id"] = 0
        assert client.post(f"/api/v1/{route}", json=body, headers=HEADERS).status_code < 300
    return session_id


@given(asked=requests())
@several(100)
def test_nonsense_gets_a_response(client: Client, session_id: str, asked: Dict[str, Any]) -> None:
    path = asked.pop("path").replace("SESSION", session_id)
    data = asked.pop("data").replace(b"SESSION", session_id.encode())
    answer = client.open(path, data=data, **asked)
    assert answer.status_code in (200, 201, 202, 302, 400, 404, 405, 408, 409, 410, 415, 422, 500)
    if answer.status_code == 500:  # only the kind of 500 that a profile intends
        assert answer.get_data() == b"Internal Server Error"
