"""Waiting for all samples of a client together, acknowledging results, and cancelling."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Set

import pytest
from local.harness import WAIT_S, Api, HeldEngine, serving
from support.threads import wait_until

from tinkex.local.engines.engine import Finished
from tinkex.local.state.futures import CLONE_BLOCK, Completions, FutureTable, Group, Success
from tinkex.types import SampleRequest
from tinkex.wire.proto_codec import PROTOBUF


def news(
    api: Api, sampler: str, cursor: int = 0, *, clone: int = 0, expect: int = 200, **more: Any
) -> Any:
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler,
        "cloned_sampler_id": clone,
    }
    body = {"target": target, "prev_cursor": cursor, **more}
    return api.post("retrieve_futures", expect, **body)


def ids(answer: Dict[str, Any]) -> List[str]:
    return [one["request_id"] for one in answer["completions"]]


# The table that keeps the order of completions


def test_completions_are_in_order_and_forgotten_up_to_the_cursor() -> None:
    done, group, other = Completions(), Group("s", 0), Group("s", 1)
    done.add(group, "a")
    done.add(other, "b")
    done.add(group, "c")
    assert done.after(group, 0) == (["a", "c"], 3)
    assert done.after(group, 0) == (["a", "c"], 3)  # the answer may have been lost
    assert done.after(group, 1) == (["c"], 3)
    assert done.after(group, 3) == ([], 3)
    assert done.after(group, 0) == ([], 0)  # its cursor confirmed both
    assert done.after(other, 0) == (["b"], 2)
    done.discard(other, 2)
    assert done.after(other, 0) == ([], 0)


def test_numbers_of_a_block_belong_to_one_client() -> None:
    assert Group.of("s", CLONE_BLOCK - 1) == Group("s", 0)
    assert Group.of("s", 3 * CLONE_BLOCK) == Group("s", 3)


def test_a_dropped_result_is_neither_listed_nor_kept() -> None:
    futures, group = FutureTable(max_finished=1), Group("s", 0)
    for name in ("a", "b"):
        futures.create(name, "s", 0, group=group)
        futures.complete(name, Success(name))
    assert futures.completed(group, 0, 0.0) == ([("b", Success("b"))], 2)
    assert futures.is_gone("a")
    futures.acknowledge(Group("s", 1), ["b"])  # belongs to another client
    assert futures.wait("b", 0.0) == Success("b")
    futures.acknowledge(group, ["b", "unknown"])
    assert futures.wait("b", 0.0) is None
    assert not futures.is_gone("unknown")


def test_a_waiting_poll_is_woken_by_the_next_completion_of_its_group() -> None:
    futures, group = FutureTable(), Group("s", 0)
    futures.create("a", "s", 0, group=group)
    futures.create("b", "s", 0, group=Group("s", 1))
    found: List[Any] = []
    waiters = [
        threading.Thread(target=lambda: found.append(futures.completed(group, 0, WAIT_S)))
        for _ in range(3)
    ]
    for waiter in waiters:
        waiter.start()
    futures.complete("b", Success(2))
    futures.complete("a", Success(1))
    for waiter in waiters:
        waiter.join(WAIT_S)
    assert found == [([("a", Success(1))], 2)] * 3


def test_close_releases_polls_that_wait_for_completions() -> None:
    futures = FutureTable()
    found: List[Any] = []
    waiter = threading.Thread(
        target=lambda: found.append(futures.completed(Group("s", 0), 0, WAIT_S))
    )
    waiter.start()
    futures.close()
    waiter.join(WAIT_S)
    assert found == [([], 0)]


# The route


def test_two_hundred_samples_are_reported_to_one_poller(api: Api) -> None:
    sampler = api.sampler(api.session())
    made = {str(api.submit_sample(sampler, n)["request_id"]) for n in range(200)}
    seen: Dict[str, int] = {}
    cursor, fetched = 0, []
    while len(seen) < 200:
        answer = news(api, sampler, cursor, retrieved_request_ids=sorted(fetched))
        assert answer["completions"], "a long poll ends with news"
        assert answer["cursor"] > cursor
        cursor, fetched = answer["cursor"], ids(answer)
        for one in answer["completions"]:
            assert one["state"] == "finished"
            assert one["request_id"] not in seen
            seen[one["request_id"]] = one["response_payload_uncompressed_size"]
            result = api.poll(one["request_id"], PROTOBUF.content_type)
            assert len(result.data) == seen[one["request_id"]]
    assert set(seen) == made
    assert news(api, sampler, cursor, timeout=0.0) == {"completions": [], "cursor": cursor}


def test_only_acknowledged_results_are_dropped(api: Api) -> None:
    sampler = api.sampler(api.session())
    first, second = (str(api.submit_sample(sampler, n)["request_id"]) for n in (0, 1))
    for one in (first, second):
        api.result(one)
    cursor = news(api, sampler)["cursor"]
    acked = news(api, sampler, cursor, timeout=0.0, retrieved_request_ids=[first])
    assert acked == {"completions": [], "cursor": cursor}
    answer = api.poll(first)
    assert answer.status_code == 410
    assert "dropped" in answer.get_json()["detail"]
    assert "sequences" in api.result(second)
    api.post("cancel_future", request_id=first)  # already done: nothing happens


def test_a_lost_answer_is_repeated(api: Api) -> None:
    sampler = api.sampler(api.session())
    api.result(api.submit_sample(sampler, 0))
    first = news(api, sampler)
    assert news(api, sampler) == first


def test_clones_get_only_the_completions_of_their_own_samples(api: Api) -> None:
    sampler = api.sampler(api.session())
    joined = [
        api.post("join_sampling_session", sampling_session_id=sampler)["client_counter"]
        for _ in range(2)
    ]
    assert joined == [1, 2]
    for seq_id in (0, CLONE_BLOCK, CLONE_BLOCK + 1):
        api.result(api.submit_sample(sampler, seq_id))
    assert ids(news(api, sampler)) == [f"{sampler}:0"]
    assert ids(news(api, sampler, clone=1)) == [
        f"{sampler}:{CLONE_BLOCK}",
        f"{sampler}:{CLONE_BLOCK + 1}",
    ]
    assert ids(news(api, sampler, clone=2, timeout=0.0)) == []


def test_failures_are_reported_without_a_size(tmp_path: Path) -> None:
    class Broken(HeldEngine):
        def _draws(self, request: SampleRequest, steps: int) -> Any:
            raise ValueError("NaN in the logits")

    with serving(tmp_path, Broken()) as api:
        sampler = api.sampler(api.session())
        made = api.submit_sample(sampler, 0)
        reported = news(api, sampler)["completions"]
        assert reported == [{"state": "failed", "request_id": made["request_id"]}]
        assert "NaN in the logits" in api.result(made)["error"]


def test_a_long_poll_ends_after_its_timeout(tmp_path: Path) -> None:
    with serving(tmp_path, retrieve_hold_s=0.01) as api:
        sampler = api.sampler(api.session())
        assert news(api, sampler, 7) == {"completions": [], "cursor": 7}
        assert news(api, sampler, 7, timeout=3600)["cursor"] == 7  # the server's limit is shorter


def test_too_many_held_polls_are_asked_to_retry(tmp_path: Path) -> None:
    with serving(tmp_path, max_held_polls=1) as api:
        session = api.session()
        sampler = api.sampler(session)
        found: List[Any] = []
        other = Api(api.client.application.test_client())
        held = threading.Thread(target=lambda: found.append(news(other, sampler)))
        held.start()
        wait_until(lambda: bool(api.backend.futures._listeners), "the first poll is held")
        assert "held already" in news(api, sampler, expect=429)["detail"]
        api.submit_sample(sampler, 0)
        held.join(WAIT_S)
        assert len(found[0]["completions"]) == 1


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"target": {"type": "model"}}, 400, "target"),
        ({"target": {"type": "sampling_session"}}, 400, "sampling_session_id"),
        ({"target": None}, 400, "'target' is missing"),
        ({"clone": -1}, 400, "cloned_sampler_id"),
        ({"sampler": "nobody:sample:0"}, 404, "unknown"),
        ({"cursor": -1}, 400, "prev_cursor"),
        ({"timeout": -1}, 400, "timeout"),
        ({"timeout": True}, 400, "timeout"),
        ({"retrieved_request_ids": [1]}, 400, "retrieved_request_ids"),
    ],
)
def test_the_fault_of_a_request_is_named(
    api: Api, change: Dict[str, Any], status: int, says: str
) -> None:
    sampler = change.pop("sampler", None) or api.sampler(api.session())
    assert says in news(api, sampler, expect=status, **change)["detail"]


def test_an_ended_session_reports_failed_samples_and_then_holds_no_poll(
    api: Api, engine: HeldEngine
) -> None:
    session, other = api.session(), api.session()
    sampler, model = api.sampler(session), api.model(other)
    held = api.hold(model, 1)
    assert engine.holding.wait(WAIT_S)
    made = api.submit_sample(sampler, 0)
    api.post(f"sessions/{session}/finish", reason={"type": "success"}, detail=None)
    answer = news(api, sampler)
    assert ids(answer) == [made["request_id"]]
    assert "finished" in news(api, sampler, answer["cursor"], expect=410)["detail"]
    acked = news(api, sampler, answer["cursor"], timeout=0.0, retrieved_request_ids=ids(answer))
    assert acked["completions"] == []
    engine.let_go.set()
    api.result(held)


# Cancelling


def test_a_queued_sample_is_cancelled_before_the_engine_sees_it(
    api: Api, engine: HeldEngine
) -> None:
    session = api.session()
    model, sampler = api.model(session), api.sampler(session)
    held = api.hold(model, 1)
    assert engine.holding.wait(WAIT_S)
    first, second = api.submit_sample(sampler, 0), api.submit_sample(sampler, 1)
    for _ in range(2):  # repeating it is not an error
        api.post("cancel_future", request_id=first["request_id"])
    failure = {"error": "the client cancelled the request", "category": "user"}
    assert api.result(first) == failure
    engine.let_go.set()
    api.result(held)
    assert "sequences" in api.result(second)
    assert "sample 1" in engine.log
    assert "sample 2" not in engine.log
    assert api.result(first) == failure


class Slow(HeldEngine):
    """Records the requests in the batch, and waits before each slice but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.working: List[Set[int]] = []
        self.sliced = threading.Event()
        self.go_on = threading.Event()
        self.closed = threading.Event()

    def sample(
        self, sampler_id: str, requests: Sequence[SampleRequest], dropped: Any = ()
    ) -> Iterator[List[Finished]]:
        slices = super().sample(sampler_id, requests, dropped)
        try:
            for finished in slices:
                self.working.append({n for n in range(len(requests)) if n not in dropped})
                yield finished
                self.sliced.set()
                assert self.go_on.wait(WAIT_S)
        finally:
            self.closed.set()


def test_a_running_sample_is_dropped_from_its_batch(tmp_path: Path) -> None:
    engine = Slow()
    with serving(tmp_path, engine) as api:
        session = api.session()
        model, sampler = api.model(session), api.sampler(session)
        blocked = api.hold(model, 1)  # so that both samples are in one batch
        assert engine.holding.wait(WAIT_S)
        long = {"max_tokens": 2000, "stop": []}
        first = api.submit_sample(sampler, 0, sampling_params=long)
        second = api.submit_sample(sampler, 1, sampling_params={"max_tokens": 40, "stop": []})
        engine.let_go.set()
        api.result(blocked)
        assert engine.sliced.wait(WAIT_S)
        api.post("cancel_future", request_id=first["request_id"])
        engine.go_on.set()
        assert "cancelled" in api.result(first)["error"]
        assert len(api.result(second)["sequences"][0]["tokens"]) == 40
        assert engine.closed.wait(WAIT_S)
        assert engine.working[0] == {0, 1}
        assert engine.working[-1] == {1}
        assert len(engine.working) < 10  # 2000 tokens would have taken 250 slices


def test_a_batch_is_abandoned_if_all_its_samples_are_cancelled(tmp_path: Path) -> None:
    engine = Slow()
    with serving(tmp_path, engine) as api:
        sampler = api.sampler(api.session())
        made = api.submit_sample(sampler, 0, sampling_params={"max_tokens": 30_000, "stop": []})
        assert engine.sliced.wait(WAIT_S)
        api.post("cancel_future", request_id=made["request_id"])
        engine.go_on.set()
        assert engine.closed.wait(WAIT_S)
        assert len(engine.working) < 5
        assert "sequences" in api.result(api.submit_sample(sampler, 1))


def test_cancelling_a_sample_while_it_finishes_leaves_one_outcome(api: Api) -> None:
    sampler = api.sampler(api.session())
    for seq_id in range(100):
        made = api.submit_sample(sampler, seq_id)["request_id"]
        api.post("cancel_future", request_id=made)
        outcome = api.result(made)
        assert ("sequences" in outcome) != ("error" in outcome)
        assert api.result(made) == outcome
    assert len(news(api, sampler)["completions"]) == 100


def test_submitting_cancelling_and_polling_concurrently_settles_every_sample_once(api: Api) -> None:
    sampler = api.sampler(api.session())
    count, workers = 120, 4
    barrier = threading.Barrier(2 * workers)
    failed: List[BaseException] = []

    def own() -> Api:
        return Api(api.client.application.test_client())

    def guarded(work: Any, number: int) -> None:
        try:
            barrier.wait(WAIT_S)
            work(own(), number)
        except BaseException as error:
            failed.append(error)

    def submit(client: Api, number: int) -> None:
        for seq_id in range(number, count, workers):
            client.submit_sample(sampler, seq_id)

    def cancel(client: Api, number: int) -> None:
        for seq_id in range(number, count, workers):
            body = {"request_id": f"{sampler}:{seq_id}"}
            for _ in range(3):
                client.client.post("/api/v1/cancel_future", json=body)  # may be unknown yet

    threads = [
        threading.Thread(target=guarded, args=(work, number))
        for work in (submit, cancel)
        for number in range(workers)
    ]
    for thread in threads:
        thread.start()
    reported: List[str] = []
    cursor = 0
    while len(reported) < count:
        answer = news(api, sampler, cursor)
        cursor = answer["cursor"]
        reported += ids(answer)
    for thread in threads:
        thread.join(WAIT_S)
    assert failed == []
    assert sorted(reported) == sorted(f"{sampler}:{seq_id}" for seq_id in range(count))
    for request_id in reported:
        outcome = api.result(request_id)
        assert ("sequences" in outcome) != ("error" in outcome)
    assert api.backend.scheduler._queued_samples == 0  # type: ignore[attr-defined]


def test_only_samples_can_be_cancelled(api: Api, engine: HeldEngine) -> None:
    model = api.model()
    held = api.hold(model, 1)
    assert "only samples" in api.post("cancel_future", 400, request_id=held)["detail"]
    engine.let_go.set()
    api.result(held)
    api.post("cancel_future", request_id=held)  # already done
    assert "unknown" in api.post("cancel_future", 404, request_id="nothing")["detail"]


# One result


def test_a_large_result_is_announced_by_its_size_if_the_poll_allows_it(tmp_path: Path) -> None:
    with serving(tmp_path, metadata_threshold_bytes=200) as api:
        sampler = api.sampler(api.session())
        small = api.submit_sample(sampler, 0)
        large = api.submit_sample(sampler, 1, num_samples=20)
        for made in (small, large):
            api.result(made)

        def ask(made: Any, **more: Any) -> Any:
            return api.client.post(
                "/api/v1/retrieve_future",
                json={"request_id": made["request_id"], **more},
                headers={"Accept": PROTOBUF.content_type},
            )

        reported = ask(large, allow_metadata_only=True).get_json()
        payload = ask(large, allow_metadata_only=False).data
        assert reported == {"status": "complete_metadata", "response_payload_size": len(payload)}
        assert len(PROTOBUF.decode_samples(payload).sequences) == 20
        assert ask(small, allow_metadata_only=True).mimetype == PROTOBUF.content_type


def test_announcing_a_size_does_not_count_as_fetched(tmp_path: Path) -> None:
    with serving(tmp_path, metadata_threshold_bytes=0) as api:
        sampler = api.sampler(api.session())
        made = str(api.submit_sample(sampler, 0)["request_id"])
        api.backend.futures.wait(made, WAIT_S)
        api.post("retrieve_future", request_id=made, allow_metadata_only=True)
        assert not api.backend.futures._fetched
        api.post("retrieve_future", request_id=made)
        assert list(api.backend.futures._fetched) == [made]
