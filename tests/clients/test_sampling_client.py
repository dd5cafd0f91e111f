"""SamplingClient: its requests, what it makes of the answers, and sampling end to end."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, List

import numpy as np
import pytest
from support.scripted_server import PATIENCE_S, Answer, ScriptedServer
from support.tinker_routes import TinkerRoutes

from tinkex import RetryConfig, SamplingClient, ServiceClient, types
from tinkex.clients import sampling as sampling_client
from tinkex.errors import (
    BadRequestError,
    ClientClosedError,
    InvalidInputError,
    NoProgressError,
    NotFoundError,
    ResponseDecodeError,
    ResultExpiredError,
    RouteMissingError,
    UnprocessableEntityError,
    UnsupportedError,
)
from tinkex.wire.codec import Codec
from tinkex.wire.json_codec import JSON
from tinkex.wire.proto_codec import PROTOBUF

PROMPT = types.ModelInput.from_ints([1, 2, 3])
SAMPLER_ROUTE = "GET /api/v1/samplers/session-1:sample:0"


@pytest.fixture
def sampler(service: ServiceClient) -> SamplingClient:
    return service.create_sampling_client(base_model="deterministic")


@pytest.fixture
def scripted_sampler(scripted: ServiceClient) -> SamplingClient:
    return scripted.create_sampling_client(base_model="base")


# What is sent


def test_only_requested_fields_are_sent(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    response = scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    assert response.sequences[0].tokens == [5]
    assert routes.submitted("asample") == [
        {
            "num_samples": 1,
            "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "sampling_params": {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
            "prompt_logprobs": False,
            "type": "sample",
            "sampling_session_id": "session-1:sample:0",
            "seq_id": 0,
        }
    ]


def test_every_argument_is_sent(scripted_sampler: SamplingClient, routes: TinkerRoutes) -> None:
    routes.serve("retrieve_future", Answer(body={"error": "enough seen", "category": "user"}))
    params = types.SamplingParams(
        max_tokens=4, seed=7, stop=["\n"], temperature=0.5, top_k=3, top_p=0.9
    )
    target = types.TensorData.from_numpy(np.array([[1], [2]]))
    scripted_sampler.sample(PROMPT, 2, params, True, 3, 4, target, 5, 2).exception(PATIENCE_S)
    sent = routes.submitted("asample")[0]
    assert sent["num_samples"] == 2
    assert sent["sampling_params"] == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "max_tokens": 4,
        "seed": 7,
        "stop": ["\n"],
    }
    assert sent["prompt_logprobs"] is True
    assert sent["topk_prompt_logprobs"] == 3
    assert sent["topk_sample_logprobs"] == 4
    assert sent["target_prompt_logprobs"] == {"data": [1, 2], "dtype": "int64", "shape": [2, 1]}
    assert sent["prompt_alt_tokens_k"] == 5
    assert sent["prompt_logprobs_last_n"] == 2


def test_stability_is_recorded_on_request(scripted: ServiceClient, routes: TinkerRoutes) -> None:
    sampler = scripted.create_sampling_client(base_model="base", record_stability_info=True)
    sampler.sample(PROMPT).result(PATIENCE_S)
    sampler.compute_logprobs(PROMPT).exception(PATIENCE_S)
    copy = SamplingClient.from_sampler_handle(sampler.get_sampler_handle())
    copy.sample(PROMPT).result(PATIENCE_S)
    assert [b["record_stability_info"] for b in routes.submitted("asample")] == [True] * 3


def test_sparse_targets_are_sent_as_they_are(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    routes.serve("retrieve_future", Answer(body={"error": "enough seen", "category": "user"}))
    sparse = types.TensorData([7, -1, 9], "int64", (2, 50), [0, 1, 3], [4, 0, 49])
    scripted_sampler.sample(PROMPT, target_prompt_logprobs=sparse).exception(PATIENCE_S)
    assert routes.submitted("asample")[0]["target_prompt_logprobs"] == {
        "data": [7, -1, 9],
        "dtype": "int64",
        "shape": [2, 50],
        "sparse_crow_indices": [0, 1, 3],
        "sparse_col_indices": [4, 0, 49],
    }


def test_each_sample_has_its_own_seq_id(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda _: scripted_sampler.sample(PROMPT), range(40)))
    for future in as_completed(futures, PATIENCE_S):
        future.result(0)
    assert sorted(body["seq_id"] for body in routes.submitted("asample")) == list(range(40))


BAD_CALLS = {
    "text": lambda s: s.sample("hello"),
    "bare ints": lambda s: s.sample([1, 2, 3]),
    "no tokens": lambda s: s.sample(types.ModelInput.from_ints([])),
    "no chunks": lambda s: s.compute_logprobs(types.ModelInput.empty()),
    "no samples": lambda s: s.sample(PROMPT, 0),
    "half a sample": lambda s: s.sample(PROMPT, 1.5),
    "samples in words": lambda s: s.sample(PROMPT, "three"),
    "a dict of parameters": lambda s: s.sample(PROMPT, 1, {"temperature": 1}),
    "no new tokens": lambda s: s.sample(PROMPT, 1, types.SamplingParams(max_tokens=0)),
    "a cold temperature": lambda s: s.sample(PROMPT, 1, types.SamplingParams(temperature=-1)),
    "a NaN temperature": lambda s: s.sample(
        PROMPT, 1, types.SamplingParams(temperature=float("nan"))
    ),
    "top_p of 0": lambda s: s.sample(PROMPT, 1, types.SamplingParams(top_p=0.0)),
    "top_k of 0": lambda s: s.sample(PROMPT, 1, types.SamplingParams(top_k=0)),
    "mixed stops": lambda s: s.sample(PROMPT, 1, types.SamplingParams(stop=["a", 1])),
    "a negative top-k": lambda s: s.sample(PROMPT, topk_prompt_logprobs=-1),
    "a top-k in words": lambda s: s.sample(PROMPT, topk_sample_logprobs="five"),
    "targets in a list": lambda s: s.sample(PROMPT, target_prompt_logprobs=[[1]]),
    "a row of targets per token": lambda s: s.sample(
        PROMPT, target_prompt_logprobs=types.TensorData([1, 2, 3], "int64", (3, 1))
    ),
    "flat targets": lambda s: s.sample(
        PROMPT, target_prompt_logprobs=types.TensorData([1, 2], "int64")
    ),
    "targets that are no tokens": lambda s: s.sample(
        PROMPT, target_prompt_logprobs=types.TensorData([1.0, 2.0], "float32", (2, 1))
    ),
    "fewer than no alternatives": lambda s: s.sample(PROMPT, prompt_alt_tokens_k=-1),
    "last n without logprobs": lambda s: s.sample(PROMPT, prompt_logprobs_last_n=1),
    "last n beyond the prompt": lambda s: s.compute_logprobs(PROMPT, 3),
    "last 0": lambda s: s.compute_logprobs(PROMPT, 0),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_input_is_refused_immediately_and_sends_nothing(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, call: str
) -> None:
    before = routes.count()
    with pytest.raises(InvalidInputError):
        BAD_CALLS[call](scripted_sampler)
    assert routes.count() == before
    scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    assert routes.submitted("asample")[0]["seq_id"] == 0


def test_a_seed_that_json_cannot_hold_is_an_input_error(scripted_sampler: SamplingClient) -> None:
    params = types.SamplingParams(seed=2**70)
    with pytest.raises(InvalidInputError, match="JSON"):
        scripted_sampler.sample(PROMPT, 1, params).result(PATIENCE_S)


# What the client makes of the answers


@pytest.mark.parametrize(
    "logprobs", [[None, -0.5, -0.25], [-0.5, -0.25]], ids=["n values", "n - 1 values"]
)
def test_there_is_one_prompt_logprob_per_token_on_every_server(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, logprobs: List[Any]
) -> None:
    answer = {
        "sequences": [{"stop_reason": "length", "tokens": [5], "logprobs": [-1.0]}],
        "prompt_logprobs": logprobs,
    }
    routes.serve("retrieve_future", Answer(body=answer))
    assert scripted_sampler.compute_logprobs(PROMPT).result(PATIENCE_S) == [None, -0.5, -0.25]


@pytest.mark.parametrize("found", [0, 1, 3])
def test_another_number_of_sequences_is_an_error(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, found: int
) -> None:
    sequence = {"stop_reason": "length", "tokens": [5], "logprobs": [-1.0]}
    routes.serve("retrieve_future", Answer(body={"sequences": [sequence] * found}))
    with pytest.raises(ResponseDecodeError, match=rf"{found} sequences?; num_samples is 2"):
        scripted_sampler.sample(PROMPT, 2).result(PATIENCE_S)
    (one,) = scripted_sampler.sample_many([PROMPT], num_samples=2, on_error="yield")
    assert isinstance(one.error, ResponseDecodeError)


def test_prompt_logprobs_need_no_sequences(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    answer = {"sequences": [], "prompt_logprobs": [None, -0.5, -0.25]}
    routes.serve("retrieve_future", Answer(body=answer))
    assert scripted_sampler.compute_logprobs(PROMPT).result(PATIENCE_S) == [None, -0.5, -0.25]


def test_requested_prompt_logprobs_must_be_in_the_response(
    scripted_sampler: SamplingClient,
) -> None:
    with pytest.raises(ResponseDecodeError, match=r"no prompt logprobs.* 3 prompt tokens"):
        scripted_sampler.sample(PROMPT, include_prompt_logprobs=True).result(PATIENCE_S)
    one = types.ModelInput.from_ints([1])  # a single token has no logprob
    assert scripted_sampler.sample(one, include_prompt_logprobs=True).result(PATIENCE_S).sequences


@pytest.mark.parametrize("option", ["topk_prompt_logprobs", "topk_sample_logprobs"])
def test_requested_likeliest_tokens_must_be_in_the_response(
    scripted_sampler: SamplingClient, option: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"ignored {option}"):
        scripted_sampler.sample(PROMPT, **{option: 2}).result(PATIENCE_S)


def test_a_server_that_sends_no_prompt_logprobs_is_reported(
    scripted_sampler: SamplingClient,
) -> None:
    with pytest.raises(ResponseDecodeError, match="no prompt logprobs"):
        scripted_sampler.compute_logprobs(PROMPT).result(PATIENCE_S)


def test_sequences_carry_the_ids_of_the_submission(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    accept = routes.accept
    routes.serve(
        "asample",
        lambda r: Answer(body={**accept(r).body, "sample_sequence_ids": ["q-1"]}),
        accept,
    )
    named = scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    unnamed = scripted_sampler.sample(PROMPT).result(PATIENCE_S)
    assert [r.sequences[0].sequence_id for r in (named, unnamed)] == ["q-1", None]


SEQUENCES = {"sequences": [{"stop_reason": "length", "tokens": [5], "logprobs": [-1.0]}]}


def answer_of(**parts: Any) -> Answer:
    return Answer(body={**SEQUENCES, **parts})


def test_the_last_n_logprobs_may_come_alone_or_after_nulls(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    prompt = types.ModelInput.from_ints([1, 2, 3, 4])
    routes.serve(
        "retrieve_future",
        answer_of(prompt_logprobs=[None, None, None, -0.5]),
        answer_of(prompt_logprobs=[-0.5]),
    )
    for _ in range(2):
        logprobs = scripted_sampler.compute_logprobs(prompt, 1).result(PATIENCE_S)
        assert logprobs == [None, None, None, -0.5]


def test_unrequested_logprobs_indicate_an_old_server(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    routes.serve("retrieve_future", answer_of(prompt_logprobs=[None, -0.5, -0.25]))
    with pytest.raises(UnsupportedError, match="prompt_logprobs_last_n: it is too old") as caught:
        scripted_sampler.compute_logprobs(PROMPT, 1).result(PATIENCE_S)
    assert not isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt_alt_tokens_k": 2},
        {"target_prompt_logprobs": types.TensorData([1, 2], "int64", (2, 1))},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_missing_parts_of_a_response_indicate_an_old_server(
    scripted_sampler: SamplingClient, asked: Any
) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(asked))):
        scripted_sampler.sample(PROMPT, **asked).result(PATIENCE_S)


def forbidden(*names: str) -> Answer:
    """How a strict server refuses unknown fields."""
    detail = [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
        for name in names
    ]
    return Answer(422, {"detail": detail})


def test_a_refusal_of_requested_fields_indicates_an_old_server(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    refusal = forbidden("prompt_alt_tokens_k", "topk_sample_logprobs")
    routes.serve("asample", refusal, forbidden("num_samples"), refusal)
    with pytest.raises(UnsupportedError) as caught:
        scripted_sampler.sample(PROMPT, topk_sample_logprobs=3, prompt_alt_tokens_k=1).result(
            PATIENCE_S
        )
    assert "refuses topk_sample_logprobs and prompt_alt_tokens_k:" in caught.value.message
    assert caught.value.status == 422
    assert isinstance(caught.value.__cause__, UnprocessableEntityError)
    for _ in range(2):  # the refused fields were not requested here
        with pytest.raises(UnprocessableEntityError):
            scripted_sampler.sample(PROMPT).result(PATIENCE_S)


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=lambda codec: codec.name)
def test_every_part_of_a_response_is_read_in_either_encoding(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, codec: Codec
) -> None:
    target = types.TensorData([-0.5, -1.5], "float32", (2, 9), [0, 1, 2], [3, 8])
    draws = types.PromptAltTokens(
        types.TensorData([[7, 8], [9, 7]], "int64"),
        types.TensorData([[-0.1, -0.2], [-0.3, -0.4]], "float32"),
    )
    table = types.TopkLogprobs(np.array([[7], [8]], np.int32), np.array([[-0.1], [-0.2]], "f4"))
    sent = types.SampleResponse(
        [types.SampledSequence("stop", np.array([5], np.int32), np.array([-1.0], np.float32))],
        np.array([np.nan, np.nan, -0.25], np.float32),
        table,
        target,
        3,
        draws,
    )
    body = codec.encode_samples(sent)
    routes.serve("retrieve_future", Answer(body=body, content_type=codec.content_type))
    asked = types.TensorData([1, 2], "int64", (2, 9), [0, 1, 2], [3, 8])
    got = scripted_sampler.sample(
        PROMPT,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=1,
        target_prompt_logprobs=asked,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=1,
    ).result(PATIENCE_S)
    assert got.prompt_logprobs == [None, None, -0.25]
    assert got.topk_prompt_logprobs == [
        None,
        [(7, pytest.approx(-0.1))],
        [(8, pytest.approx(-0.2))],
    ]
    assert got.target_prompt_logprobs == target
    assert got.target_prompt_logprobs is not None
    assert got.target_prompt_logprobs.is_sparse
    assert got.prompt_alt_tokens is not None
    assert got.prompt_alt_tokens.tokens == draws.tokens
    assert got.prompt_alt_tokens.logprobs == draws.logprobs
    assert got.prompt_cache_hit_tokens == 3


def test_logprobs_that_are_not_numbers_are_warned_about_once(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, caplog: pytest.LogCaptureFixture
) -> None:
    routes.serve("retrieve_future", answer_of(prompt_logprobs=[None, -0.5, None]))
    for _ in range(2):
        logprobs = scripted_sampler.compute_logprobs(PROMPT).result(PATIENCE_S)
        assert logprobs == [None, -0.5, None]
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "token id beyond the model's vocabulary" in warnings[0]


# Retries and limits of one client


def test_a_lost_sample_is_submitted_again_under_a_new_seq_id(
    scripted_sampler: SamplingClient, routes: TinkerRoutes
) -> None:
    ids = itertools.count()

    def accept(received: Any) -> Answer:
        accepted = routes.accept(received)
        return Answer(body={**accepted.body, "sample_sequence_ids": [f"q-{next(ids)}"]})

    routes.serve("asample", accept)
    routes.serve("retrieve_future", Answer(410), routes.retrieve)
    config = RetryConfig(retry_delay_base=0.001)
    sampler = SamplingClient(scripted_sampler._runtime, "s", retry_config=config)
    response = sampler.sample(PROMPT).result(PATIENCE_S)
    assert [b["seq_id"] for b in routes.submitted("asample")] == [0, 1]
    assert response.sequences[0].sequence_id == "q-1"  # from the attempt that gave the result


@pytest.mark.parametrize("switch", ["the caller", "the server"])
@pytest.mark.usefixtures("without_key")
def test_a_lost_sample_is_an_error_if_retries_are_off(
    scripted: ServiceClient, routes: TinkerRoutes, switch: str
) -> None:
    routes.serve("retrieve_future", Answer(410))
    by_caller = switch == "the caller"
    routes.serve("client/config", Answer(body={"sample_no_retries": not by_caller}))
    sampler = scripted.create_sampling_client(
        base_model="base", retry_config=RetryConfig(enable_retry_logic=not by_caller)
    )
    with pytest.raises(ResultExpiredError):
        sampler.sample(PROMPT).result(PATIENCE_S)
    assert len(routes.submitted("asample")) == 1


def test_a_client_may_have_its_own_cap_on_samples_in_flight(
    scripted: ServiceClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    release = threading.Event()
    one_by_one = scripted.create_sampling_client(
        base_model="base", retry_config=RetryConfig(max_connections=2)
    )
    free = scripted.create_sampling_client(base_model="base")
    routes.serve("retrieve_future", lambda r: dataclasses.replace(routes.retrieve(r), hold=release))
    futures = [one_by_one.sample(PROMPT) for _ in range(6)]
    server.wait_for("POST /api/v1/retrieve_future", 2)
    assert [f.status().state for f in futures[2:]] == ["queued"] * 4
    others = [free.sample(PROMPT) for _ in range(3)]
    server.wait_for("POST /api/v1/retrieve_future", 5)  # the cap does not hold up other clients
    futures[4].cancel()
    futures[0].cancel()  # the next sample takes its place immediately
    server.wait_for("POST /api/v1/asample", 6)
    release.set()
    for future in [*others, *(futures[i] for i in (1, 2, 3, 5))]:
        assert future.result(PATIENCE_S).sequences
    assert len(routes.submitted("asample")) == 8  # all but the one cancelled in the queue


def test_many_samples_behind_a_cap_all_fail_at_close(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    routes.serve("asample", Answer(hold=threading.Event()))
    sampler = scripted.create_sampling_client(
        base_model="base", retry_config=RetryConfig(max_connections=1)
    )
    futures = [sampler.sample(PROMPT) for _ in range(3000)]  # deeper than Python can recurse
    scripted.close()
    assert {type(future.exception(0)) for future in futures} == {ClientClosedError}


def test_a_sample_without_progress_fails_after_the_timeout(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    routes.serve("retrieve_future", Answer(hold=threading.Event()))
    sampler = scripted.create_sampling_client(
        base_model="base", retry_config=RetryConfig(progress_timeout=0.1)
    )
    with pytest.raises(NoProgressError):
        sampler.sample(PROMPT).result(PATIENCE_S)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_connections": 0},
        {"max_connections": 1.5},
        {"progress_timeout": 0.0},
        {"retry_delay_base": -1.0},
        {"retry_delay_max": float("nan")},
        {"jitter_factor": 1.5},
    ],
)
def test_limits_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetryConfig(**wrong)


def test_retry_delays_grow_vary_and_end() -> None:
    config = RetryConfig(retry_delay_base=1.0, retry_delay_max=3.0, jitter_factor=0.5)
    assert [config.delay_s(times, 0.5) for times in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert config.delay_s(0, 0.0) == 0.5
    assert config.delay_s(2, 1.0) == 3.0  # never longer than the maximum
    assert config.delay_s(5, 0.5) is None
    assert RetryConfig(enable_stuck_detection=False).no_progress_timeout_s is None


def test_a_retry_config_of_another_type_is_refused(scripted: ServiceClient) -> None:
    with pytest.raises(InvalidInputError, match="retry_config is a dict"):
        scripted.create_sampling_client(
            base_model="base",
            retry_config={"max_connections": 1},  # type: ignore[arg-type]
        )


# Clones


@pytest.mark.usefixtures("without_key")
def test_a_clone_numbers_its_samples_in_the_block_that_the_server_assigns(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    routes.serve("client/config", Answer(body={"sample_join_sampling_session": True}))
    routes.serve("join_sampling_session", Answer(body={"client_counter": 3}))
    clone = SamplingClient.from_sampler_handle(scripted_sampler.get_sampler_handle())
    assert server.requests("POST /api/v1/join_sampling_session") == []  # not yet
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda _: clone.sample(PROMPT), range(20)))
    for future in futures:
        future.result(PATIENCE_S)
    numbers = sorted(body["seq_id"] for body in routes.submitted("asample"))
    assert numbers == [3 * 10**9 + n for n in range(20)]
    assert routes.submitted("join_sampling_session") == [
        {"sampling_session_id": "session-1:sample:0", "type": "join_sampling_session"}
    ]


@pytest.mark.parametrize("counter", [0, -1, None, "many", 10**30])
@pytest.mark.usefixtures("without_key")
def test_a_clone_without_a_usable_number_fails_and_joins_again(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, counter: Any
) -> None:
    routes.serve("client/config", Answer(body={"sample_join_sampling_session": True}))
    routes.serve(
        "join_sampling_session",
        Answer(body={"client_counter": counter}),
        Answer(body={"client_counter": 1}),
    )
    clone = SamplingClient.from_sampler_handle(scripted_sampler.get_sampler_handle())
    with pytest.raises(ResponseDecodeError, match="client_counter"):
        clone.sample(PROMPT).result(PATIENCE_S)
    clone.sample(PROMPT).result(PATIENCE_S)
    assert [b["seq_id"] for b in routes.submitted("asample")] == [10**9]


@pytest.mark.parametrize("flag", [True, False])
def test_a_clone_takes_a_random_block_if_the_server_assigns_none(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, flag: bool
) -> None:
    routes.serve("client/config", Answer(body={"sample_join_sampling_session": flag}))
    for _ in range(2):
        clone = SamplingClient.from_sampler_handle(scripted_sampler.get_sampler_handle())
        clone.sample(PROMPT).result(PATIENCE_S)
    blocks = {body["seq_id"] // 10**9 for body in routes.submitted("asample")}
    assert len(blocks) == 2
    assert 0 not in blocks


# Facts about the sampler


def test_the_base_model_of_a_checkpoint_comes_from_its_weights_if_the_sampler_reports_none(
    scripted: ServiceClient, routes: TinkerRoutes
) -> None:
    info = {"base_model": "base", "is_lora": True}
    routes.serve("weights_info", Answer(body=info))
    sampler = scripted.create_sampling_client("tinker://x/sampler_weights/a")
    assert [sampler.get_base_model(), sampler.get_base_model()] == ["base", "base"]
    assert routes.submitted("weights_info") == [{"tinker_path": "tinker://x/sampler_weights/a"}]


def test_the_base_model_is_requested_once(scripted: ServiceClient, server: ScriptedServer) -> None:
    info = {"sampler_id": "session-1:sample:0", "base_model": "base"}
    server.on(SAMPLER_ROUTE, Answer(body=info))
    known = scripted.create_sampling_client(base_model="given")
    assert known.get_base_model() == "given"
    assert server.requests(SAMPLER_ROUTE) == []
    asked = scripted.create_sampling_client("tinker://x/sampler_weights/a")
    assert [asked.get_base_model(), asked.get_base_model()] == ["base", "base"]
    assert len(server.requests(SAMPLER_ROUTE)) == 1


def test_the_tokenizer_comes_from_the_server_or_from_the_known_base_model(
    scripted: ServiceClient, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: List[Any] = []
    monkeypatch.setattr(sampling_client, "load_tokenizer", lambda *a: asked.append(a))
    info = {"sampler_id": "session-1:sample:0", "base_model": "base", "tokenizer_id": "org/tok"}
    server.on(SAMPLER_ROUTE, Answer(body=info), Answer(404, {"detail": "no such route"}))
    scripted.create_sampling_client(base_model="given").get_tokenizer()
    scripted.create_sampling_client(base_model="given").get_tokenizer()
    assert asked == [("base", "org/tok"), ("given",)]
    with pytest.raises(RouteMissingError, match="weights_info"):
        scripted.create_sampling_client("tinker://x/s").get_tokenizer()


def test_samples_do_not_wait_for_each_other(
    scripted_sampler: SamplingClient, routes: TinkerRoutes, server: ScriptedServer
) -> None:
    never = threading.Event()
    routes.serve("asample", Answer(hold=never), routes.accept)
    stuck = scripted_sampler.sample(PROMPT)
    server.wait_for("POST /api/v1/asample")
    assert scripted_sampler.sample(PROMPT).result(PATIENCE_S).sequences
    assert not stuck.done()


# End to end


def test_samples_are_batched_and_repeatable_by_their_seed(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=6, seed=3)
    first = sampler.sample(PROMPT, 3, params).result(PATIENCE_S)
    again = sampler.sample(PROMPT, 3, params).result(PATIENCE_S)
    assert len(first.sequences) == 3
    assert [s.tokens for s in first.sequences] == [s.tokens for s in again.sequences]
    other = sampler.sample(PROMPT, 3, types.SamplingParams(max_tokens=6, seed=4))
    assert [s.tokens for s in first.sequences] != [
        s.tokens for s in other.result(PATIENCE_S).sequences
    ]
    for sequence in first.sequences:
        assert sequence.stop_reason in ("length", "stop")
        assert sequence.tokens_np.dtype == np.int32
        assert sequence.logprobs_np is not None
        assert sequence.logprobs_np.shape == sequence.tokens_np.shape
    assert len({s.sequence_id for s in first.sequences}) == 3


def test_greedy_samples_are_all_the_same(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=5, temperature=0.0)
    sequences = sampler.sample(PROMPT, 4, params).result(PATIENCE_S).sequences
    assert len({tuple(s.tokens) for s in sequences}) == 1


def test_logprobs_of_a_prompt_are_those_of_training(
    service: ServiceClient, sampler: SamplingClient
) -> None:
    trainer = service.create_lora_training_client("deterministic")
    tokens = [5, 17, 900, 3, 8]
    data = types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:]})
    output = trainer.forward([data], "cross_entropy").result(PATIENCE_S)
    expected = output.loss_fn_outputs[0]["logprobs"].tolist()
    prompt = types.ModelInput.from_ints(tokens)
    assert sampler.compute_logprobs(prompt).result(PATIENCE_S) == [None, *expected]
    sampled = sampler.sample(
        prompt, 1, types.SamplingParams(max_tokens=1), True, topk_prompt_logprobs=2
    ).result(PATIENCE_S)
    assert sampled.prompt_logprobs == [None, *expected]
    assert sampled.topk_prompt_logprobs is not None
    assert len(sampled.topk_prompt_logprobs) == 5
    assert sampled.topk_prompt_logprobs[0] is None


def test_many_samples_in_parallel(sampler: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=3)
    futures = [sampler.sample(types.ModelInput.from_ints([n + 1]), 1, params) for n in range(150)]
    alone = sampler.sample(types.ModelInput.from_ints([150]), 1, params).result(PATIENCE_S)
    results = [future.result(PATIENCE_S) for future in futures]
    assert [len(r.sequences) for r in results] == [1] * 150
    assert results[149].sequences[0].tokens == alone.sequences[0].tokens


def test_refusals_by_the_server_are_typed_and_sampling_continues(sampler: SamplingClient) -> None:
    with pytest.raises(BadRequestError, match="token 5000"):
        sampler.sample(types.ModelInput.from_ints([5000])).result(PATIENCE_S)
    with pytest.raises(BadRequestError, match="64"):
        sampler.sample(types.ModelInput.from_ints([1] * 80)).result(PATIENCE_S)
    response = sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2)).result(PATIENCE_S)
    assert len(response.sequences[0].tokens) <= 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, InvalidInputError),
        ({"model_path": "tinker://x/y", "base_model": "b"}, BadRequestError),  # not served
        ({"model_path": "weights/a"}, InvalidInputError),
        ({"base_model": ""}, InvalidInputError),
        ({"base_model": "nobody/has-this"}, BadRequestError),
        ({"model_path": "tinker://nobody/sampler_weights/x"}, NotFoundError),
    ],
)
def test_a_sampler_without_a_model(service: ServiceClient, arguments: Any, error: Any) -> None:
    with pytest.raises(error):
        service.create_sampling_client(**arguments)
    assert service.create_sampling_client(base_model="deterministic").sampling_session_id


def test_a_closed_sampler_raises_an_error_that_names_it(
    service: ServiceClient, sampler: SamplingClient
) -> None:
    with sampler as same:
        assert same is sampler
    for call in (
        lambda: sampler.sample(PROMPT),
        lambda: sampler.compute_logprobs(PROMPT),
        lambda: sampler.get_tokenizer(),
    ):
        with pytest.raises(ClientClosedError, match="SamplingClient"):
            call()
    assert service.create_sampling_client(base_model="deterministic").sampling_session_id


def test_a_client_is_its_own_result(sampler: SamplingClient) -> None:
    assert sampler.result() is sampler
    assert "deterministic" in repr(sampler)
