"""Bounds on what one request may demand, store or nest; beyond them, errors that name the bound."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, Dict, Iterator, List
from urllib.parse import quote

import numpy as np
import pytest
import zstandard
from local.harness import Api, HeldEngine, datum, serving
from servers.profiles import ProfiledServer

from tinkex import ServiceClient
from tinkex.local import LocalServer
from tinkex.local.engines.deterministic import DeterministicEngine
from tinkex.local.errors import HTTPError
from tinkex.local.json_text import MAX_LEVELS, check_values, levels, read_json, write_json
from tinkex.local.proto_bounds import MAX_MESSAGES, check_messages
from tinkex.local.settings import SamplingLimits, ServerSettings
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput, TensorData
from tinkex.wire import tinker_public_pb2 as pb
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

PROFILES = ["hosted", "skyrl-0.3", "skyrl-0.4", "tuft-0.2", "hatchery-0.3"]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def text_of(value: Any) -> bytes:
    return write_json(value)


def refused(api: Api, route: str, raw: bytes, status: int = 400) -> str:
    answer = api.client.post(f"/api/v1/{route}", data=raw, content_type="application/json")
    assert answer.status_code == status, answer.text
    detail: str = answer.get_json()["detail"]
    return detail


# Depth


@pytest.mark.parametrize(("raw", "expected"), [
    (b"1", 0),
    (b"[]", 1),
    (b'{"a":[{"b":[]}]}', 4),
    (b"[" * 500 + b"]" * 500, 500),
    (b"[" + b"[]," * 500 + b"[]]", 2),
    (b'["' + b"[" * 500 + b'"]', 1),
    (b'{"' + b"]" * 500 + b'":' + b"[" * 500 + b"]" * 500 + b"}", 501),
    (b'["\\"' + b"]" * 500 + b'",' + b"[" * 500 + b"]" * 500 + b"]", 501),
    (b'["\\\\",' + b"[" * 500 + b"]" * 500 + b"]", 501),
    (b'["\\\\\\"]' + b"]" * 500 + b'\\n",' + b"[" * 500 + b"]" * 500 + b"]", 501),
])  # fmt: skip
def test_levels_are_counted_outside_of_strings(raw: bytes, expected: int) -> None:
    assert levels(raw) == expected
    json.loads(raw)  # otherwise the expectation means nothing


def test_json_that_can_be_read_can_be_written() -> None:
    for value in (nested(MAX_LEVELS), [[nested(MAX_LEVELS - 2)]], {"é": nested(300)}):
        assert read_json(write_json(value)) == value
        assert json.loads(write_json(value, sort_keys=True)) == value
    with pytest.raises(HTTPError, match="nested too deeply"):
        read_json(write_json(nested(MAX_LEVELS + 1)))
    with pytest.raises(HTTPError, match=r"not JSON|nested too deeply"):  # depends on orjson
        read_json(b"[" * 5000 + b"]" * 5000)
    assert write_json({"a": np.arange(3)}) == b'{"a":[0,1,2]}'
    with pytest.raises(TypeError):
        write_json(object())


DEEP_FIELDS = [
    ("create_session", "user_metadata"), ("create_session", "tags"), ("create_session", "x"),
    ("create_model", "user_metadata"), ("create_model", "lora_config"),
    ("create_model", "optimizer_config"), ("load_weights", "user_metadata"),
    ("save_weights", "user_metadata"), ("save_weights", "age_encryption_recipients"),
    ("save_weights_for_sampler", "x"), ("forward_backward", "forward_backward_input"),
    ("forward", "forward_input"), ("optim_step", "adam_params"), ("asample", "prompt"),
    ("asample", "sampling_params"), ("asample", "target_prompt_logprobs"),
    ("sessions/search", "user_metadata"), ("sessions/search", "cursor"),
    ("sessions/search", "statuses"), ("sessions/search", "project_ids"), ("telemetry", "events"),
    ("copy_weights", "x"), ("weights_info", "tinker_path"), ("retrieve_futures", "target"),
    ("retrieve_futures", "retrieved_request_ids"), ("retrieve_future", "request_id"),
    ("cancel_future", "request_id"), ("session_heartbeat", "session_id"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "field"), DEEP_FIELDS)
def test_deeply_nested_json_is_never_a_failure_of_the_server(
    api: Api, route: str, field: str
) -> None:
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    body = {"session_id": session, "model_id": model, "seq_id": 1, "model_seq_id": 5, "path": "p"}
    body.update(base_model="deterministic", sampling_session_id=sampler)
    for depth in (1, 250, 300, MAX_LEVELS - 1):
        for value in (nested(depth), [nested(depth - 1)]):
            answer = api.client.post(
                f"/api/v1/{route}",
                data=text_of({**body, field: value}),
                content_type="application/json",
            )
            assert answer.status_code < 500, answer.text
    for depth in (MAX_LEVELS, 700, 976, 1000, 1022):
        raw = b'{"%s":%s1%s}' % (field.encode(), b'{"a":' * depth, b"}" * depth)
        assert "nested too deeply" in refused(api, route, raw)
    assert refused(api, route, b'{"a":' * 3000)


def lists(api: Api, session: str, run: str) -> Iterator[Any]:
    yield api.post("sessions/search")
    for path in ("sessions", f"sessions/{session}", "training_runs", f"training_runs/{run}",
                 "checkpoints", f"training_runs/{run}/checkpoints"):  # fmt: skip
        yield api.get(path)


def test_the_deepest_accepted_metadata_is_shown_by_every_list(tmp_path: Path) -> None:
    deepest = nested(MAX_LEVELS - 1)
    for _ in range(2):  # the second time with what the first pass stored
        with serving(tmp_path) as api:
            made = api.post("create_session", user_metadata=nested(300))
            session = str(made["session_id"])
            run = str(api.result(api.submit_model(session, user_metadata=nested(300)))["model_id"])
            raw = text_of({"model_id": run, "seq_id": 1, "path": "a", "user_metadata": deepest})
            saved = api.client.post(
                "/api/v1/save_weights", data=raw, content_type="application/json"
            )
            assert "path" in api.result(saved.get_json())
            shown = [str(answer) for answer in lists(api, session, run)]
            assert sum(str(nested(300)) in text for text in shown) >= 6


def test_a_client_reads_lists_with_the_deepest_metadata() -> None:
    deepest: Any = nested(MAX_LEVELS - 1)
    with LocalServer(DeterministicEngine()) as server, ServiceClient(base_url=server.url) as client:
        trainer = client.create_lora_training_client("deterministic")
        server._backend.store._db.execute(
            ("UPDATE runs SET user_metadata = ?", json.dumps(deepest))
        )
        rest = client.create_rest_client()
        assert rest.get_training_run(trainer.model_id).result().user_metadata == deepest
        (listed,) = rest.list_training_runs().result().training_runs
        assert listed.user_metadata == deepest


@pytest.mark.parametrize("profile", PROFILES)
def test_imitated_servers_have_bounds_too(profile: str) -> None:
    with ProfiledServer(DeterministicEngine(), profile=profile) as server:
        import requests

        with requests.Session() as http:
            http.headers.update({"X-API-Key": "tml-x", "Content-Type": "application/json"})
            for depth in (300, MAX_LEVELS - 1, MAX_LEVELS, 1000):
                body = {"tags": [], "sdk_version": "1", "user_metadata": nested(depth)}
                if depth == 1000:
                    raw = b'{"user_metadata":%s1%s}' % (b'{"a":' * depth, b"}" * depth)
                else:
                    raw = text_of(body)
                answer = http.post(f"{server.url}/api/v1/create_session", data=raw, timeout=20)
                assert (answer.status_code >= 400) == (depth >= MAX_LEVELS), answer.text
                assert answer.status_code < 500
            for path in ("sessions", "training_runs", "checkpoints"):
                assert http.get(f"{server.url}/api/v1/{path}", timeout=20).status_code != 500


def test_metadata_of_an_older_version_that_no_response_can_show_is_left_out(tmp_path: Path) -> None:
    with serving(tmp_path) as api:
        session = api.session()
        run = str(api.result(api.submit_model(session))["model_id"])
        api.save(run, 1, "a")
        deep = json.dumps({"deep": nested(900), "b": 1})
        database = api.backend.store._db  # type: ignore[attr-defined]
        facts = json.dumps({"user_metadata": nested(900)})
        database.execute(("UPDATE sessions SET facts = ?", facts))
        database.execute(("UPDATE runs SET user_metadata = ?", deep))
        database.execute(("UPDATE checkpoints SET user_metadata = ?", deep))
    with serving(tmp_path) as api:
        answers = list(lists(api, session, run))
        assert answers[3]["training_runs"][0]["user_metadata"] == {"b": 1}
        assert answers[0]["sessions"][0]["user_metadata"] is None
        assert answers[5]["checkpoints"][0]["user_metadata"] == {"b": 1}


# What is kept


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("create_session", {"user_metadata": {"a": "x" * 70_000}}),
        ("create_session", {"tags": ["x" * 70_000]}),
        ("create_model", {"user_metadata": {"a": "x" * 70_000}}),
        ("create_session", {"display_name": "x" * 10_001}),
        ("create_session", {"project_id": "x" * 10_001}),
        ("create_sampling_session", {"base_model": "x" * 10_001}),
        ("sessions/search", {"session_id": "x" * 10_001}),
    ],
)
def test_data_that_is_too_large_to_store_is_refused(
    api: Api, route: str, body: Dict[str, Any]
) -> None:
    session = api.session()
    complete = {"session_id": session, "model_seq_id": 0, "base_model": "deterministic"}
    complete["sampling_session_seq_id"] = 0
    assert "at most" in api.post(route, 400, **{**complete, **body})["detail"]


def test_metadata_of_a_usual_size_is_kept(api: Api) -> None:
    made = api.post("create_session", user_metadata={"a": "x" * 60_000})
    found = api.get(f"sessions/{made['session_id']}")
    assert found["user_metadata"] == {"a": "x" * 60_000}


def test_a_long_reason_for_an_end_is_truncated_and_not_refused(api: Api) -> None:
    session = api.session()
    api.post(f"sessions/{session}/finish", detail="x" * 100_000, reason={"type": "errored"})
    (found,) = api.post("sessions/search", session_id=session)["sessions"]
    assert found["status"]["detail"] == "x" * 2000


def test_a_long_idempotency_key_is_refused(api: Api) -> None:
    for size, status in ((256, 200), (257, 400)):
        answer = api.client.post(
            "/api/v1/create_session", json={}, headers={"X-Idempotency-Key": "k" * size}
        )
        assert answer.status_code == status


def test_telemetry_in_megabytes_is_refused(api: Api) -> None:
    event = {"event": "GENERIC_EVENT", "event_id": "e", "event_session_index": 0}
    event.update(severity="INFO", timestamp="2026-01-01T00:00:00Z", event_name="n")
    body: Dict[str, Any] = dict.fromkeys(("platform", "sdk_version", "session_id"), "x")
    body["process_uuid"] = "p"
    small, large = [{**event, "event_data": {"a": "x" * n}} for n in (1000, 1 << 20)]
    api.post("telemetry", **body, events=[small])
    assert "fewer events" in api.post("telemetry", 413, **body, events=[large])["detail"]


# What is asked for


@pytest.fixture
def sampler(api: Api) -> str:
    return api.sampler(api.session())


@pytest.mark.parametrize("count", [1025, 3_000_000, 1 << 31, (1 << 64) - 1, 1e30])
def test_more_samples_than_the_server_draws_are_refused_immediately(
    api: Api, sampler: str, count: float
) -> None:
    refusal = api.post("asample", 400, **api.sample_body(sampler, 0, num_samples=count))["detail"]
    assert "num_samples" in refusal
    made = api.submit_sample(sampler, 0, num_samples=1024, sampling_params={"max_tokens": 1})
    assert len(made["sample_sequence_ids"]) == 1024
    assert len(api.result(made)["sequences"]) == 1024


def test_the_bound_on_samples_can_be_set(tmp_path: Path) -> None:
    with serving(tmp_path, limits=SamplingLimits(max_num_samples=2)) as api:
        sampler = api.sampler(api.session())
        api.submit_sample(sampler, 0, num_samples=2)
        body = api.sample_body(sampler, 1, num_samples=3)
        assert "at most 2" in api.post("asample", 400, **body)["detail"]


@pytest.mark.parametrize(
    "changes",
    [
        {"topk_prompt_logprobs": 10**9},
        {"topk_sample_logprobs": 10**9},
        {"prompt_alt_tokens_k": 10**9},
        {"topk_prompt_logprobs": (1 << 64) - 1},
        {"sampling_params": {"stop": ["x"] * 1025}},
        {"sampling_params": {"stop": [1] * 1025}},
        {"sampling_params": {"max_tokens": 1.5}},
        {
            "target_prompt_logprobs": {
                "data": [], "dtype": "int64", "shape": [2, 10**12],
                "sparse_crow_indices": [0, 0, 0], "sparse_col_indices": [],
            }
        },
    ],
)  # fmt: skip
def test_unbounded_results_are_refused(api: Api, sampler: str, changes: Dict[str, Any]) -> None:
    assert api.post("asample", 400, **api.sample_body(sampler, 0, **changes))["detail"]
    assert "sequences" in api.result(api.submit_sample(sampler, 0))  # the seq_id is still free


def test_many_tokens_times_many_candidates_are_refused(tmp_path: Path) -> None:
    engine = HeldEngine(vocab_size=60_000, context_length=100_000)
    with serving(tmp_path, engine) as api:
        sampler = api.sampler(api.session())
        for changes in (
            {"topk_sample_logprobs": 50_000, "sampling_params": {"max_tokens": 2000}},
            {"topk_sample_logprobs": 50_000, "num_samples": 1000},
            {"topk_sample_logprobs": 1000, "sampling_params": {}},
        ):
            body = api.sample_body(sampler, 0, **changes)
            assert "log-probabilities" in api.post("asample", 400, **body)["detail"]
        made = api.submit_sample(sampler, 0, topk_prompt_logprobs=50, topk_sample_logprobs=50)
        assert "sequences" in api.result(made)


def test_huge_tokens_and_seeds_are_accepted_or_refused(api: Api, sampler: str) -> None:
    huge = (1 << 64) - 1
    for number, changes in enumerate(
        [{"max_tokens": huge}, {"seed": huge}, {"seed": -(1 << 63)}, {"top_k": huge},
         {"temperature": 1e300}, {"temperature": 1e-300}, {"top_p": 1e-300}]
    ):  # fmt: skip
        params = {"max_tokens": 2, **changes}
        result = api.result(api.submit_sample(sampler, number, sampling_params=params))
        assert "sequences" in result, params


def test_a_sparse_input_that_stands_for_gigabytes_is_refused(api: Api) -> None:
    model = api.model()
    sparse = TensorData([], "float32", (3, 10**12), [0, 0, 0, 0], [])
    item = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": sparse})
    assert "dense" in api.submit_pass(model, 1, [item], expect=400, codec=PROTOBUF)["detail"]
    assert "loss_fn_outputs" in api.result(api.submit_pass(model, 2, [datum()]))


@pytest.mark.parametrize("rank", [4097, 10**9, (1 << 64) - 1])
def test_an_adapter_larger_than_any_model_is_refused(api: Api, rank: int) -> None:
    body = {"session_id": api.session(), "model_seq_id": 0, "base_model": "deterministic"}
    refusal = api.post("create_model", 400, **body, lora_config={"rank": rank})["detail"]
    assert "rank" in refusal


# Addresses and cursors


@pytest.mark.parametrize("route", ["training_runs", "checkpoints", "sessions"])
@pytest.mark.parametrize("name", ["limit", "offset"])
@pytest.mark.parametrize(
    "number", ["9" * 5000, "9" * 101, "-1", "1e3", "٣", " 1", "", "0x10", "\x00", "NaN"]
)
def test_limits_and_offsets_that_are_not_numbers_are_refused(
    api: Api, route: str, name: str, number: str
) -> None:
    assert name in api.get(f"{route}?{name}={quote(number)}", 400)["detail"]


@pytest.mark.parametrize("route", ["training_runs", "checkpoints", "sessions"])
def test_a_huge_limit_or_offset_is_an_empty_or_a_complete_page(api: Api, route: str) -> None:
    api.session()
    api.get(f"{route}?limit={'9' * 100}")
    assert api.get(f"{route}?offset={'9' * 100}")[route] == []


@pytest.mark.parametrize(
    "instant",
    [
        "0001-01-01T00:00:00+10:00",
        "9999-12-31T23:59:59-10:00",
        "0000-01-01T00:00:00Z",
        "2026-01-01T00:00:00+99:99",
        "9" * 9000,
        "",
        "\x00",
    ],
)
def test_a_cursor_that_is_not_an_instant_is_refused(api: Api, instant: str) -> None:
    cursor = {"last_created_at": instant, "last_session_id": "x"}
    assert "not an ISO 8601 time" in api.post("sessions/search", 400, cursor=cursor)["detail"]


@pytest.mark.parametrize(
    "instant", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "2026-01-01", "1969-12-31T23:59:59"]
)
def test_a_cursor_at_the_ends_of_the_calendar_is_read(api: Api, instant: str) -> None:
    cursor = {"last_created_at": instant, "last_session_id": "x"}
    assert "sessions" in api.post("sessions/search", cursor=cursor)


ODD_IDS: List[str] = [
    "..", "../..", "a/b", "\x00", "\ud800", "ü", "a\r\nX: y", "'; DROP TABLE runs;--",
    "x" * 9000, "%", "%s", "{0}", "", " ", "session:train:0", ":", "::::",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_IDS)
def test_ids_of_odd_characters_are_unknown_or_refused(api: Api, odd: str) -> None:
    address = quote(odd, safe="", errors="surrogatepass")
    for path in ("sessions/{}", "training_runs/{}", "training_runs/{}/checkpoints", "samplers/{}",
                 "training_runs/{}/checkpoints/weights/{}/archive",
                 "training_runs/x/checkpoints/{}/y/archive"):  # fmt: skip
        answer = api.client.get(f"/api/v1/{path.replace('{}', address)}")
        assert answer.status_code < 500, answer.text
    raw = json.dumps(odd).encode()
    session = api.session()
    model = api.model(session)
    for route, field in [
        ("session_heartbeat", "session_id"), ("create_model", "session_id"),
        ("create_model", "base_model"), ("get_info", "model_id"), ("optim_step", "model_id"),
        ("save_weights", "path"), ("load_weights", "path"), ("weights_info", "tinker_path"),
        ("copy_weights", "source_path"), ("asample", "sampling_session_id"),
        ("retrieve_future", "request_id"), ("cancel_future", "request_id"),
        ("unload_model", "model_id"), ("create_sampling_session", "model_path"),
        ("create_session", "display_name"), ("create_session", "project_id"),
    ]:  # fmt: skip
        rest = {"session_id": session, "model_id": model, "seq_id": 1, "model_seq_id": 1,
                "base_model": "deterministic", "sampling_session_seq_id": 1}  # fmt: skip
        rest.pop(field, None)
        body = json.dumps(rest)[:-1].encode() + b',"%s":%s}' % (field.encode(), raw)
        answer = api.client.post(f"/api/v1/{route}", data=body, content_type="application/json")
        assert answer.status_code < 500, (route, answer.text)
    for _ in lists(api, session, model):
        pass


# Compressed bodies


@pytest.mark.parametrize("profile", [None, "hosted", "skyrl-0.4"])
def test_a_few_bytes_that_stand_for_gigabytes_are_refused(profile: Any) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    block = bytes(1 << 20)
    bomb = b"".join(compressor.compress(block) for _ in range(300)) + compressor.flush()
    assert len(bomb) < 100_000
    settings = ServerSettings(max_body_bytes=1 << 20)
    import requests

    with ProfiledServer(DeterministicEngine(), profile=profile, settings=settings) as server:
        headers = {"Content-Encoding": "zstd", "X-API-Key": "tml-x"}
        for kind in (PROTOBUF.content_type, "application/json"):
            with requests.Session() as http:
                answer = http.post(
                    f"{server.url}/api/v1/forward_backward",
                    data=bomb,
                    headers={**headers, "Content-Type": kind},
                    timeout=20,
                )
            assert 400 <= answer.status_code < 500 or profile == "skyrl-0.4", answer.text
            if profile is None:
                assert answer.status_code == 413


@pytest.mark.parametrize(
    ("kind", "route", "repeated"),
    [
        (PROTOBUF.content_type, "forward_backward", b"\x1a\0"),  # empty datums
        (PROTOBUF.content_type, "forward", b"\x1a\x04\x0a\x02\x0a\0"),  # datums of one empty chunk
        ("application/json", "forward_backward", b"{},"),
        ("application/json", "forward", b"1,"),
        ("application/json", "create_session", b"[],"),
        ("application/json", "asample", b'{"a":1},'),
        ("application/json", "telemetry", b'"a",'),
    ],
)
def test_a_few_bytes_that_stand_for_millions_of_objects_are_refused(
    api: Api, kind: str, route: str, repeated: bytes
) -> None:
    size = 64 << 20
    bomb = zstandard.compress(repeated * (size // len(repeated)))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        answer = api.client.post(
            f"/api/v1/{route}",
            data=bomb,
            content_type=kind,
            headers={"Content-Encoding": "zstd"},
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413, answer.text
    assert "smaller" in answer.get_json()["detail"]
    assert peak < 3 * size


def test_a_chunk_of_millions_of_objects_within_one_datum_is_refused(api: Api) -> None:
    chunks = b"\x0a\x02\x0a\0" * (1 << 18)
    message = pb.ForwardBackwardRequest(model_id="m", seq_id=1)
    message.data.add().MergeFromString(chunks)
    with pytest.raises(HTTPError, match="more than 131072 datums"):
        check_messages(message.SerializeToString())
    shape = pb.Tensor(dtype=pb.INT64, shape=[1] * 1000, dense=bytes(8))
    del message.data[:]
    message.data.add().loss_fn_inputs["target_tokens"].CopyFrom(shape)
    sent = api.client.post(
        "/api/v1/forward_backward",
        data=message.SerializeToString(),
        content_type=PROTOBUF.content_type,
    )
    assert sent.status_code in (400, 404)


def field(number: int, content: bytes) -> bytes:
    """Encode a length-delimited protobuf field."""
    size = b""
    left = len(content)
    while left > 0x7F:
        size, left = size + bytes([left & 0x7F | 0x80]), left >> 7
    return bytes([number << 3 | 2]) + size + bytes([left]) + content


MANY = 1 << 20


@pytest.mark.parametrize(
    "content",
    [
        field(1, b"\x0a\0\x12\0" * MANY),  # a chunk that is alternately text and image
        field(1, field(2, field(4, b"\x08\1" * MANY))),  # dimensions of an image
        field(2, field(2, b"\x20\0" * (MANY + 1))),  # a shape
        field(2, field(2, field(4, bytes(MANY)))),  # a packed shape
        field(2, field(2, b"\x0a\0\x12\0" * MANY)),  # a tensor that is alternately dense and sparse
        field(2, field(2, field(2, b"\x0a\1x" * MANY))),
        field(3, b"\x0a\0\x12\0" * MANY),
        field(4, field(1, b"\x0a\1x" * (MANY + 1))),
    ],
)
def test_millions_of_fields_within_one_message_are_refused(content: bytes) -> None:
    raw = field(3, content)
    pb.ForwardBackwardRequest.FromString(raw)  # it is well-formed
    with pytest.raises(HTTPError, match="more than 1048576 fields"):
        check_messages(raw)


def test_millions_of_fields_within_the_settings_of_a_loss_are_refused() -> None:
    for raw in (field(5, b"\x0a\1x" * (MANY + 1)), field(7, field(2, b"\x12\0" * (MANY + 1)))):
        pb.ForwardBackwardRequest.FromString(raw)
        with pytest.raises(HTTPError, match="more than 1048576 fields"):
            check_messages(raw)


def test_as_many_small_messages_as_are_allowed_have_few_enough_fields() -> None:
    tensor = pb.Tensor(dtype=pb.INT64, shape=[1, 1], dense=bytes(8))
    inputs = pb.Datum(loss_fn_inputs={"a": tensor, "b": tensor})
    inputs.model_input.add().encoded_text.tokens = bytes(4)
    message = field(3, inputs.SerializeToString())
    check_messages(message * (MAX_MESSAGES // 4))


@pytest.mark.parametrize("raw", [b"\x1a", b"\x1a\xff\xff\xff\xff\x0f", b"\xff" * 30, b"\x0b\x1a\0"])
def test_a_malformed_message_is_left_to_the_parser(raw: bytes) -> None:
    check_messages(bytes(1 << 19))
    check_messages(b"\x0a\x02mm" * (1 << 16) + raw)


def test_a_batch_of_the_largest_usual_size_is_within_the_bounds() -> None:
    data = [datum() for _ in range(8192)]
    asked = ForwardBackwardRequest("m", 1, data, "cross_entropy")
    check_messages(bytes(PROTOBUF.encode_forward_backward(asked)) + b"\x0a\0" * 1000)
    check_values(bytes(JSON.encode_forward_backward(asked)))
