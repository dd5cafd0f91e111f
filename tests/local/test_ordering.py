"""Requests of a run are executed in seq_id order, once each, whatever happens to any of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from local.harness import CODECS, Api, HeldEngine, datum, serving

from tinkex.errors import InvalidInputError
from tinkex.local.errors import HTTPError
from tinkex.local.scheduling.lanes import Job, Lane, Missing
from tinkex.types import Datum, ForwardBackwardRequest, ModelInput
from tinkex.wire.codec import Codec
from tinkex.wire.json_codec import JSON


def job(name: str) -> Job:
    return Job(name, lambda: None)


def ready(lane: Lane) -> list[str]:
    return [one.request_id for one in lane.ready]


def test_a_lane_releases_requests_in_order() -> None:
    lane = Lane("m", "s")
    lane.add(3, b"c", job("c"))
    lane.add(2, b"b", job("b"))
    assert ready(lane) == []
    assert lane.why_waiting(3) == "waits for seq_id 1 of m, which has not arrived"
    lane.add(1, b"a", job("a"))
    assert ready(lane) == ["a", "b", "c"]
    assert lane.why_waiting(3) == "queued behind 2 earlier request(s) of m"
    assert lane.why_waiting(1) == "running, or next in turn"


def test_a_rejected_number_closes_the_gap() -> None:
    lane = Lane("m", "s")
    lane.add(2, b"b", job("b"))
    lane.add(1, b"a", None)
    assert ready(lane) == ["b"]
    assert lane.next_seq == 3


def test_a_request_waiting_for_a_missing_number_may_be_resent_under_that_number() -> None:
    lane = Lane("m", "s")
    lane.add(1, b"a", job("a"))
    lane.note_missing(10.0)
    assert lane.missing is None
    lane.add(4, b"d", job("d"))
    lane.note_missing(11.0)
    lane.add(3, b"c", job("c"))
    lane.note_missing(12.0)
    assert lane.missing == Missing(2, since=11.0)
    assert [(seq_id, one.request_id) for seq_id, one in lane.remove_early()] == [(3, "c"), (4, "d")]
    assert lane.missing is None
    lane.add(2, b"c", job("c"))
    lane.add(3, b"d", job("d"))
    assert lane.find(3, b"d") == "d"
    assert ready(lane) == ["a", "c", "d"]


def test_a_rejected_request_may_be_repeated_and_then_runs() -> None:
    lane = Lane("m", "s")
    lane.add(1, b"a", None)
    assert lane.find(1, b"a") is None
    lane.add(1, b"a", job("a"))
    assert ready(lane) == ["a"]
    assert lane.find(1, b"a") == "a"


def test_a_forgotten_number_is_a_conflict() -> None:
    lane = Lane("m", "s")
    for seq_id in range(1, 5000):
        lane.add(seq_id, b"x", job(str(seq_id)))
    assert lane.find(4999, b"x") == "4999"
    with pytest.raises(HTTPError, match="used long ago") as conflict:
        lane.find(1, b"x")
    assert conflict.value.status == 409


def test_requests_that_arrive_in_any_order_run_in_seq_id_order(
    api: Api, engine: HeldEngine
) -> None:
    model = api.model()
    submitted = [api.submit_pass(model, seq_id, [datum(seq_id)]) for seq_id in (4, 2, 3)]
    assert engine.log == []
    submitted.append(api.submit_pass(model, 1, [datum(1)]))
    for one in submitted:
        assert "metrics" in api.result(one)
    assert engine.log == ["0:1", "0:2", "0:3", "0:4"]


def test_a_request_beyond_a_gap_reports_the_missing_number(tmp_path: Path) -> None:
    with serving(tmp_path, retrieve_hold_s=0.0) as api:
        session = api.session()
        request_id = api.submit_model(session)
        model = f"{session}:train:0"
        early = api.step(model, 2)
        answer = api.poll(early).get_json()
        assert answer["type"] == "try_again"
        assert answer["request_id"] == early["request_id"]
        assert answer["queue_state"] == "active"
        assert answer["queue_state_reason"].startswith("waits for seq_id 1 ")
        assert "model_id" in api.result(request_id)


def test_a_repeated_seq_id_gets_the_result_of_the_first_execution(
    api: Api, engine: HeldEngine
) -> None:
    model = api.model()
    first = api.submit_pass(model, 1)
    value = api.result(first)
    assert api.submit_pass(model, 1) == first
    assert api.result(first) == value
    assert engine.log == ["0:1"]


def test_a_repeat_of_a_request_that_is_still_queued_is_the_same_request(
    api: Api, engine: HeldEngine
) -> None:
    model = api.model()
    early = api.step(model, 2)
    assert api.step(model, 2) == early
    api.result(api.submit_pass(model, 1))
    api.result(early)
    assert engine.log == ["0:1", "0:optim"]


def test_a_repeated_seq_id_with_another_body_is_a_conflict(api: Api) -> None:
    model = api.model()
    api.submit_pass(model, 1, [datum(1)])
    problem = api.submit_pass(model, 1, [datum(2)], expect=409)
    assert "seq_id 1" in problem["detail"]
    api.result(api.step(model, 2))


def test_a_failed_request_does_not_stop_the_run(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    lame = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3, 4]})
    failing = api.submit_pass(model, 1, [lame])
    after = api.submit_pass(model, 2)
    failure = api.result(failing)
    assert failure["category"] == "user"
    assert "one target" in failure["error"]
    assert "metrics" in api.result(after)


def test_an_engine_error_fails_the_request_and_the_server_continues(
    api: Api, engine: HeldEngine, caplog: pytest.LogCaptureFixture
) -> None:
    model = api.model()
    engine.explode = True
    failure = api.result(api.submit_pass(model, 1))
    assert failure == {
        "error": "the engine failed: RuntimeError: the engine tripped",
        "category": "server",
    }
    assert "the engine tripped" in caplog.text  # with its traceback
    engine.explode = False
    assert "metrics" in api.result(api.submit_pass(model, 2))


def test_a_rejected_submission_uses_up_its_number(api: Api) -> None:
    model = api.model()
    assert "nonsense" in api.submit_pass(model, 1, loss_fn="nonsense", expect=400)["detail"]
    api.step(model, 2, expect=400, learning_rate=-1.0)
    assert "metrics" in api.result(api.step(model, 3))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_even_an_undecodable_body_uses_up_its_number(api: Api, codec: Codec) -> None:
    model = api.model()
    body = codec.encode_forward_backward(ForwardBackwardRequest(model, 1, [datum()], "ppo"))
    if codec is JSON:
        broken = body.replace(b'"shape":[3]', b'"shape":[4]', 1)
    else:
        broken = body.replace(b"\x22\x01\x03", b"\x22\x01\x04", 1)  # the shape of a tensor
    assert broken != body
    with pytest.raises(InvalidInputError):
        codec.decode_forward_backward(broken)
    answer = api.client.post(
        "/api/v1/forward_backward", data=broken, content_type=codec.content_type
    )
    assert answer.status_code == 400
    assert "metrics" in api.result(api.submit_pass(model, 2))


def test_requests_for_a_run_that_could_not_be_created_fail(tmp_path: Path) -> None:
    class Full(HeldEngine):
        def create(self, model_id: str, lora: object) -> None:
            raise MemoryError("no room")

    with serving(tmp_path, Full()) as api:
        session = api.session()
        request_id = api.submit_model(session)
        model = f"{session}:train:0"
        later = api.step(model, 1)
        assert api.result(request_id)["category"] == "server"
        assert "was not created: the engine failed: MemoryError" in api.result(later)["error"]
        assert api.get("training_runs")["training_runs"] == []


def test_models_take_turns(api: Api, engine: HeldEngine) -> None:
    session = api.session()
    first, second = api.model(session, 0), api.model(session, 1)
    held = api.hold(first, 1)
    assert engine.holding.wait(20)
    waiting = [api.submit_pass(first, seq, [datum(seq)]) for seq in (2, 3, 4)]
    waiting += [api.submit_pass(second, seq, [datum(seq)]) for seq in (1, 2)]
    engine.let_go.set()
    for one in (held, *waiting):
        api.result(one)
    assert engine.log[0] == "0:1"  # the held request
    assert engine.log[1:] == ["1:1", "0:2", "1:2", "0:3", "0:4"]
