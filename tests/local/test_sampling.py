"""Samplers: their results, and how their requests are batched and interleaved."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from pathlib import Path
from typing import Any, Container, Dict, Iterator, List, Sequence

import numpy as np
import pytest
from local.harness import CODECS, Api, HeldEngine, ManualClock, datum, serving

from tinkex.local.engines.engine import EngineError, Finished
from tinkex.local.scheduling.batches import (
    Batch,
    SampleJob,
    Sampler,
    SamplerLane,
    SamplerWeights,
    WeightsSource,
)
from tinkex.local.settings import SamplingLimits
from tinkex.types import Datum, ModelInput, SampleRequest
from tinkex.wire.codec import Codec
from tinkex.wire.proto_codec import PROTOBUF

WEIGHTS = SamplerWeights("s:sample:0", WeightsSource("base", None, "base"))


def queued(*costs: int, arrived: float = 0.0, num_samples: int = 1) -> SamplerLane:
    lane = SamplerLane("base", WEIGHTS)
    sampler = Sampler("s:sample:0", "s", lane)
    request = SampleRequest(ModelInput.from_ints([1]), num_samples=num_samples)
    lane.queued = deque(
        SampleJob(sampler, str(n), n, request, cost, arrived) for n, cost in enumerate(costs)
    )
    return lane


def filled(lane: SamplerLane, limits: SamplingLimits, live_tokens: int) -> List[int]:
    """Return the costs of the requests that a new batch takes."""
    return [job.cost for job in lane.fill(Batch(WEIGHTS), limits, live_tokens)]


def test_a_batch_takes_the_requests_that_fit_and_always_the_first() -> None:
    limits = SamplingLimits(max_live_tokens=100)
    assert filled(queued(500, 10), limits, live_tokens=0) == [500]
    lane = queued(60, 30, 20, 5)
    assert filled(lane, limits, live_tokens=0) == [60, 30]
    assert filled(lane, limits, live_tokens=80) == [20]
    lane = queued(*[1] * 10, num_samples=3)
    assert len(filled(lane, SamplingLimits(max_batch_sequences=9), live_tokens=0)) == 3


def test_a_request_joins_a_running_batch_only_if_it_fits() -> None:
    limits = SamplingLimits(max_live_tokens=100, max_batch_sequences=3)
    batch, lane = Batch(WEIGHTS), queued(60, 30, 20)
    assert [job.cost for job in lane.fill(batch, limits, 0)] == [60, 30]
    assert lane.fill(batch, limits, 90) == []
    batch.remove(0)
    assert [job.cost for job in lane.fill(batch, limits, 30)] == [20]
    lane = queued(1, 1)
    assert len(lane.fill(batch, limits, 50)) == 1  # it has three sequences already
    assert batch.unfinished == {1, 2, 3}


def test_a_batch_starts_when_no_more_requests_arrive() -> None:
    limits = SamplingLimits(gather_s=1.0, gather_most_s=3.0)
    lane = queued(1, arrived=10.0)
    assert not lane.may_start(limits, live_tokens=0, now=10.9)
    assert lane.may_start(limits, live_tokens=0, now=11.0)
    lane.queued.append(dataclasses.replace(lane.queued[0], arrived=12.8))
    assert not lane.may_start(limits, live_tokens=0, now=12.9)
    assert lane.may_start(limits, live_tokens=0, now=13.0)  # the first has waited long enough


def test_a_batch_waits_for_room() -> None:
    limits = SamplingLimits(max_live_tokens=100, gather_s=0.0)
    lane = queued(60)
    assert not lane.may_start(limits, live_tokens=50, now=1.0)
    assert lane.may_start(limits, live_tokens=40, now=1.0)
    assert queued(600).may_start(limits, live_tokens=0, now=1.0)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_samples_are_returned_in_the_accepted_encoding(api: Api, codec: Codec) -> None:
    sampler = api.sampler(api.session())
    made = api.submit_sample(sampler, 0, num_samples=2, prompt_logprobs=True)
    assert made["sample_sequence_ids"] == [f"{sampler}:0:0", f"{sampler}:0:1"]
    answer = api.poll(made, accept=codec.content_type)
    assert answer.content_type == codec.content_type
    response = codec.decode_samples(answer.data)
    assert [s.tokens_np.size for s in response.sequences] == [4, 4]
    assert [s.stop_reason for s in response.sequences] == ["length", "length"]
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[0] is None
    assert len(response.prompt_logprobs) == 3


def test_a_sample_agrees_with_a_forward_pass(api: Api) -> None:
    model = api.model()
    made = api.post("save_weights_for_sampler", model_id=model, seq_id=1, sampling_session_seq_id=0)
    sampler = api.result(made)["sampling_session_id"]
    sequence = api.result(api.submit_sample(sampler, 0))["sequences"][0]
    tokens = [5, 6, 7, *sequence["tokens"]]
    passed = Datum(
        ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )
    output = api.result(api.submit_pass(model, 2, [passed]))
    logprobs = output["loss_fn_outputs"][0]["logprobs"]["data"]
    assert sequence["logprobs"] == pytest.approx(logprobs[2:], rel=1e-6)


def test_the_same_seed_repeats_a_sample_and_another_does_not(api: Api) -> None:
    sampler = api.sampler(api.session())

    def tokens(seq_id: int, **params: Any) -> List[int]:
        params = {"max_tokens": 12, "stop": [], **params}
        made = api.submit_sample(sampler, seq_id, sampling_params=params)
        found: List[int] = api.result(made)["sequences"][0]["tokens"]
        return found

    assert tokens(0, seed=1) == tokens(1, seed=1) != tokens(2, seed=2)
    assert tokens(3, seed=1, temperature=0.0) == tokens(4, seed=2, temperature=0.0)
    assert tokens(5, seed=1, top_k=1) == tokens(6, temperature=0.0)


def test_a_repeated_seq_id_is_sampled_once(api: Api, engine: HeldEngine) -> None:
    sampler = api.sampler(api.session())
    first = api.submit_sample(sampler, 3)
    value = api.result(first)
    assert api.submit_sample(sampler, 3) == first
    assert api.result(first) == value
    assert engine.log.count("sample 1") == 1
    api.post("asample", 409, **api.sample_body(sampler, 3, num_samples=2))


def test_queued_requests_form_one_batch(api: Api, engine: HeldEngine) -> None:
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    held = api.hold(model, 1)
    assert engine.holding.wait(20)
    made = [api.submit_sample(sampler, n, num_samples=2) for n in range(8)]
    engine.let_go.set()
    for one in (held, *made):
        assert "error" not in api.result(one)
    assert [entry for entry in engine.log if entry.startswith("sample")] == ["sample 8"]


def test_sampling_and_training_take_turns(api: Api, engine: HeldEngine) -> None:
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    held = api.hold(model, 1)
    assert engine.holding.wait(20)
    params = {"max_tokens": 40, "stop": []}  # five slices
    made = [api.submit_sample(sampler, 0, sampling_params=params)]
    made += [api.submit_pass(model, n, [datum(n)]) for n in (2, 3, 4)]
    engine.let_go.set()
    for one in (held, *made):
        api.result(one)
    assert engine.log == [
        *("0:1", "sample 1", "slice", "0:2", "slice", "0:3", "slice", "0:4"),
        *("slice", "slice"),
    ]


def test_a_short_request_does_not_wait_for_an_earlier_long_one(
    tmp_path: Path,
) -> None:
    class Telling(HeldEngine):
        """An engine that reports when its first slice is done."""

        def sample(
            self,
            sampler_id: str,
            requests: Sequence[SampleRequest],
            dropped: Container[int] = (),
        ) -> Iterator[List[Finished]]:
            for finished in super().sample(sampler_id, requests, dropped):
                self.holding.set()
                yield finished

    engine = Telling()
    with serving(tmp_path, engine) as api:
        sampler = api.sampler(api.session())
        long = {"max_tokens": 20_000, "stop": []}
        first = api.submit_sample(sampler, 0, sampling_params=long)
        assert engine.holding.wait(20)
        api.result(api.submit_sample(sampler, 1))
        pending = api.backend.futures.wait(first["request_id"], 0.0)
        assert type(pending).__name__ == "Waiting"
        assert api.backend.scheduler.why_waiting(sampler, 0) == "being sampled"
        api.post(f"sessions/{sampler.partition(':')[0]}/finish")
        assert "finished" in api.result(first)["error"]  # abandoned midway


class Sliced(HeldEngine):
    """Waits before each slice but the first, and knows the prompts of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.sliced = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.batches: List[Sequence[SampleRequest]] = []

    def sample(
        self,
        sampler_id: str,
        requests: Sequence[SampleRequest],
        dropped: Container[int] = (),
    ) -> Iterator[List[Finished]]:
        self.batches.append(requests)
        for finished in super().sample(sampler_id, requests, dropped):
            self.sliced.release()
            assert self.go_on.acquire(timeout=20)
            yield finished

    def waits_after(self, slices: int) -> None:
        """Wait until this many more slices are done."""
        for _ in range(slices):
            assert self.sliced.acquire(timeout=20)


def test_samplers_of_the_same_weights_share_batches_and_others_do_not(tmp_path: Path) -> None:
    engine = HeldEngine()
    with serving(tmp_path, engine) as api:
        sessions = [api.session() for _ in range(2)]
        model = api.model(sessions[0], 9)
        path = api.save(model, 1, "x", "save_weights_for_sampler")
        bases = [api.sampler(session) for session in sessions]
        tuned = [api.sampler(session, 1, model_path=path) for session in sessions]
        assert "sequences" in api.result(api.submit_sample(bases[0], 9))
        assert "sequences" in api.result(api.submit_sample(tuned[0], 9))
        engine.log.clear()
        held = api.hold(model, 2)
        assert engine.holding.wait(20)
        made = [api.submit_sample(sampler, 0) for sampler in (*bases, *tuned)]
        engine.let_go.set()
        values = [api.result(one) for one in made]
        api.result(held)
        assert values[0] == values[1]
        assert [entry for entry in engine.log if entry.startswith("sample")] == ["sample 2"] * 2
        assert len(engine._samplers) == 2


def test_a_request_joins_the_running_batch(tmp_path: Path) -> None:
    engine = Sliced()
    with serving(tmp_path, engine) as api:
        samplers = [api.sampler(api.session()) for _ in range(2)]
        params = {"max_tokens": 24, "stop": [], "seed": 3}  # three slices
        first = api.submit_sample(samplers[0], 0, sampling_params=params)
        engine.waits_after(1)
        second = api.submit_sample(samplers[1], 0, sampling_params=params)
        third = api.submit_sample(samplers[0], 1, sampling_params={**params, "max_tokens": 8})
        engine.go_on.release(100)
        values = [api.result(one)["sequences"][0]["tokens"] for one in (first, second, third)]
        assert values[0] == values[1]
        assert values[2] == values[0][:8]
        assert [len(batch) for batch in engine.batches] == [3]
        assert engine.log == ["sample 1", *["slice"] * 4]


def test_the_end_of_a_session_leaves_the_rest_of_a_batch_alone(tmp_path: Path) -> None:
    engine = Sliced()
    with serving(tmp_path, engine) as api:
        sessions = [api.session() for _ in range(2)]
        samplers = [api.sampler(session) for session in sessions]
        params = {"max_tokens": 24, "stop": []}
        first = api.submit_sample(samplers[0], 0, sampling_params=params)
        engine.waits_after(1)
        second = api.submit_sample(samplers[1], 0, sampling_params=params)
        engine.go_on.release()
        engine.waits_after(1)
        third = api.submit_sample(samplers[0], 1)
        api.post(f"sessions/{sessions[0]}/finish")
        engine.go_on.release(100)
        assert "finished" in api.result(first)["error"]
        assert "finished" in api.result(third)["error"]
        assert len(api.result(second)["sequences"][0]["tokens"]) == 24
        assert [len(batch) for batch in engine.batches] == [2]
        api.post("asample", 410, **api.sample_body(samplers[0], 2))
        assert "sequences" in api.result(api.submit_sample(samplers[1], 1))


def test_newer_weights_of_a_run_are_sampled_in_another_batch(tmp_path: Path) -> None:
    engine = Sliced()
    with serving(tmp_path, engine) as api:
        model = api.model()

        def save(seq_id: int) -> str:
            body = {"model_id": model, "seq_id": seq_id, "kind": "inflight"}
            made = api.post("save_weights_for_sampler", sampling_session_seq_id=seq_id, **body)
            return str(api.result(made)["sampling_session_id"])

        sampler = save(1)
        params = {"max_tokens": 24, "stop": [], "seed": 3}
        before = api.submit_sample(sampler, 0, sampling_params=params)
        engine.waits_after(1)
        api.submit_pass(model, 2)
        api.step(model, 3)
        body = {"model_id": model, "seq_id": 4, "kind": "inflight"}
        api.post("save_weights_for_sampler", sampling_session_seq_id=4, **body)
        engine.go_on.release()
        engine.waits_after(1)  # the newer weights are saved after this slice or the next
        engine.go_on.release(100)
        assert len(api.result(before)["sequences"][0]["tokens"]) == 24
        api.result(api.submit_sample(sampler, 1, sampling_params=params))
        assert [len(batch) for batch in engine.batches] == [1, 1]
        api.model(number=1)  # by now the engine thread has done all earlier work
        assert len(list((tmp_path / "samplers").iterdir())) == 1


def test_a_faulty_request_fails_alone(tmp_path: Path) -> None:
    class Picky(HeldEngine):
        def _draws(self, request: SampleRequest, steps: int) -> Any:
            if request.num_samples == 3:
                raise EngineError("three is too many")
            return super()._draws(request, steps)

    engine = Picky()
    with serving(tmp_path, engine) as api:
        session = api.session()
        model, sampler = api.model(session), api.sampler(session)
        held = api.hold(model, 1)
        assert engine.holding.wait(20)
        made = [api.submit_sample(sampler, n, num_samples=n) for n in (1, 2, 3, 4)]
        engine.let_go.set()
        api.result(held)
        failed = [api.result(one).get("error") for one in made]
        assert failed == [None, None, "three is too many", None]


def test_a_batch_that_breaks_fails_all_its_requests(tmp_path: Path) -> None:
    class Broken(HeldEngine):
        def sample(
            self,
            sampler_id: str,
            requests: Sequence[SampleRequest],
            dropped: Container[int] = (),
        ) -> Iterator[List[Finished]]:
            yield []
            if requests[0].num_samples == 2:
                raise ValueError("NaN in the logits")
            # otherwise it ends without a result

    with serving(tmp_path, Broken()) as api:
        sampler = api.sampler(api.session())
        failure = api.result(api.submit_sample(sampler, 0, num_samples=2))
        assert failure["category"] == "server"
        assert "NaN in the logits" in failure["error"]
        failure = api.result(api.submit_sample(sampler, 1))
        assert failure == {"error": "the engine ended without a result", "category": "server"}


def test_a_sampler_keeps_its_weights_when_the_checkpoint_is_deleted(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    path = api.save(model, 1, "s", "save_weights_for_sampler")
    sampler = api.sampler(session, 0, model_path=path)
    before = api.result(api.submit_sample(sampler, 0))
    api.client.delete(f"/api/v1/training_runs/{model}/checkpoints/sampler_weights/s")
    assert api.result(api.submit_sample(sampler, 1)) == before
    assert api.get(f"samplers/{sampler}") == {
        "sampler_id": sampler,
        "base_model": "deterministic",
        "model_path": path,
    }
    body = {"session_id": session, "sampling_session_seq_id": 1, "model_path": path}
    assert "no checkpoint" in api.post("create_sampling_session", 404, **body)["detail"]


def test_trained_weights_sample_differently(api: Api) -> None:
    session = api.session()
    model = api.model(session)
    base = api.sampler(session, 0)
    for seq_id in range(1, 21, 2):
        api.submit_pass(model, seq_id)
        api.step(model, seq_id + 1)
    made = api.post(
        "save_weights_for_sampler", model_id=model, seq_id=21, sampling_session_seq_id=1
    )
    trained = api.result(made)["sampling_session_id"]
    params = {"max_tokens": 30, "stop": [], "seed": 4}
    before, after = (
        api.result(api.submit_sample(s, 0, sampling_params=params))["sequences"][0]["tokens"]
        for s in (base, trained)
    )
    assert before != after


def test_samplers_beyond_the_cap_are_reloaded_when_used(tmp_path: Path) -> None:
    engine = HeldEngine()
    limits = SamplingLimits(gather_s=0.0, max_loaded=2)
    with serving(tmp_path, engine, limits=limits) as api:
        session = api.session()
        model = api.model(session)
        paths = [api.save(model, n, f"x{n}", "save_weights_for_sampler") for n in (1, 2, 3)]
        samplers = [api.sampler(session, n, model_path=path) for n, path in enumerate(paths)]
        first = api.result(api.submit_sample(samplers[2], 0))
        assert len(engine._samplers) == 2
        for seq_id in (1, 2):
            for sampler in samplers:
                value = api.result(api.submit_sample(sampler, seq_id))
                assert value == first
                assert len(engine._samplers) == 2


def test_a_retried_ephemeral_save_with_a_new_sampler_number_is_one_save(api: Api) -> None:
    model = api.model()
    body = {"model_id": model, "seq_id": 1, "type": "save_weights_for_sampler"}
    first = api.post("save_weights_for_sampler", **body, sampling_session_seq_id=0)
    assert api.post("save_weights_for_sampler", **body, sampling_session_seq_id=1) == first
    sampler = api.result(first)["sampling_session_id"]
    assert sampler.endswith(":sample:0")
    assert api.get(f"sessions/{model.partition(':')[0]}")["sampler_ids"] == [sampler]


def test_the_weights_of_ended_samplers_are_deleted_from_disk(api: Api, tmp_path: Path) -> None:
    session = api.session()
    model = api.model(session)
    for seq_id in (1, 2):
        made = api.post(
            "save_weights_for_sampler",
            model_id=model,
            seq_id=seq_id,
            sampling_session_seq_id=seq_id,
        )
        api.result(made)
    assert len(list((tmp_path / "samplers").iterdir())) == 2
    api.post(f"sessions/{session}/finish")
    api.model()  # a turn of the engine later
    api.model()
    assert list((tmp_path / "samplers").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": {"chunks": []}}, "the prompt is empty"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [200_000]}]}}, "token 200000"),
        (
            {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1] * 40_000}]}},
            "reads at most",
        ),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1] * 32_768}]}}, "no room"),
        ({"prompt": "hello"}, "chunks"),
        ({"num_samples": 0}, "num_samples"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 3}, "prompt_logprobs_last_n"),
        ({"seq_id": None}, "'seq_id' is missing"),
        ({"sampling_session_id": None}, "'sampling_session_id' is missing"),
    ],
)
def test_an_invalid_sample_request_is_refused(api: Api, changes: Dict[str, Any], says: str) -> None:
    sampler = api.sampler(api.session())
    body = {**api.sample_body(sampler, 0), **changes}
    assert says in api.post("asample", 400, **body)["detail"]
    assert "sequences" in api.result(api.submit_sample(sampler, 1))


def test_an_invalid_sampler_is_refused(api: Api) -> None:
    session = api.session()

    def refused(status: int, **body: Any) -> str:
        body = {"session_id": session, "sampling_session_seq_id": 0, **body}
        return str(api.post("create_sampling_session", status, **body)["detail"])

    assert "this server has deterministic" in refused(400, base_model="gpt")
    assert "this server has deterministic" in refused(400)
    assert "not a checkpoint path" in refused(400, model_path="weights/a")
    assert "unknown" in refused(404, model_path="tinker://a/weights/b")
    assert "unknown" in api.post("asample", 404, **api.sample_body("no:sample:0", 0))["detail"]
    assert "unknown" in api.get("samplers/no:sample:0", 404)["detail"]


def test_too_many_queued_samples_are_turned_away(tmp_path: Path) -> None:
    engine = HeldEngine()
    with serving(tmp_path, engine, limits=SamplingLimits(gather_s=0.0, max_queued=2)) as api:
        session = api.session()
        model, sampler = api.model(session), api.sampler(session)
        held = api.hold(model, 1)
        assert engine.holding.wait(20)
        made = [api.submit_sample(sampler, n) for n in (0, 1)]
        body = api.sample_body(sampler, 2)
        assert "2 sample requests are queued" in api.post("asample", 429, **body)["detail"]
        reason = api.backend.scheduler.why_waiting(sampler, 1)
        assert reason == "queued for the next batch, behind 1 other(s)"
        engine.let_go.set()
        for one in (held, *made):
            api.result(one)
        assert "sequences" in api.result(api.post("asample", **body))  # the number succeeds later


def test_a_batch_gathers_requests_only_for_a_limited_time(tmp_path: Path) -> None:
    limits = SamplingLimits(gather_s=0.01, gather_most_s=0.02)
    engine = HeldEngine()
    with serving(tmp_path, engine, limits=limits) as api:
        sampler = api.sampler(api.session())
        assert "sequences" in api.result(api.submit_sample(sampler, 0))


def test_many_threads_share_one_sampler(api: Api, engine: HeldEngine) -> None:
    sampler = api.sampler(api.session())
    results: Dict[int, Any] = {}

    def run(seq_id: int) -> None:
        own = Api(api.client.application.test_client())
        results[seq_id] = own.result(own.submit_sample(sampler, seq_id))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 20
    assert all(value == results[0] for value in results.values())


def test_all_logprobs_of_a_prompt(api: Api) -> None:
    sampler = api.sampler(api.session())
    made = api.submit_sample(
        sampler,
        0,
        prompt_logprobs=True,
        topk_prompt_logprobs=3,
        topk_sample_logprobs=2,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=1,
        target_prompt_logprobs={"data": [6, -1, 7, 8], "dtype": "int64", "shape": [2, 2]},
    )
    response = PROTOBUF.decode_samples(api.poll(made, accept=PROTOBUF.content_type).data)
    known = response.prompt_logprobs
    assert known is not None
    assert known[:2] == [None, None]
    assert known[2] is not None
    rows = response.topk_prompt_logprobs
    assert rows is not None
    assert rows[0] is None
    assert [len(row or ()) for row in rows[1:]] == [3, 3]
    best = rows[1][0][1] if rows[1] else 0.0
    assert best == pytest.approx(np.log(0.95 * 32 / 64.5), abs=1e-3)
    target = response.target_prompt_logprobs
    assert target is not None
    assert target.shape == (2, 2)
    assert target.tolist()[0][1] == 0.0
    assert target.tolist()[1][0] == pytest.approx(known[2])
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.shape == (2, 2)
    assert [len(row or ()) for row in response.sequences[0].topk_logprobs or ()] == [2] * 4


def test_stop_conditions(api: Api) -> None:
    sampler = api.sampler(api.session())
    params = {"max_tokens": 30, "temperature": 0.0}
    made = api.submit_sample(sampler, 0, sampling_params={**params, "stop": []})
    tokens = api.result(made)["sequences"][0]["tokens"]
    assert len(tokens) == 30
    stop = api.submit_sample(sampler, 1, sampling_params={**params, "stop": [tokens[4]]})
    text = chr(tokens[6]) + chr(tokens[7])
    cut = api.submit_sample(sampler, 2, sampling_params={**params, "stop": [text]})
    for request_id, length in ((stop, 5), (cut, 8)):
        sequence = api.result(request_id)["sequences"][0]
        assert sequence["tokens"] == tokens[:length]
        assert sequence["stop_reason"] == "stop"


def test_a_sampler_of_an_expired_session_refuses(tmp_path: Path) -> None:
    clock = ManualClock()
    with serving(tmp_path, clock=clock) as api:
        sampler = api.sampler(api.session())
        clock.now += 61
        assert "expired" in api.post("asample", 404, **api.sample_body(sampler, 0))["detail"]


def test_a_sampler_that_cannot_be_loaded_gives_the_reason_and_can_be_retried(
    tmp_path: Path,
) -> None:
    class Full(HeldEngine):
        full = True

        def create_sampler(self, sampler_id: str, folder: Any) -> None:
            if self.full:
                raise EngineError("no room for another adapter", "server")
            super().create_sampler(sampler_id, folder)

    engine = Full()
    with serving(tmp_path, engine) as api:
        sampler = api.sampler(api.session())
        failure = api.result(api.submit_sample(sampler, 0))
        assert failure == {"error": "no room for another adapter", "category": "server"}
        engine.full = False
        assert "sequences" in api.result(api.submit_sample(sampler, 1))


def test_a_batch_that_the_engine_refuses_fails(tmp_path: Path) -> None:
    class Refusing(HeldEngine):
        def sample(
            self,
            sampler_id: str,
            requests: Sequence[SampleRequest],
            dropped: Container[int] = (),
        ) -> Iterator[List[Finished]]:
            raise EngineError("not today", "server")

    with serving(tmp_path, Refusing()) as api:
        sampler = api.sampler(api.session())
        failure = api.result(api.submit_sample(sampler, 0))
        assert failure == {"error": "not today", "category": "server"}


def test_queued_samples_fail_when_their_session_ends(api: Api, engine: HeldEngine) -> None:
    session, other = api.session(), api.session()
    model, sampler = api.model(other), api.sampler(session)
    held = api.hold(model, 1)
    assert engine.holding.wait(20)
    made = api.submit_sample(sampler, 0)
    api.post(f"sessions/{session}/finish")
    assert "finished" in api.result(made)["error"]  # immediately, while the engine is still busy
    engine.let_go.set()
    api.result(held)
    assert "sample 1" not in engine.log
