"""The differences between the servers of the protocol, row by row, over raw HTTP.

Each function below checks one row of the table and returns what the server does as a small value;
its decorator holds the expected value of each column.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from typing import Any, Callable, Dict, List

import numpy as np
import orjson
import pytest
import requests
from servers.profiles import NAMES, profile_named
from servers.profiles.table import settings_of
from servers.raw import KEY, SESSION, Raw, rl_datum

from tinkex.local.settings import ServerSettings
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

COLUMNS = ("skyrl-0.3", "skyrl-0.4", "tuft-0.2", "hatchery-0.3", "hosted")
UNKNOWN = "00000000-0000-0000-0000-000000000000"
CRASH = "500, plain text"

Look = Callable[[Raw], Any]
ROWS: Dict[str, Look] = {}
EXPECTED: Dict[str, Dict[str, Any]] = {}


def row(*columns: Any) -> Callable[[Look], Look]:
    """Record the expected value of each column; a single value stands for all columns."""
    values = columns * len(COLUMNS) if len(columns) == 1 else columns
    assert len(values) == len(COLUMNS)

    def keep(look: Look) -> Look:
        ROWS[look.__name__] = look
        EXPECTED[look.__name__] = dict(zip(COLUMNS, values))
        return look

    return keep


@pytest.mark.parametrize("name", ROWS)
def test_row(raw: Raw, name: str) -> None:
    assert ROWS[name](raw) == EXPECTED[name][raw.profile]


def test_every_profile_is_a_column() -> None:
    assert sorted(NAMES) == sorted(COLUMNS)


def summary(answer: requests.Response) -> Any:
    """Return the status, marked if it is a crash in plain text."""
    if answer.status_code == 500 and answer.headers["Content-Type"].startswith("text/plain"):
        assert answer.text == "Internal Server Error"
        return CRASH
    return answer.status_code


# ---- Requests ----


@row(
    {"json": 200, "protobuf": CRASH},
    {"json": 415, "protobuf": 200},
    {"json": 415, "protobuf": 202},
    {"json": 200, "protobuf": CRASH},
    {"json": 415, "protobuf": 200},
)
def forward_backward_body(raw: Raw) -> Any:
    model = raw.model()
    refused, taken = (PROTOBUF, JSON) if raw.codec is JSON else (JSON, PROTOBUF)
    first = summary(raw.train(model, 1, codec=refused))
    second = raw.train(model, 1, codec=taken)
    raw.value(second) if taken is JSON else raw.decoded(second, "decode_output")
    return {refused.name: first, taken.name: summary(second)}


@row("not read", "read", "read", "not read", "read")
def zstd_protobuf_body(raw: Raw) -> str:
    zstandard = pytest.importorskip("zstandard")
    plain = PROTOBUF.encode_forward_backward(_asked(raw.model()))
    answer = raw.send(
        "POST",
        "forward_backward",
        data=zstandard.ZstdCompressor().compress(plain),
        headers={"Content-Type": PROTOBUF.content_type, "Content-Encoding": "zstd"},
    )
    if not answer.ok:
        return "not read"
    raw.decoded(answer, "decode_output")
    return "read"


def _asked(model: str) -> Any:
    from servers.raw import datum

    from tinkex.types import ForwardBackwardRequest

    return ForwardBackwardRequest(model, 1, [datum()], "cross_entropy")


@row(
    {"route forward": 200, "gradient of it": 0.0},
    {"route forward": 404, "gradient of it": 0.0},
    {"route forward": 404, "gradient of it": None},
    {"route forward": 200, "gradient of it": 0.0},
    {"route forward": 404, "gradient of it": 0.0},
)
def forward(raw: Raw) -> Any:
    model = raw.model()
    answer = raw.train(model, 1, route="forward")
    done = answer if answer.ok else raw.train(model, 1, forward_only=True)
    raw.decoded(done, "decode_output")
    metrics = raw.value(raw.step(model, 2))["metrics"]
    return {
        "route forward": summary(answer),
        "gradient of it": metrics and metrics["grad_norm:mean"],
    }


@row(
    {"application/json": "json", "application/x-protobuf": "json"},
    {"application/json": "protobuf", "application/x-protobuf": "protobuf"},
    {"application/json": "json", "application/x-protobuf": "protobuf"},
    {"application/json": "json, zstd", "application/x-protobuf": "json, zstd"},
    {"application/json": "protobuf", "application/x-protobuf": "protobuf"},
)
def results_of_forward_and_sample(raw: Raw) -> Any:
    pytest.importorskip("zstandard")
    session = raw.session()
    passed = raw.train(raw.model(session), 1)
    sampled = raw.sample(raw.sampler(session, 0), 0, [5, 6, 7])
    seen: Dict[str, set[str]] = {}
    for accept in ("application/json", "application/x-protobuf"):
        for future in (passed, sampled):
            answer = raw.settled(future, accept, **{"Accept-Encoding": "zstd"})
            kind = "protobuf" if "protobuf" in answer.headers["Content-Type"] else "json"
            zstd = answer.headers.get("Content-Encoding") == "zstd"
            seen.setdefault(accept, set()).add(f"{kind}, zstd" if zstd else kind)
    return {accept: " or ".join(kinds) for accept, kinds in seen.items()}


_NEW_FIELDS = (
    "optimizer_config",
    "topk_sample_logprobs",
    "prompt_alt_tokens_k",
    "record_stability_info",
    "user_metadata",
)


@row({}, {}, dict.fromkeys(_NEW_FIELDS, "extra_forbidden"), {}, {})
def unknown_fields(raw: Raw) -> Any:
    session = raw.session()
    model = raw.model(session)
    sampler = raw.sampler(session, 0)
    answers = {
        "optimizer_config": raw.post(
            "create_model", session_id=session, model_seq_id=1, base_model="deterministic",
            optimizer_config={"type": "adamw"},
        ),
        "topk_sample_logprobs": raw.sample(sampler, 0, [5], topk_sample_logprobs=0),
        "prompt_alt_tokens_k": raw.sample(sampler, 1, [5], prompt_alt_tokens_k=0),
        "record_stability_info": raw.sample(sampler, 2, [5], record_stability_info=False),
        "user_metadata": raw.post(
            "save_weights", model_id=model, seq_id=1, path="a", user_metadata={"a": "b"}
        ),
    }  # fmt: skip
    refused = {}
    for name, answer in answers.items():
        if answer.status_code == 422:
            (fault,) = answer.json()["detail"]
            assert fault["loc"] == ["body", name]
            assert "input" in fault
            assert fault["msg"] == "Extra inputs are not permitted"
            refused[name] = fault["type"]
        else:
            assert answer.ok, answer.text
    return refused


_MISSING = {
    "type": "missing",
    "loc": ["body", "session_id"],
    "msg": "Field required",
    "input": {"type": "session_heartbeat"},
}


@row(_MISSING, _MISSING, _MISSING, _MISSING, 400)
def validation_error(raw: Raw) -> Any:
    answer = raw.post("session_heartbeat", type="session_heartbeat")
    if answer.status_code != 422:
        return answer.status_code
    (fault,) = answer.json()["detail"]
    return fault


@row(["int_type"], ["int_type"], ["int_type"], ["int_type"], 400)
def mistyped_field(raw: Raw) -> Any:
    answer = raw.post(
        "create_model", session_id=raw.session(), model_seq_id="one", base_model="deterministic"
    )
    detail = answer.json()["detail"]
    return [f["type"] for f in detail] if isinstance(detail, list) else answer.status_code


# ---- Routes ----


@row([200, 405], [200, 405], [200, 405], [200, 200], [200, 404])
def client_config(raw: Raw) -> List[int]:
    return [
        raw.post("client/config", sdk_version="0.38.0").status_code,
        raw.send("GET", "client/config").status_code,
    ]


_CP = "training_runs/run/checkpoints/weights/c1"
_NEWER = {
    "client/dynamic_config": ("POST", "client/dynamic_config"),
    "retrieve_futures": ("POST", "retrieve_futures"),
    "cancel_future": ("POST", "cancel_future"),
    "finish": ("POST", "sessions/{session}/finish"),
    "copy_weights": ("POST", "copy_weights"),
    "ttl": ("PUT", f"{_CP}/ttl"),
    "session search": ("POST", "sessions/search"),
    "billing": ("GET", "billing/usage/events"),
    "audit log": ("GET", "audit"),
}


@row(
    dict.fromkeys(_NEWER, 404),
    dict.fromkeys(_NEWER, 404),
    {**dict.fromkeys(_NEWER, 404), "ttl": 405, "session search": 405},
    dict.fromkeys(_NEWER, 404),
    dict.fromkeys(_NEWER, "there"),
)
def newer_routes(raw: Raw) -> Any:
    session = raw.session()
    seen: Dict[str, Any] = {}
    for name, (method, route) in _NEWER.items():
        body = None if method == "GET" else {"reason": {"type": "success"}}
        answer = raw.send(method, route.format(session=session), json=body)
        text = answer.json()
        missing = text.get("detail") in ("Not Found", "Method Not Allowed")
        seen[name] = answer.status_code if missing else "there"
    return seen


@row(
    [404, 404, 404, 404],
    [404, 404, 404, 404],
    [200, 200, "there", "there"],
    [404, 404, 404, 404],
    [200, 200, "there", "there"],
)
def sessions_checkpoints_auth_publish(raw: Raw) -> Any:
    seen: List[Any] = [raw.send("GET", route).status_code for route in ("sessions", "checkpoints")]
    for route in ("auth/token", f"{_CP}/publish"):
        answer = raw.post(route)
        missing = answer.status_code == 404 and answer.json() == {"detail": "Not Found"}
        seen.append(404 if missing else "there")
    return seen


@row(
    {"unload_model": 200, "archive": 404, "archive of a sampler": "tar"},
    {"unload_model": 200, "archive": 404, "archive of a sampler": "tar"},
    {"unload_model": 202, "archive": "tar", "archive of a sampler": "tar"},
    {"unload_model": 404, "archive": 404, "archive of a sampler": 404},
    {"unload_model": 404, "archive": 404, "archive of a sampler": 404},
)
def older_routes(raw: Raw) -> Any:
    model = raw.model()
    saved = {
        "archive": raw.save(model, 1, "c1"),
        "archive of a sampler": raw.save(model, 2, "s1", sampler=True),
    }
    seen: Dict[str, Any] = {}
    for name, answer in saved.items():
        checkpoint = raw.value(answer)["path"].partition(f"tinker://{model}/")[2]
        route = f"training_runs/{model}/checkpoints/{checkpoint}/archive"
        found = raw.send("GET", route)  # follows the redirect to the signed URL
        seen[name] = (
            "tar" if found.ok and b"deterministic.json" in found.content else summary(found)
        )
    seen["unload_model"] = raw.post("unload_model", model_id=model).status_code
    return seen


@row(None, None, [204, CRASH, CRASH, 204, 204], None, [200, 200, 409, 200, 200])
def publish_unpublish_delete(raw: Raw) -> Any:
    if raw.profile not in ("tuft-0.2", "hosted"):
        return None
    model = raw.model()
    raw.value(raw.save(model, 1, "c1"))
    raw.value(raw.save(model, 2, "c2"))
    first, second = (f"training_runs/{model}/checkpoints/weights/c{n}" for n in (1, 2))
    asked = [
        ("POST", f"{first}/publish"),
        ("DELETE", f"{first}/publish"),
        ("DELETE", f"{first}/publish"),
        ("DELETE", first),
        ("DELETE", second),
    ]
    return [summary(raw.send(method, route)) for method, route in asked]


@row(
    {"future_id", "status", "request_id"},
    {"future_id", "status", "request_id"},
    {"request_id", "model_id"},
    {"request_id", "model_id"},
    {"request_id", "model_id"},
)
def body_of_a_submission(raw: Raw) -> Any:
    model = raw.model()
    bodies = [raw.train(model, 1).json(), raw.train(model, 2, loss="no_such_loss").json()]
    assert set(bodies[0]) == set(bodies[1])
    return set(bodies[0])


@row(False, False, False, False, True)
def sample_sequence_ids(raw: Raw) -> bool:
    sampler = raw.sampler(raw.session(), 0)
    accepted = raw.sample(sampler, 0, [5, 6], num_samples=2).json()
    return len(accepted.get("sample_sequence_ids", ())) == 2


# ---- What is not known ----


@row(404, 404, CRASH, 200, 404)
def heartbeat_of_an_unknown_session(raw: Raw) -> Any:
    assert raw.post("session_heartbeat", session_id=raw.session()).status_code == 200
    return summary(raw.post("session_heartbeat", session_id=UNKNOWN))


@row([404] * 4, [404] * 4, [CRASH] * 4, [404] * 4, [404] * 4)
def unknown_session_run_model_elsewhere(raw: Raw) -> List[Any]:
    return [
        summary(raw.post("create_model", session_id=UNKNOWN, model_seq_id=0,
                      base_model="deterministic", lora_config={"rank": 4})),
        summary(raw.post("get_info", model_id=f"{UNKNOWN}:train:0")),
        summary(raw.step(f"{UNKNOWN}:train:0", 1)),
        summary(raw.post("create_sampling_session", session_id=UNKNOWN, sampling_session_seq_id=0,
                      base_model="deterministic")),
    ]  # fmt: skip


@row([200, 400], [200, 400], [CRASH, CRASH], [200, 404], [404, 404])
def heartbeat_and_work_after_expiry(raw: Raw) -> List[Any]:
    session = raw.session()
    model = raw.model(session)
    backend = raw.server._backend
    backend.housekeeping(time.monotonic() + 1e6)  # long after everything was due
    beat = raw.post("session_heartbeat", session_id=session)
    work = raw.step(model, 1)
    if work.status_code == 400:
        assert work.json() == {"detail": f"Model {model} not loaded"}
    return [summary(beat), summary(work)]


# ---- Numbers ----


@row("same id", "same id", "409 Sequence conflict: expected 2, got 1.", "same id", "same id")
def same_seq_id_same_body(raw: Raw) -> str:
    return _repeated(raw, raw.train)


@row(409, 409, "409 Sequence conflict: expected 2, got 1.", "same id", 409)
def same_seq_id_other_body(raw: Raw) -> Any:
    return _repeated(raw, raw.step)


def _repeated(raw: Raw, again: Callable[[str, int], requests.Response]) -> Any:
    model = raw.model()
    first = raw.train(model, 1)
    raw.decoded(first, "decode_output")
    second = again(model, 1)
    if not second.ok:
        return second.status_code
    if second.json()["request_id"] == first.json()["request_id"]:
        return "same id"
    result = raw.settled(second)
    return f"{result.status_code} {result.json()['detail'].replace('Future failed: ', '')}"


@row("runs", "runs", "409 expected 1, got 2; 1 again runs, then 2", "runs", "runs")
def after_a_request_that_fails(raw: Raw) -> str:
    model = raw.model()
    failed = raw.settled(raw.train(model, 1, loss="no_such_loss"))
    assert failed.status_code in (400, 422) or "error" in failed.json()
    result = raw.settled(raw.step(model, 2))
    if result.status_code == 200:
        return "runs"
    raw.decoded(raw.train(model, 1), "decode_output")
    raw.value(raw.step(model, 2))
    conflict = result.json()["detail"].partition("conflict: ")[2].rstrip(".")
    return f"{result.status_code} {conflict}; 1 again runs, then 2"


@row([400, 400], [400, 400], [422, 409], [200, 200], [200, 200])
def two_failures_in_flight(raw: Raw) -> List[int]:
    """If the failed first request did not use up its number, the second fails by its number."""
    model = raw.model()
    futures = [raw.train(model, number, loss="no_such_loss") for number in (1, 2)]
    return [raw.settled(future).status_code for future in futures]


@row(
    "runs as it comes",
    "runs as it comes",
    "409 until the missing one comes",
    "runs as it comes",
    "waits",
)
def seq_id_gap(raw: Raw) -> str:
    model = raw.model()
    later = raw.step(model, 2)
    first = raw.poll(later)
    if b'"try_again"' in first.content:
        raw.decoded(raw.train(model, 1), "decode_output")
        raw.value(later)
        return "waits"
    if first.status_code == 200:
        raw.decoded(raw.train(model, 1), "decode_output")
        return "runs as it comes"
    assert "expected 1, got 2" in first.json()["detail"]
    raw.decoded(raw.train(model, 1), "decode_output")
    raw.value(raw.step(model, 2))
    return f"{first.status_code} until the missing one comes"


# ---- Results ----


@row([4, False], [4, False], [5, False], [5, False], [5, True])
def prompt_logprobs_of_five_tokens(raw: Raw) -> List[Any]:
    """Return how many values there are, and whether the first is None."""
    sampler = raw.sampler(raw.session(), 0)
    sampled = raw.sample(sampler, 0, [5, 6, 7, 8, 9], prompt_logprobs=True)
    logprobs = raw.decoded(sampled, "decode_samples").prompt_logprobs_np
    assert np.isfinite(logprobs[1:]).all()
    assert (logprobs[1:] < 0).all()
    return [len(logprobs), bool(np.isnan(logprobs[0]))]


@row(
    [400, {"detail": "loss"}],
    [400, {"detail": "loss"}],
    [422, {"detail": "Future failed: loss"}],
    [200, {"error": "loss", "category": "user"}],
    [200, {"error": "loss", "category": "user"}],
)
def failed_request(raw: Raw) -> List[Any]:
    failed = raw.settled(raw.train(raw.model(), 1, loss="no_such_loss"))
    summary = {
        name: text.partition(" 'no_such_loss' is unknown")[0]
        for name, text in failed.json().items()
    }
    return [failed.status_code, summary]


@row(400, 400, 404, 200, 200)
def status_of_a_failed_load(raw: Raw) -> int:
    model = raw.model()
    path = "tinker://00000000-0000-0000-0000-000000000000:train:0/weights/none"
    failed = raw.settled(
        raw.post("load_weights", model_id=model, seq_id=1, path=path, optimizer=False)
    )
    assert "unknown" in (failed.json().get("detail") or failed.json()["error"])
    return int(failed.status_code)


@row("408 detail", "408 detail", "try_again", "try_again", "try_again")
def pending_request(raw: Raw) -> str:
    waiting = raw.train(raw.model(), 1, rl_datum(), "cispo")
    answer = raw.poll(waiting)
    raw.engine.gate.set()
    raw.decoded(waiting, "decode_output")
    if answer.status_code == 408:
        return f"408 {' '.join(answer.json())}"
    return str(answer.json()["type"])


@row(300.0, 300.0, 30.0, 30.0, 30.0)
def hold_of_a_pending_request_in_seconds(raw: Raw) -> float:
    return settings_of(profile_named(raw.profile), ServerSettings()).retrieve_hold_s


@row([200] * 3, [200] * 3, [201, 202, 202], [200] * 3, [200] * 3)
def success_status_of_submissions(raw: Raw) -> List[int]:
    session = raw.post("create_session", **SESSION)
    made = raw.post(
        "create_model",
        session_id=session.json()["session_id"],
        model_seq_id=0,
        base_model="deterministic",
        lora_config={"rank": 4},
    )
    model = raw.value(made)["model_id"]
    return [a.status_code for a in (session, made, raw.train(model, 1))]


@row({}, {}, {"loss:sum"}, {"loss:sum"}, {"loss:sum"})
def metrics(raw: Raw) -> Any:
    found = raw.decoded(raw.train(raw.model(), 1), "decode_output").metrics
    return set(found) or {}


@row(dict, dict, type(None), dict, dict)
def optim_step_metrics(raw: Raw) -> type:
    model = raw.model()
    raw.train(model, 1)
    value = raw.value(raw.step(model, 2))
    assert "metrics" in value
    return type(value["metrics"])


@row(
    ["NaN", "NaN", "NaN", "number"],
    ["NaN", "NaN", "NaN", "number"],
    ["number", "number", "number", "number"],
    "failed",
    "failed",
)
def token_id_beyond_the_vocabulary(raw: Raw) -> Any:
    """Return the kinds of logprobs at three positions with unknown tokens, and at one without."""
    from tinkex.types import Datum, ModelInput

    strange = Datum(
        ModelInput.from_ints([1, 1_000_000, 3, 4]),
        {"target_tokens": [2_000_000, 3, 4_000, 5], "weights": [1.0] * 4},
    )
    answer = raw.settled(raw.train(raw.model(), 1, strange), "application/x-protobuf")
    if answer.status_code != 200 or b'"error"' in answer.content:
        assert b"token" in answer.content
        return "failed"
    if raw.codec is JSON:
        assert b"null" in answer.content
        assert b"NaN" not in answer.content
        output = JSON.decode_output(answer.content)
    else:
        output = PROTOBUF.decode_output(answer.content)
    values = output.loss_fn_outputs[0]["logprobs"].to_numpy()
    return ["NaN" if np.isnan(value) else "number" for value in values]


# ---- Keys ----


@row([200, 200], [200, 200], [401, 403], [401, 401], [401, 401])
def without_a_key_and_with_a_wrong_one(raw: Raw) -> List[int]:
    body = SESSION
    return [
        200 if answer.ok else answer.status_code
        for answer in (
            raw.send("POST", "create_session", json=body, headers={"X-API-Key": key})
            for key in ("", "tml-wrong")
        )
    ]


@row([True], [True], [False], [True], [False])
def key_as_bearer(raw: Raw) -> List[bool]:
    headers = {"X-API-Key": "", "Authorization": f"Bearer {KEY}"}
    return [raw.send("GET", "get_server_capabilities", headers=headers).ok]


# ---- Checkpoints ----


@row([422, "missing", "model_id"], [422, "missing", "model_id"], [400, "Missing model_id"],
     [422, "missing", "model_id"], "loads")  # fmt: skip
def load_into_a_new_run(raw: Raw) -> Any:
    session = raw.session()
    path = raw.value(raw.save(raw.model(session), 1, "c1"))["path"]
    answer = raw.post("load_weights", session_id=session, model_seq_id=1, path=path, optimizer=True)
    if answer.ok:
        assert raw.value(answer)["model_id"]
        return "loads"
    detail = answer.json()["detail"]
    if isinstance(detail, str):
        return [answer.status_code, detail]
    return [answer.status_code, detail[0]["type"], detail[0]["loc"][-1]]


@row([200, 400], [200, 400], [202, 202], [200, 200], [200, 200])
def load_as_first_and_as_second_request(raw: Raw) -> List[int]:
    session = raw.session()
    path = raw.value(raw.save(raw.model(session), 1, "c1"))["path"]
    model = raw.model(session, 1)
    seen = []
    for seq_id in (1, 2):
        answer = raw.post("load_weights", model_id=model, seq_id=seq_id, path=path, optimizer=False)
        if answer.ok:
            raw.value(answer)
        seen.append(answer.status_code)
    return seen


@row(409, 409, "replaced", "replaced", 409)
def duplicate_checkpoint_name(raw: Raw) -> Any:
    model = raw.model()
    raw.value(raw.save(model, 1, "c1"))
    again = raw.save(model, 2, "c1")
    if again.status_code == 409:
        assert raw.save(model, 3, "c1").status_code == 409  # for good
        raw.value(raw.save(model, 4, "c2"))
        return 409
    raw.value(again)
    return "replaced"


@row(
    ["tinker://RUN/weights/c1", "tinker://RUN/s1"],
    ["tinker://RUN/weights/c1", "tinker://RUN/s1"],
    ["tinker://RUN/weights/c1", "tinker://RUN/sampler_weights/s1"],
    ["tinker://RUN/checkpoints/c1", "tinker://RUN/checkpoints/s1"],
    ["tinker://RUN/weights/c1", "tinker://RUN/sampler_weights/s1"],
)
def checkpoint_paths(raw: Raw) -> List[str]:
    model = raw.model()
    saved = [raw.save(model, 1, "c1"), raw.save(model, 2, "s1", sampler=True)]
    paths = [raw.value(answer)["path"] for answer in saved]
    info = raw.ok("weights_info", tinker_path=paths[0])
    assert info["base_model"] == "deterministic"
    assert info["lora_rank"] == 4
    return [path.replace(model, "RUN") for path in paths]


@row(
    [[200, 200], ["s1", "c1"]],
    [[200, 200], ["s1", "c1"]],
    [[200, 200], ["sampler_weights/s1", "weights/c1"]],
    [[404, 404], None],
    [[200, 200], ["sampler_weights/s1", "weights/c1"]],
)
def runs_and_their_checkpoints(raw: Raw) -> Any:
    model = raw.model()
    saved = [raw.save(model, 1, "c1"), raw.save(model, 2, "s1", sampler=True)]
    for answer in saved:
        raw.value(answer)
    statuses = [raw.send("GET", f"training_runs{rest}").status_code for rest in ("", f"/{model}")]
    found = raw.send("GET", f"training_runs/{model}/checkpoints")
    checkpoints = found.json().get("checkpoints")
    ids = checkpoints and [checkpoint["checkpoint_id"] for checkpoint in checkpoints]
    return [statuses, ids]


@row(False, False, True, False, True)
def colons_in_ids(raw: Raw) -> bool:
    session = raw.session()
    model, sampler = raw.model(session), raw.sampler(session, 0)
    saved = raw.ok("save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=1)
    ephemeral = raw.value(saved)["sampling_session_id"]
    raw.decoded(raw.sample(ephemeral, 0, [5]), "decode_samples")
    colons = [":" in text for text in (model, sampler, ephemeral)]
    assert len(set(colons)) == 1
    return colons[0]


@row(
    {"base": "id", "path": "id"},
    {"base": "id", "path": "id"},
    {"base": "id", "path": "id"},
    {"base": "future", "path": CRASH},
    {"base": "id", "path": "id"},
)
def create_sampling_session(raw: Raw) -> Any:
    session = raw.session()
    path = raw.value(raw.save(raw.model(session), 1, "s1", sampler=True))["path"]
    seen = {}
    sources = {"base": {"base_model": "deterministic"}, "path": {"model_path": path}}
    for number, (name, source) in enumerate(sources.items()):
        answer = raw.post(
            "create_sampling_session", session_id=session, sampling_session_seq_id=number, **source
        )
        if not answer.ok:
            seen[name] = summary(answer)
            continue
        made = answer.json()
        seen[name] = "id" if "sampling_session_id" in made else "future"
        sampler = made if seen[name] == "id" else raw.value(made)
        sampled = raw.sample(sampler["sampling_session_id"], 0, [5, 6])
        raw.decoded(sampled, "decode_samples")
    return seen


@row("model_name", "model_name", "model_name", "model_id", "model_name")
def capabilities(raw: Raw) -> str:
    (model,) = raw.send("GET", "get_server_capabilities").json()["supported_models"]
    (name,) = [name for name, value in model.items() if value == "deterministic"]
    return str(name)


# ---- Connections ----


@row("closed", "kept", "closed", "closed", "kept")
def connection_after_a_plain_500(raw: Raw) -> str:
    """Whether the server closes the connection without announcing it."""
    host, _, port = raw.server.url.partition("//")[2].rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10.0)
    connection.connect()
    sock = connection.sock
    headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
    if raw.codec is JSON:
        headers["Content-Type"] = PROTOBUF.content_type
        body = PROTOBUF.encode_forward_backward(_asked(raw.model()))
        connection.request("POST", "/api/v1/forward_backward", body, headers)
    else:
        body = orjson.dumps({"session_id": UNKNOWN})
        connection.request("POST", "/api/v1/session_heartbeat", body, headers)
    answer = connection.getresponse()
    answer.read()
    with contextlib.closing(connection):
        assert answer.getheader("Connection") is None
        if answer.status == 500:
            return "closed" if sock.recv(1) == b"" else "said more"
        connection.request("GET", "/api/v1/healthz", headers=headers)
        return "kept" if connection.getresponse().status == 200 else "closed"
