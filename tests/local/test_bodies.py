"""Bodies that the server reads: in both dialects, compressed, too large, or broken."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from local.harness import Api, datum, serving

from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.settings import ClientFlags, DynamicClientFlags, ServerSettings
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput, TensorData
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

zstandard = pytest.importorskip("zstandard")


def body_of(model: str, seq_id: int, codec: Any = PROTOBUF, datums: int = 1) -> bytes:
    asked = ForwardBackwardRequest(model, seq_id, [datum()] * datums, "cross_entropy")
    return bytes(codec.encode_forward_backward(asked))


def send(api: Api, body: bytes, codec: Any = PROTOBUF, encoding: str = "zstd") -> Any:
    return api.client.post(
        "/api/v1/forward_backward",
        data=body,
        content_type=codec.content_type,
        headers={"Content-Encoding": encoding},
    )


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=["json", "protobuf"])
@pytest.mark.parametrize("sized", [True, False], ids=["sized", "unsized"])
def test_compressed_batches_are_read(api: Api, codec: Any, sized: bool) -> None:
    model = api.model()
    body = body_of(model, 1, codec, datums=300)
    compressor = zstandard.ZstdCompressor(write_content_size=sized)
    answer = send(api, compressor.compress(body), codec)
    assert answer.status_code == 200, answer.text
    assert len(api.result(answer.get_json())["loss_fn_outputs"]) == 300


def test_broken_frames_are_refused_and_never_read_in_part(api: Api) -> None:
    model = api.model()
    frame = zstandard.compress(body_of(model, 1, datums=300))
    for broken, says in [
        (frame[: len(frame) // 2], "cut short"),
        (b"", "cut short"),
        (b"not zstd at all", "broken"),
        (frame + frame, "more than one"),
        (frame + b"x", "more than one"),
    ]:
        answer = send(api, broken)
        assert answer.status_code == 400
        assert says in answer.get_json()["detail"]
    assert send(api, frame).status_code == 200


def test_a_small_frame_cannot_grow_without_bound(tmp_path: Path) -> None:
    with serving(tmp_path, max_body_bytes=1 << 20) as api:
        bomb = zstandard.compress(bytes(1 << 30))
        assert len(bomb) < 1 << 20
        answer = send(api, bomb)
        assert answer.status_code == 413
        assert "1048576 bytes" in answer.get_json()["detail"]


def test_large_bodies_get_413_with_a_reason(tmp_path: Path) -> None:
    with serving(tmp_path, max_body_bytes=10_000) as api:
        model = api.model()
        answer = send(api, body_of(model, 1, datums=1000), encoding="identity")
        assert answer.status_code == 413
        assert "smaller batches" in answer.get_json()["detail"]
        assert send(api, body_of(model, 1), encoding="identity").status_code == 200


def test_a_socket_is_not_read_beyond_the_bound_and_answers_json_too() -> None:
    settings = ServerSettings(max_body_bytes=10_000)
    with LocalServer(DeterministicEngine(), settings=settings) as server:
        url = f"{server.url}/api/v1/telemetry"
        for body in (b"x" * 20_000, iter([b"x" * 20_000])):  # in one piece, and chunked
            with requests.Session() as session:
                answer = session.post(url, data=body, timeout=20)
                assert answer.status_code == 413
                assert "10000 bytes" in answer.json()["detail"]
        port = urlsplit(server.url).port
        for sent, status in [
            (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n", b" 413 "),
            (b"nonsense\r\n\r\n", b" 400 "),
            (b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", b" 400 "),
            (
                b"GET /api/v1/sessions?limit=\xb2 HTTP/1.1\r\nHost: localhost\r\n"
                b"Connection: close\r\n\r\n",
                b" 400 ",
            ),
            # 413 on Python versions that read numbers of any length.
            (b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b" 4"),
        ]:
            with socket.create_connection(("127.0.0.1", port or 0)) as raw:
                raw.sendall(sent)
                with raw.makefile("rb") as stream:
                    head, _, content = stream.read().partition(b"\r\n\r\n")
            assert status in head.splitlines()[0]
            assert b"Content-Type: application/json" in head
            assert isinstance(json.loads(content)["detail"], str)


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=["json", "protobuf"])
@pytest.mark.parametrize("target", [1.0, float("nan"), float("inf")])
def test_targets_that_are_not_integers_are_refused(api: Api, codec: Any, target: float) -> None:
    targets = TensorData([target, 1.0], "float32", (2, 2), [0, 1, 2], [0, 1])
    dense = TensorData([target, 1.0], "float32")
    for tensor in (targets, dense):
        bad = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": tensor})
        answer = api.submit_pass(api.model(), 1, [bad], expect=400, codec=codec)
        assert "target_tokens are float32; they must be int64" in answer["detail"]


def test_other_encodings_are_refused(api: Api) -> None:
    assert send(api, b"x", encoding="br").status_code == 415


@pytest.mark.parametrize("route", ["forward_backward", "forward"])
def test_the_old_json_forms_are_read_and_answered_in_json(api: Api, route: str) -> None:
    model = api.model()
    batch = {
        "data": [
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
                "loss_fn_inputs": {
                    "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
                    "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
                },
            }
        ],
        "loss_fn": "cross_entropy",
    }
    key = "forward_input" if route == "forward" else "forward_backward_input"
    made = api.post(route, **{key: batch, "model_id": model, "seq_id": 1})
    result = api.result(made)
    assert len(result["loss_fn_outputs"][0]["logprobs"]["data"]) == 3
    stepped = api.result(api.step(model, 2))["metrics"]
    assert stepped["grad_norm:mean"] == (0.0 if route == "forward" else 1.0)


def test_fields_of_newer_protocol_versions_are_accepted(api: Api) -> None:
    session = api.session()
    made = api.post(
        "create_model",
        session_id=session,
        model_seq_id=0,
        base_model="deterministic",
        optimizer_config={"type": "adamw"},
        type="create_model",
        something_new=1,
    )
    model = api.result(made)["model_id"]
    params = {"type": "adamw", "learning_rate": 0.1}
    stepped = api.post("optim_step", model_id=model, seq_id=1, optimizer_params=params)
    assert "metrics" in api.result(stepped)
    path = api.save(model, 2, "a")
    loaded = api.post(
        "load_weights",
        session_id=session,
        model_seq_id=1,
        path=path,
        optimizer=False,
        weights_access_token="secret",
    )
    assert api.result(loaded)["path"] == path
    sampler = api.sampler(session)
    assert "sequences" in api.result(api.submit_sample(sampler, 0, record_stability_info=True))


@pytest.mark.parametrize("route", ["create_model", "load_weights"])
def test_an_optimizer_that_the_server_lacks_is_refused(api: Api, route: str) -> None:
    session = api.session()
    path = api.save(api.model(session), 1, "a")
    body = {"base_model": "deterministic"} if route == "create_model" else {"path": path}
    refused = api.post(
        route,
        400,
        session_id=session,
        model_seq_id=5,
        optimizer_config={"type": "dimuon", "version": 1},
        **body,
    )
    assert "adamw" in refused["detail"]


def test_requests_beyond_a_gap_are_bounded(tmp_path: Path) -> None:
    with serving(tmp_path, max_waiting_per_run=3) as api:
        model = api.model()
        early = [api.step(model, seq_id) for seq_id in (3, 4, 5)]
        answer = api.client.post(
            "/api/v1/optim_step", json={"model_id": model, "seq_id": 6, "adam_params": {}}
        )
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        assert "wait for seq_id 1" in answer.get_json()["detail"]
        assert api.step(model, 4) == early[1]  # a repeated request does not count again
        for seq_id in (1, 2):
            api.step(model, seq_id)
        assert "metrics" in api.result(api.step(model, 6))
        for one in early:
            assert "metrics" in api.result(one)


# Flags for clients


def test_every_flag_of_the_protocol_is_reported(api: Api) -> None:
    assert api.post("client/config", sdk_version="0.38.0") == {
        "pjwt_auth_enabled": False,
        "credential_default_source": "api_key",
        "sample_dispatch_bytes_semaphore_size": 10485760,
        "inflight_response_bytes_semaphore_size": 52428800,
        "fwdbwd_dispatch_bytes_semaphore_size": 50000000,
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": False,
        "fwdbwd_max_chunk_len": 1024,
        "fwdbwd_max_chunk_bytes_count": 5000000,
        "billing_exception_max_pause_duration_sec": 3600,
        "sample_no_retries": False,
        "sample_enable_stuck_detection": True,
        "sample_max_concurrent_requests": 100,  # as many as the polls that can be held
        "use_pyqwest_transport": True,
        "sample_use_retrieve_futures": False,
        "custom_loss_server_side": False,
        "sample_join_sampling_session": False,
    }
    assert api.post("client/dynamic_config", sdk_version="0.38.0") == {
        "refresh_interval_sec": 300,
        "sample_cancel_enabled": False,
        "sample_cancel_max_batch_size": 64,
    }
    assert api.get("healthz") == {"status": "ok"}


def test_flags_can_be_set(tmp_path: Path) -> None:
    flags = ClientFlags(proto_compress_fwdbwd=True, sample_max_concurrent_requests=7)
    dynamic = DynamicClientFlags(sample_cancel_enabled=True, refresh_interval_sec=10)
    with serving(tmp_path, flags=flags, dynamic_flags=dynamic, jwt=True) as api:
        content = api.get("client/config")
        assert content["proto_compress_fwdbwd"] is True
        assert content["sample_max_concurrent_requests"] == 7
        assert content["pjwt_auth_enabled"] is True
        assert api.get("client/dynamic_config")["refresh_interval_sec"] == 10


def test_messages_for_the_user_are_sent_when_a_session_is_created(tmp_path: Path) -> None:
    with serving(tmp_path, info_message="hello", warning_message="", error_message="!") as api:
        made = api.post("create_session", tags=[])
        assert (made["info_message"], made["error_message"]) == ("hello", "!")
        assert "warning_message" not in made
